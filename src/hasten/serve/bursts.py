"""Reading in bursts while a model is behind: the event loop's thread lets a run's slice of the core go on.

Each time the loop is woken for a single request, beside runs that take every core, it finds its caches cold, and leaves
those of the run cold. As long as more waits than the next batch, nothing is gained by reading the next request at once.
Linux knows threads that do not take a core from another as soon as they wake (``SCHED_BATCH``, sched(7)): they wait
until its slice is over, some milliseconds, and then read all that has come. Where a core is idle they do not wait at
all, and neither does anybody else. Where the length of slices can be set, long runs get slices of a run, as far as
every model of the server can afford that its requests are read so much later.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Final

from hasten.serve.scheduling import TICK_NS, Scheduler, Unchanged
from hasten.serve.turns import Turns

LONGEST_SLICE_NS: Final = 10_000_000
"""Of runs, whatever they take."""

SLICES: Final = 8
"""As many parts of its time limit a model affords: what has come for it may wait for that long to be read."""


class Bursts:
    """Told by models what they afford, who runs them, and when they are behind. On the event loop's thread alone."""

    def __init__(self, turns: Turns, scheduler: Scheduler | None = None) -> None:
        self._turns = turns
        self._scheduler: Scheduler = scheduler or Unchanged()
        self._behind = 0
        """Models that are."""
        self._yielding = False
        self._limits_ns: dict[object, int] = {}
        self._runs_ns: dict[int, int] = {}
        """What a run takes, by the thread that does it."""
        self._slice_ns = LONGEST_SLICE_NS

    def begin(self) -> None:
        """A model is behind: more waits than its next batch."""
        self._behind += 1
        if self._behind == 1:
            self._yield()

    def end(self) -> None:
        """It has caught up."""
        self._behind -= 1
        if not self._behind:
            self._insist()

    def knows(self, model: object, limit_ns: int | None) -> None:
        """A model is there, whose answers are of use for that long; None: for however long they take."""
        if limit_ns is not None:
            self._limits_ns[model] = limit_ns
            self._settle()

    def forgets(self, model: object) -> None:
        """It is there no more."""
        if self._limits_ns.pop(model, None) is not None:
            self._settle()

    def runs(self, thread: int, run_ns: int) -> None:
        """A thread runs a model, which takes that long."""
        if run_ns > TICK_NS:
            self._runs_ns[thread] = run_ns
            self._scheduler.gives(thread, self._given_ns(run_ns))

    def rests(self, thread: int) -> None:
        """It has ended, or is about to."""
        self._runs_ns.pop(thread, None)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Yield to nobody meanwhile: a thread that is started here inherits how this one is scheduled."""
        self._insist()
        try:
            yield
        finally:
            if self._behind:
                self._yield()

    def _settle(self) -> None:
        """Work out the slices that every model affords, and give them to those that run."""
        most_ns = LONGEST_SLICE_NS * SLICES
        afforded_ns = min([most_ns, *self._limits_ns.values()]) // SLICES
        if afforded_ns == self._slice_ns:
            return
        self._slice_ns = afforded_ns
        for thread, run_ns in self._runs_ns.items():
            self._scheduler.gives(thread, self._given_ns(run_ns))
        if self._behind:
            self._yield()

    def _given_ns(self, run_ns: int) -> int:
        given_ns = min(run_ns, self._slice_ns)
        return given_ns if given_ns > TICK_NS else 0

    def _yield(self) -> None:
        waits_ns = self._scheduler.yields(max(map(self._given_ns, self._runs_ns.values()), default=0))
        if waits_ns:
            self._yielding, self._turns.unseen_ns = True, waits_ns

    def _insist(self) -> None:
        if self._yielding and self._scheduler.insists():
            self._yielding = False
            self._turns.unseen_ns = 0
