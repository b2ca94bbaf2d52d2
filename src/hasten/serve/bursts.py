"""Reading in bursts while a model is behind: the event loop's thread lets a run's slice of the core go on.

Each time the loop is woken for a single request, beside runs that take every core, it finds its caches cold, and leaves
those of the run cold. As long as more waits than the next batch, nothing is gained by reading the next request at once.
Linux knows threads that do not take a core from another as soon as they wake (``SCHED_BATCH``, sched(7)): they wait
until its slice is over, some milliseconds, and then read all that has come. Where a core is idle they do not wait at
all, and neither does anybody else. Where the length of slices can be set, it is about that of a run.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterator

from hasten.serve.scheduling import schedule, slice_ns
from hasten.serve.turns import Turns

logger = logging.getLogger(__name__)

TICK_NS = 4_000_000
"""Linux looks this often, with its usual clock, whether a slice is over."""

LONGEST_SLICE_NS = 10_000_000
"""Of runs. A loop that yields waits no longer, save for the tick."""

Yields = Callable[[int], int]
"""Let a thread yield to slices of that many nanoseconds; 0: not any more. Gives how long it may have to wait for their
end, and 0 where the system lets nobody yield."""


def never(slice_ns: int) -> int:
    """Yield to nobody."""
    return 0


class Bursts:
    """Told by models when they are behind, and when not any more. On the event loop's thread alone."""

    def __init__(self, turns: Turns, yields: Yields = never) -> None:
        self._turns = turns
        self._yields = yields
        self._slices_ns: list[int] = []
        """Of the models that are behind."""

    def begin(self, slice_ns: int = TICK_NS) -> None:
        """A model is behind: more waits than its next batch. ``slice_ns``: what it gains by, and can afford."""
        before = min(self._slices_ns, default=0)
        self._slices_ns.append(slice_ns)
        if not before or slice_ns < before:
            self._turns.unseen_ns = self._yields(slice_ns)

    def end(self, slice_ns: int = TICK_NS) -> None:
        """A model that had begun with that slice has caught up."""
        before, turns = min(self._slices_ns), self._turns
        self._slices_ns.remove(slice_ns)
        left = min(self._slices_ns, default=0)
        if left != before and turns.unseen_ns:
            turns.unseen_ns = self._yields(left)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Yield to nobody meanwhile: a thread that is started here inherits how this one is scheduled."""
        yielding = bool(self._turns.unseen_ns)
        if yielding:
            self._yields(0)
        try:
            yield
        finally:
            if yielding:
                self._yields(min(self._slices_ns))


def thread_yields() -> Yields:
    """Make what lets the calling thread yield. A policy that somebody else has set is left as it is."""
    if not hasattr(os, "SCHED_BATCH"):
        return never
    thread, usual = threading.get_native_id(), os.SCHED_OTHER
    try:
        if os.sched_getscheduler(thread) != usual:
            return never
    except OSError:  # a sandbox may forbid to ask
        return never
    can_be_set = slice_ns(thread) > 0

    def yields(slice_ns: int) -> int:
        wanted_ns = slice_ns if can_be_set and slice_ns > TICK_NS else 0
        try:
            schedule(thread, os.SCHED_BATCH if slice_ns else usual, wanted_ns)
        except OSError as error:  # a sandbox may forbid it
            logger.debug("the scheduling of the event loop's thread is left as it is: %s", error)
            return 0
        return -(-max(wanted_ns, 1) // TICK_NS) * TICK_NS if slice_ns else 0

    return yields


def lengthen_slices() -> None:
    """Let the calling thread, and what it starts, run for longer at a time beside those that yield to it.

    It takes nothing from others: who has short slices takes the core from it as before. Where the system has no such
    slices, or forbids to ask for them, all stays as it is.
    """
    if not hasattr(os, "SCHED_OTHER"):
        return
    try:
        if slice_ns() and os.sched_getscheduler(0) == os.SCHED_OTHER:
            schedule(0, os.SCHED_OTHER, LONGEST_SLICE_NS)
    except OSError as error:
        logger.debug("the slices of a run's thread are left as they are: %s", error)
