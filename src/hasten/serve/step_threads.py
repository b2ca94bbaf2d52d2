"""Threads in which steps run: few, daemons. What is nearly done goes first, then priority, then when it is due."""

from __future__ import annotations

import heapq
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

Job = Callable[[], None]
"""It raises nothing."""

Rank = tuple[int, int]
"""(priority, when it is due in nanoseconds): the lowest goes first, of equal ones the one that came first."""

MOST_LOST = 4
"""Times the usual threads: as many may hang beside them, and use the processor, before no other takes their place."""

FIRST: Rank = (0, 0)
"""Before every job that waits by its priority: these begin at 1."""


class Turn:
    """A job that waits; ``job`` is None once it was begun or withdrawn."""

    __slots__ = ("job",)

    def __init__(self, job: Job) -> None:
        self.job: Job | None = job


class StepThreads:
    """A bounded number of threads, begun by the first jobs; any thread may ``put``, ``withdraw`` and ``close``.

    Decoding an image, resizing it and tokenising release the interpreter's lock, so threads scale there. A job after
    the model is put with ``FIRST``: its request holds memory, and its client waits longest. Each is started within
    ``starting``.
    """

    def __init__(
        self, name: str, count: int, *, starting: Callable[[], AbstractContextManager[None]] = nullcontext
    ) -> None:
        self.count = count
        self._spare = count * MOST_LOST
        self._hanging = 0
        """Jobs that were given up as lost, and have not ended."""
        self._starting = starting
        self._name = name
        self._heap: list[tuple[Rank, int, Turn]] = []
        self._arrivals = 0
        self._gone = 0
        """Of the heap, those that were withdrawn."""
        self._bell = threading.Condition()
        self._idle = 0
        """Threads that wait for the bell, one that was rung for and has not woken yet among them."""
        self._alive = 0
        self._closed = False

    def put(self, job: Job, rank: Rank = FIRST) -> Turn:
        """Run a job when it is its turn."""
        turn = Turn(job)
        with self._bell:
            self._arrivals += 1
            heapq.heappush(self._heap, (rank, self._arrivals, turn))
            if self._idle:
                self._bell.notify()
            if self._waiting > self._idle and self._alive < self.count:
                self._start()
        return turn

    def withdraw(self, turn: Turn) -> bool:
        """Drop a job and what it holds; False where it does not wait any more."""
        with self._bell:
            if turn.job is None:
                return False
            turn.job = None
            self._gone += 1
            if self._gone > 64 and self._gone > self._waiting:
                self._heap = [slot for slot in self._heap if slot[2].job is not None]
                heapq.heapify(self._heap)
                self._gone = 0
            return True

    @property
    def stuck(self) -> bool:
        """Every thread that there may be hangs: nothing is run."""
        return self._hanging >= self.count

    def lost(self) -> None:
        """A job hangs: another thread takes the place of its own, until ``found``; not of too many of them."""
        with self._bell:
            self._hanging += 1
            if self._hanging <= self._spare:
                self.count += 1
                if not self._closed and self._waiting:
                    self._start()

    def found(self) -> None:
        """A job that was given up as lost has ended after all: one thread is too many."""
        with self._bell:
            self._hanging -= 1
            if self._hanging < self._spare:
                self.count -= 1
            self._bell.notify()

    def close(self) -> None:
        """Let every thread end after its job; what waits is not run."""
        with self._bell:
            self._closed = True
            for _, _, turn in self._heap:
                turn.job = None
            self._heap.clear()
            self._gone = 0
            self._bell.notify_all()

    @property
    def _waiting(self) -> int:
        return len(self._heap) - self._gone

    def _start(self) -> None:
        self._alive += 1
        with self._starting():
            threading.Thread(target=self._main, name=f"hasten steps {self._name}", daemon=True).start()

    def _main(self) -> None:
        while True:
            with self._bell:
                while self._alive > self.count or (job := self._next()) is None:
                    if self._closed or self._alive > self.count:
                        self._alive -= 1
                        return
                    self._idle += 1
                    self._bell.wait()
                    self._idle -= 1
            job()

    def _next(self) -> Job | None:
        """Take the job whose turn it is."""
        while self._heap:
            _, _, turn = heapq.heappop(self._heap)
            job, turn.job = turn.job, None
            if job is not None:
                return job
            self._gone -= 1
        return None
