"""The queue of one model, and the instances that wait at it: who is idle is woken, and takes a batch."""

from __future__ import annotations

import threading
from typing import Generic, Protocol, TypeVar

from hasten.errors import ServerFault
from hasten.serve.batching import NEVER, Batch, Batcher, Taken
from hasten.serve.call import Piece
from hasten.serve.news import Dropped, News, Ran
from hasten.serve.runner import Clock


class Waits(Protocol):
    """An instance, as the line needs it."""

    bell: threading.Lock
    """Held by its thread; released to wake it."""
    running: Batch[Piece] | None
    following: Batch[Piece] | None
    began_ns: int
    leaves: bool
    lent: bool
    look_s: float

    def tell(self, news: News) -> None:
        """Tell the event loop."""

    def look_after(self, now_ns: int) -> float:
        """Look after a run that another thread does with its model; give when to look again, in seconds."""


W = TypeVar("W", bound=Waits)


class Line(Generic[W]):
    """The queue of one model, and the instances that wait at it. Any thread; its batcher is behind ``lock``."""

    def __init__(self, batcher: Batcher[Piece], clock_ns: Clock) -> None:
        self.batcher = batcher
        self.lock = threading.Lock()
        self.clock_ns = clock_ns
        self._closed = False
        self._idle: list[W] = []

    def put(self, pieces: tuple[Piece, ...], now_ns: int, *, ring: bool = True) -> None:
        """Add pieces, and wake an instance, unless the caller will ``borrow`` one."""
        with self.lock:
            for piece in pieces:
                self.batcher.put(piece, now_ns)
            if ring:
                self._ring()

    def ring(self) -> None:
        """Wake an instance."""
        with self.lock:
            self._ring()

    def take(self, instance: W) -> Batch[Piece] | None:
        """Wait for a batch; None where the line is closed or the instance shall end."""
        while True:
            with self.lock:
                if self._closed or instance.leaves:
                    return None
                now_ns = self.clock_ns()
                taken = self.batcher.take(now_ns)
                if taken.batch is not None:
                    instance.began_ns = (
                        now_ns  # before ``running``: who watches must not see a new batch with an old time
                    )
                    instance.running = taken.batch
                    if self.batcher.rows:
                        self._ring()
                else:
                    self._idle.append(instance)
            if taken.dropped:
                instance.tell(Dropped(tuple(taken.dropped)))
            if taken.batch is not None:
                return taken.batch
            wait_s: float | None = (taken.again_ns - now_ns) / 1e9
            while wait_s is not None:
                wait_s = self._wait(instance, wait_s)

    def _wait(self, instance: W, wait_s: float) -> float | None:
        """Wait for the bell, for at most ``wait_s``; gives how long to wait on where the instance is lent then."""
        rung = instance.bell.acquire(timeout=max(min(wait_s, instance.look_s), 0.0))
        with self.lock:
            if instance in self._idle:
                self._idle.remove(instance)
            elif not rung:
                if instance.lent:
                    return instance.look_after(self.clock_ns())
                instance.bell.acquire()  # rung just after its wait was over: used up, or the next would find it
        return None

    def take_whole(self, instance: W) -> Batch[Piece] | None:
        """Take a batch for an instance that still runs another, where a whole one waits and nobody is idle."""
        with self.lock:
            batcher = self.batcher
            if self._closed or instance.leaves or self._idle or batcher.rows < batcher.costs.largest:
                return None
            taken = batcher.take(self.clock_ns())
            instance.following = taken.batch
        if taken.dropped:
            instance.tell(Dropped(tuple(taken.dropped)))
        return taken.batch

    def borrow(self) -> tuple[W | None, Taken[Piece] | None]:
        """Take a batch for an idle instance that the caller runs itself, and then ``give_back``s. Never waits.

        No batch: it is held open, and an instance is told to look when its time comes.
        """
        with self.lock:
            if not self._idle or not self.batcher.rows:
                return None, None
            instance = self._idle.pop()
            now_ns = self.clock_ns()
            taken = self.batcher.take(now_ns)
            if taken.batch is None:
                self._idle.append(instance)
                if taken.again_ns != NEVER:
                    self._ring()
            else:
                instance.lent = True
                instance.began_ns = now_ns
                instance.running = taken.batch
            return instance, taken

    def give_back(self, instance: W) -> None:
        """Let an instance that was borrowed wait again."""
        with self.lock:
            instance.running = None
            instance.lent = False
            self._idle.append(instance)

    def back(self, instance: W, batch: Batch[Piece]) -> None:
        """Put back a batch that was taken and not begun; where nobody takes any more, its calls fail."""
        with self.lock:
            instance.running = instance.following = None
            closed = self._closed
            for piece in () if closed else batch.entries:
                if not piece.call.over:
                    self.batcher.put(piece, self.clock_ns())
            self._ring()
        if closed:
            now_ns, why = self.clock_ns(), "the model was unloaded, and its worker gone, before this request was run"
            instance.tell(Ran(batch, ServerFault(why), now_ns, now_ns, now_ns, lost=True))

    def idle(self) -> int:
        """Count the instances that wait."""
        return len(self._idle)

    def close(self) -> None:
        """Let every instance end; what waits stays."""
        with self.lock:
            self._closed = True
            while self._idle:
                self._ring()

    def leave(self, instance: W) -> None:
        """Let one instance end once its run is over."""
        with self.lock:
            instance.leaves = True
            if instance in self._idle:
                self._idle.remove(instance)
                instance.bell.release()

    def _ring(self) -> None:
        if self._idle:
            self._idle.pop().bell.release()
