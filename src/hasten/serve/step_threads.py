"""Threads in which steps run: few, daemons, with what is nearly done going first."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

Job = Callable[[], None]
"""It raises nothing."""


class StepThreads:
    """A bounded number of threads. ``start`` happens by itself at the first job; any thread may ``put`` and ``close``.

    Decoding an image, resizing it and tokenising release the interpreter's lock, so threads scale there. A job after
    the model goes before all jobs before it: its request holds memory, and its client waits longest.
    """

    def __init__(self, name: str, count: int) -> None:
        self.count = count
        self._name = name
        self._first: deque[Job] = deque()
        self._later: deque[Job] = deque()
        self._bell = threading.Condition()
        self._idle = 0
        self._alive = 0
        self._closed = False

    def put(self, job: Job, *, first: bool = False) -> None:
        """Run a job soon; ``first``: before those that are not."""
        with self._bell:
            (self._first if first else self._later).append(job)
            if self._idle:
                self._bell.notify()
            elif self._alive < self.count:
                self._start()

    def lost(self) -> None:
        """A job hangs: another thread takes the place of its own, until ``found``."""
        with self._bell:
            self.count += 1
            if not self._closed and (self._first or self._later):
                self._start()

    def found(self) -> None:
        """A job that was given up as lost has ended after all: one thread is too many."""
        with self._bell:
            self.count -= 1
            self._bell.notify()

    def close(self) -> None:
        """Let every thread end after its job; what waits is not run."""
        with self._bell:
            self._closed = True
            self._first.clear()
            self._later.clear()
            self._bell.notify_all()

    def _start(self) -> None:
        self._alive += 1
        threading.Thread(target=self._main, name=f"hasten steps {self._name}", daemon=True).start()

    def _main(self) -> None:
        while True:
            with self._bell:
                while self._alive > self.count or not (self._first or self._later):
                    if self._closed or self._alive > self.count:
                        self._alive -= 1
                        return
                    self._idle += 1
                    self._bell.wait()
                    self._idle -= 1
                job = (self._first or self._later).popleft()
            job()
