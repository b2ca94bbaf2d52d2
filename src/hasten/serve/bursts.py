"""Reading in bursts while a model is behind: the event loop's thread lets a run's slice of the core go on.

Each time the loop is woken for a single request, beside runs that take every core, it finds its caches cold, and leaves
those of the run cold. As long as more waits than the next batch, nothing is gained by reading the next request at once.
Linux knows threads that do not take a core from another as soon as they wake (``SCHED_BATCH``, sched(7)): they wait
until its slice is over, some milliseconds, and then read all that has come. Where a core is idle they do not wait at
all, and neither does anybody else.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterator

from hasten.serve.turns import Turns

logger = logging.getLogger(__name__)

SLICE_NS = 4_000_000
"""What such a thread waits at most, with Linux's usual tick, for another one's slice to be over."""

Yields = Callable[[bool], bool]
"""Let a thread yield to others, or not any more; False where the system does not."""


def never(on: bool) -> bool:
    """Yield to nobody."""
    return False


class Bursts:
    """Told by models when they are behind, and when not any more. On the event loop's thread alone."""

    def __init__(self, turns: Turns, yields: Yields = never) -> None:
        self._turns = turns
        self._yields = yields
        self._behind = 0

    def begin(self) -> None:
        """A model is behind: more waits than its next batch."""
        self._behind += 1
        if self._behind == 1 and self._yields(True):
            self._turns.unseen_ns = SLICE_NS

    def end(self) -> None:
        """It has caught up."""
        self._behind -= 1
        if not self._behind and self._turns.unseen_ns:
            self._yields(False)
            self._turns.unseen_ns = 0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Yield to nobody meanwhile: a thread that is started here inherits how this one is scheduled."""
        yielding = bool(self._turns.unseen_ns)
        if yielding:
            self._yields(False)
        try:
            yield
        finally:
            if yielding:
                self._yields(True)


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

    def yields(on: bool) -> bool:
        try:
            os.sched_setscheduler(thread, os.SCHED_BATCH if on else usual, os.sched_param(0))
        except OSError as error:  # a sandbox may forbid it
            logger.debug("the scheduling of the event loop's thread is left as it is: %s", error)
            return False
        return True

    return yields
