"""Coarse deadlines for many connections: one wheel, moved on by ticks, instead of a timer for each request.

After G. Varghese and T. Lauck, "Hashed and hierarchical timing wheels" (1987), with lazy moves: to put a deadline off
is one assignment, and the wheel finds out when the old slot comes by.
"""

from __future__ import annotations

from math import inf
from typing import Generic, Protocol, TypeVar

TICK_S = 0.5
"""How often a server moves its wheel on, and the length of a slot."""


class Timed(Protocol):
    """What has a deadline, in seconds of the wheel's clock. ``slot`` belongs to the wheel; 0: it is in none."""

    deadline_s: float
    slot: int


T = TypeVar("T", bound=Timed)


class Wheel(Generic[T]):
    """Things by their deadlines, each found at most one tick late."""

    def __init__(self, tick_s: float, now_s: float) -> None:
        self._tick_s = tick_s
        self._slots: dict[int, set[T]] = {}
        self._last = int(now_s / tick_s)

    def arm(self, timed: T, deadline_s: float) -> None:
        """Set a deadline. A later one than before costs one assignment; an earlier one moves it."""
        timed.deadline_s = deadline_s
        slot = timed.slot
        if (slot and slot * self._tick_s <= deadline_s) or deadline_s == inf:
            return
        due = max(int(deadline_s / self._tick_s) + 1, self._last + 1)
        if not slot or slot > due:
            self._put(timed, due)

    def forget(self, timed: T) -> None:
        """Take it out. What is in no slot is left alone."""
        if timed.slot:
            self._slots[timed.slot].discard(timed)
            timed.slot = 0

    def advance(self, now_s: float) -> list[T]:
        """Give what is due at ``now_s``, taken out of the wheel."""
        upto = int(now_s / self._tick_s)
        due: list[T] = []
        again: list[T] = []
        passed = [slot for slot in self._slots if slot <= upto]
        self._last = max(upto, self._last)
        for slot in passed:
            for timed in self._slots.pop(slot):
                timed.slot = 0
                (due if timed.deadline_s <= now_s else again).append(timed)
        for timed in again:
            self.arm(timed, timed.deadline_s)
        return due

    def _put(self, timed: T, slot: int) -> None:
        self.forget(timed)
        timed.slot = slot
        self._slots.setdefault(slot, set()).add(timed)
