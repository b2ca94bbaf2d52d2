"""An opened model that an instance drives: a session of this process; ``child.py`` has the one in another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

from hasten.engine import Session
from hasten.serve.joining import Reused
from hasten.tensors import Array, Feed

Outputs = dict[str, Array]

Clock = Callable[[], int]
"""Nanoseconds of a monotonic clock."""


class Runner(Protocol):
    """An opened model that an instance drives, one thread at a time except for ``kill``."""

    copies: bool
    """Inputs must lie in its own buffers."""
    lends: bool
    """``run`` may be called from any thread, one at a time."""
    thread: int
    """The system's number of the thread that runs it; 0: the one that calls ``run``."""

    @property
    def ahead(self) -> Ahead | None:
        """Itself, where a run can be begun while the one before goes on."""

    def buffer(self, name: str, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> Array:
        """Give the array that an input of the next run is written into."""

    def run(self, feed: Feed) -> Outputs:
        """Run once. Raises ``ChildCrashed`` where it cannot be used any more."""

    def alive(self) -> bool:
        """Say whether a run can be begun; cheap."""

    def kill(self) -> None:
        """Make a run that hangs end, where that is possible. From any thread."""

    def close(self) -> None:
        """Free it."""


class Ahead(Protocol):
    """A runner with room for two runs: they are begun and finished in the same order."""

    def buffer(self, name: str, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> Array:
        """Give the array that an input of the next run is written into."""

    def begin(self, feed: Feed) -> None:
        """Let a run begin, at once or behind the one that goes on. Raises ``ChildCrashed``."""

    def finish(self) -> Outputs:
        """Wait for the oldest run that was begun. Raises ``ChildCrashed`` where it cannot be used any more."""

    def answers_within(self, seconds: float) -> bool:
        """Wait for the oldest run for so long; whether there is something to finish."""


class LocalRunner:
    """A session in this process."""

    copies = False
    lends = True
    thread = 0
    ahead: Ahead | None = None

    def __init__(self, session: Session) -> None:
        self._session = session
        self._buffers = Reused()

    def buffer(self, name: str, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> Array:
        """Give a buffer that is used again and again."""
        return self._buffers(name, shape, dtype)

    def run(self, feed: Feed) -> Outputs:
        """Run the session."""
        return self._session.run(feed)

    def alive(self) -> bool:
        """A session of this process lives as long as the process."""
        return True

    def kill(self) -> None:
        """A thread cannot be ended from outside: the instance is left alone, and closes when its run returns."""

    def close(self) -> None:
        """Close the session."""
        self._session.close()
