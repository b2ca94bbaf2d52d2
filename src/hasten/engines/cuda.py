"""What engines on a GPU share in one process: runs go beside each other, but none beside a recording.

While the work of a stream is recorded as a CUDA graph, other threads must not allocate memory, nor use the default
stream: the recording, and what they do, would fail (CUDA C++ Programming Guide, "Prohibited and Unhandled Operations").
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator


class Recordings:
    """Lets many runs go on at once, or one recording alone. A recording that waits goes before later runs."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running = 0
        self._recordings = 0
        """That go on or wait."""
        self._alone = threading.Lock()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Keep recordings away meanwhile."""
        with self._changed:
            while self._recordings:
                self._changed.wait()
            self._running += 1
        try:
            yield
        finally:
            with self._changed:
                self._running -= 1
                if not self._running:
                    self._changed.notify_all()

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Keep runs and other recordings away meanwhile."""
        with self._changed:
            self._recordings += 1
        try:
            with self._alone:
                with self._changed:
                    while self._running:
                        self._changed.wait()
                yield
        finally:
            with self._changed:
                self._recordings -= 1
                if not self._recordings:
                    self._changed.notify_all()


RECORDINGS = Recordings()
"""This process's: every session on a GPU runs and records under it."""
