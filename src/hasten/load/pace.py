"""One run on one event loop: requests leave when they are due, whatever became of those before.

Open loop: the due times are fixed before; a slow answer delays nothing. Closed loop: a number of requests is under way,
and each that ends lets the next one go.
"""

from __future__ import annotations

import asyncio
import gc
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from time import perf_counter_ns

from hasten.load.arrivals import MOST_REQUESTS
from hasten.load.recorder import GROW, Recorder
from hasten.load.run import Ints
from hasten.load.sender import Sender

NS = 1e9
AT_ONCE = 64
"""Requests that leave in one turn of the loop, before answers are looked at."""
LOOK_S = 0.005
"""How often timeouts and a dead server are looked for."""
DEAD_S = 1.0
"""A server is given up when every attempt for so long found nobody there."""
LATE_S = 1.0
"""A generator that has not sent all so long after the last due time cannot keep the rate, and gives up."""
TELL_S = 0.25

Tell = Callable[[int, int, float], None]
"""Called now and then with the answers, the misses, and the share of the run that is over."""


@dataclass(frozen=True, kw_only=True)
class Course:
    """What one generator's part of a run is."""

    due_ns: Ints
    """[n], ascending, since the run begins; of a closed loop: none."""
    samples: Ints
    """Which payload each request carries; in a closed loop it is gone through again and again."""
    concurrency: int
    """Of a closed loop; 0: the loop is open."""
    duration_ns: int
    timeout_ns: int
    began_ns: int
    """When the run begins, of ``time.perf_counter_ns``: for all generators of the machine the same."""


class Pace:
    """A run in work. ``await go()`` once."""

    def __init__(self, course: Course, sender: Sender, loop: asyncio.AbstractEventLoop, tell: Tell) -> None:
        self.recorder = Recorder(began_ns=course.began_ns, ended=self._ended)
        self.scheduled: array[int] = array("q", course.due_ns.tobytes())
        self.sample: array[int] = array("q")
        self.cut_short: str | None = None
        self._course = course
        self._sender = sender
        self._loop = loop
        self._tell = tell
        self._payloads = cycle(course.samples.tolist())
        self._next = 0
        """Requests that have been let go."""
        self._ended_count = 0
        self._oldest = 0
        """All requests before it have ended."""
        self._live = bytearray(len(self.scheduled))
        """1: under way."""
        self._over = loop.create_future()
        self._stopping = False
        self._timer: asyncio.TimerHandle | None = None
        self._looking: asyncio.TimerHandle | None = None
        self._told_ns = course.began_ns

    async def go(self) -> None:
        """Run, until every request that left has ended."""
        recorder = self.recorder
        recorder.room(len(self.scheduled))
        self._sender.begin(recorder)
        self._looking = self._loop.call_at(self._course.began_ns / NS, self._look)
        starts = self._start_closed if self._course.concurrency else self._let_go
        first = 0 if self._course.concurrency or not len(self.scheduled) else self.scheduled[0]
        self._timer = self._loop.call_at((self._course.began_ns + first) / NS, starts)
        with quiet_memory():
            try:
                await self._over
            finally:
                for timer in (self._looking, self._timer):
                    timer.cancel()
        self._sender.settle(recorder)

    def stop(self, why: str) -> None:
        """Let no more requests go; the run ends once those under way have ended."""
        if not self._stopping:
            self._stopping, self.cut_short = True, why
            if self._timer is not None:
                self._timer.cancel()
            self._finish_if_done()

    # open loop

    def _let_go(self) -> None:
        """Send all that is due, and wake again for the next."""
        course, scheduled, n = self._course, self.scheduled, len(self.scheduled)
        now, at_once = perf_counter_ns() - course.began_ns, AT_ONCE
        while not self._stopping and self._next < n and scheduled[self._next] <= now and at_once:
            self._send(self._next)
            at_once -= 1
            now = perf_counter_ns() - course.began_ns
        if self._stopping:
            return
        if self._next < n:
            self._timer = self._loop.call_at((course.began_ns + scheduled[self._next]) / NS, self._let_go)
        else:
            self._finish_if_done()

    def _send(self, index: int) -> None:
        payload = next(self._payloads)
        self.sample.append(payload)
        self._live[index] = 1
        self._next += 1
        self._sender.send(index, payload)

    # closed loop

    def _start_closed(self) -> None:
        for _ in range(self._course.concurrency):
            self._send_closed()

    def _send_closed(self) -> None:
        now = perf_counter_ns() - self._course.began_ns
        if self._stopping:
            return
        if now >= self._course.duration_ns or len(self.scheduled) >= MOST_REQUESTS:
            self._stopping = True
            return
        index = len(self.scheduled)
        self.scheduled.append(now)
        if index >= len(self.recorder.sent):
            self.recorder.room(index + GROW)
            self._live.extend(bytes(GROW))
        self._send(index)

    # both

    def _ended(self, index: int) -> None:
        self._live[index] = 0
        self._ended_count += 1
        if self._course.concurrency and not self._stopping:
            if self.recorder.outcome[index]:  # a refusal comes at once: not from within the sender's own call
                self._loop.call_soon(self._send_closed)
            else:
                self._send_closed()
        if self._ended_count == self._next:
            self._finish_if_done()

    def _finish_if_done(self) -> None:
        done = self._stopping or (not self._course.concurrency and self._next == len(self.scheduled))
        if done and self._ended_count == self._next and not self._over.done():
            self._over.set_result(None)

    def _look(self) -> None:
        """Time out what is due, see whether the server is dead, and tell how far the run is."""
        now = perf_counter_ns()
        passed = now - self._course.began_ns
        if passed - self._course.timeout_ns >= 0:
            self._time_out(passed - self._course.timeout_ns)
        unreached = self.recorder.unreached_ns
        if unreached and self.recorder.unreached_last_ns - unreached > DEAD_S * NS:
            reason = next(iter(self.recorder.reasons.most_common(1)), ("no answer", 0))[0]
            self.stop(f"the server is gone: for {DEAD_S:g} s every attempt failed: {reason}")
        if self._course.concurrency and passed >= self._course.duration_ns:
            self._stopping = True
            self._finish_if_done()
        elif self._next < len(self.scheduled) and passed > self.scheduled[-1] + LATE_S * NS:
            left = len(self.scheduled) - self._next
            self.stop(
                f"the generator is too slow for this rate: {left} of {len(self.scheduled)} requests were due and not "
                "sent; use more --processes, or a lower rate"
            )
        if now - self._told_ns >= TELL_S * NS:
            self._told_ns = now
            self._tell(self.recorder.answered, self.recorder.missed, min(1.0, passed / self._course.duration_ns))
        self._looking = self._loop.call_later(LOOK_S, self._look)

    def _time_out(self, before_ns: int) -> None:
        live, scheduled, recorder = self._live, self.scheduled, self.recorder
        while self._oldest < self._next and scheduled[self._oldest] <= before_ns:
            index = self._oldest
            self._oldest += 1
            if live[index]:
                self._sender.withdraw(index)
                recorder.time_out(index)


@contextmanager
def quiet_memory() -> Iterator[None]:
    """Collect no garbage while the block runs: a collection of everything takes longer than most answers."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
