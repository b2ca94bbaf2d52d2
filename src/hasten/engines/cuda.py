"""What engines on a GPU share in one process: runs go beside each other, but none beside a recording.

While the work of a stream is recorded as a CUDA graph, other threads must not allocate memory, nor use the default
stream: the recording, and what they do, would fail (CUDA C++ Programming Guide, "Prohibited and Unhandled Operations").
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator


class Recordings:
    """Lets many runs go on at once, or one recording alone. None of the three is taken inside another.

    What takes long, as opening a model does, keeps recordings away, and never runs: a recording waits for it before it
    asks runs to wait.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running = 0
        self._recording = False
        """One goes on, or waits for runs to end."""
        self._alone = threading.Lock()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Keep recordings away meanwhile: for what is short."""
        with self._changed:
            while self._recording:
                self._changed.wait()
            self._running += 1
        try:
            yield
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify_all()

    @contextlib.contextmanager
    def opening(self) -> Iterator[None]:
        """Keep recordings and other openings away meanwhile: for what takes long."""
        with self._alone:
            yield

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Keep everything else away meanwhile. It goes before runs that come later."""
        with self._alone:
            with self._changed:
                self._recording = True
                while self._running:
                    self._changed.wait()
            try:
                yield
            finally:
                with self._changed:
                    self._recording = False
                    self._changed.notify_all()


RECORDINGS = Recordings()
"""This process's: every session on a GPU runs and records under it."""
