"""Work of the event loop's thread that takes long, in slices: whoever else asks for something waits for one of them.

A body of 20 MB of JSON takes 100 ms to read. In one go, every other request would wait for that; in another thread, the
interpreter's lock would be fought for, and what reads numbers does not let go of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from heapq import heappop, heappush
from time import perf_counter_ns
from typing import Any, Generic, TypeVar

T = TypeVar("T")

Steps = Generator[None, None, T]
"""Work that yields often, and returns what it makes."""

SLICE_NS = 2_000_000
"""How long work goes on until others are seen to."""


class Job(Generic[T]):
    """Work that was taken on."""

    def __init__(self, steps: Steps[T], done: Callable[[T | Exception], None]) -> None:
        self._steps = steps
        self._done: Callable[[T | Exception], None] | None = done
        self.over = False
        """Nobody waits for it any more: who does was told, or has left."""

    def leave(self) -> None:
        """End it, let go of what it holds, and tell nobody."""
        self.over, self._done = True, None
        self._steps.close()

    def go_on(self, until_ns: int) -> None:
        """Do a part of it, and tell who waits where it was the last."""
        try:
            next(self._steps)
            while perf_counter_ns() < until_ns:
                next(self._steps)
        except StopIteration as end:
            self._end(end.value)
        except Exception as error:  # noqa: BLE001 - who waits for it is told; kept here, it would keep all that it saw
            self._end(error)

    def _end(self, outcome: T | Exception) -> None:
        done, self.over, self._done = self._done, True, None
        if done is not None:
            done(outcome)


class Slices:
    """Does work in slices between which the loop sees to its sockets, the smallest first. Its thread only.

    What is small is done before the next slice of what is large: nobody waits long for another's large work.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[int, int, Job[Any]]] = []
        """A heap, by size and then by number."""
        self._number = 0
        self._busy = False
        """A slice is being done, or will be."""

    def do(self, steps: Steps[T], done: Callable[[T | Exception], None], *, size: int) -> Job[T]:
        """Do work, the first slice at once where no other waits; ``done`` is told what it made or raised, once."""
        job = Job(steps, done)
        self._number += 1
        heappush(self._waiting, (size, self._number, job))
        if not self._busy:
            self._slice()
        return job

    def _slice(self) -> None:
        self._busy = True
        waiting, until_ns = self._waiting, perf_counter_ns() + SLICE_NS
        entry = heappop(waiting)
        job = entry[2]
        try:
            if not job.over:
                job.go_on(until_ns)
        finally:
            if not job.over:
                heappush(waiting, entry)
            self._busy = bool(waiting)
            if waiting:
                asyncio.get_running_loop().call_soon(self._slice)


def at_once(steps: Steps[T]) -> T:
    """Do work in one go."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            made: T = end.value
            return made
