"""What a listener does twice a second: it ends what took too long, and flushes its log."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from hasten.serve.wheel import TICK_S

PASSES = 4
"""Late ticks in a row that are let pass: a loop that is always late shall end something all the same."""


class Ticker:
    """Does its work every ``TICK_S``, on the event loop's thread, from when it is made until ``stop``.

    A tick that comes late is let pass. The machine stood still, or the process did: what came meanwhile waits in the
    sockets, and event loops call what is due before they read. Who is judged by the clock alone would be cut off with a
    request in the socket that was there in time. By the next tick it was read.
    """

    def __init__(self, *work: Callable[[], None]) -> None:
        self._work = work
        self._loop = asyncio.get_running_loop()
        self._passed = 0
        """Ticks let pass since the last that was not."""
        self._arm()

    def stop(self) -> None:
        """Tick no more."""
        self._next.cancel()

    def _arm(self) -> None:
        self._due_s = self._loop.time() + TICK_S
        self._next = self._loop.call_at(self._due_s, self._tick)

    def _tick(self) -> None:
        if self._passed < PASSES and self._loop.time() > self._due_s + TICK_S:
            self._passed += 1
        else:
            self._passed = 0
            for each in self._work:
                each()
        self._arm()
