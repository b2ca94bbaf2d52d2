"""Traffic that knows every right answer: open loop (Poisson) or pipelined closed loop, over plain HTTP connections.

Each request has a number of its own and some rows of a bank; ONNX Runtime's own answers to them are known for each
version of the model. So an answer that is missing, late, doubled, another request's, another version's or a mixture of
two versions is seen. Latency counts from the time at which a request was due, not from when it was sent.
"""

import asyncio
import ctypes
import os
import random
import time
from collections import Counter, deque
from dataclasses import dataclass, field

import httptools
import msgspec
import numpy as np

HUNG_S = 15.0
"""An answer that took longer did not come."""

TOLERANCE = 1e-4
"""Between an answer within a batch and ONNX Runtime's own of all rows at once: float32, another order of sums."""

FEATURES = 16
MOST_ROWS = 4
CLOCK_MONOTONIC, TFD_NONBLOCK, TFD_TIMER_ABSTIME = 1, 0o4000, 1
LIBC = ctypes.CDLL(None, use_errno=True)


class Head(msgspec.Struct):
    """What is read of an answer's JSON."""

    model_version: str
    id: str = ""


@dataclass(frozen=True)
class Bank:
    """Rows [n, features], and the answers [n, classes] of each version: the first's are those of odd numbers."""

    rows: np.ndarray
    answers: tuple[np.ndarray, np.ndarray]

    def right(self, version: int) -> np.ndarray:
        return self.answers[0 if version % 2 else 1]


@dataclass(slots=True)
class Asked:
    """A request on its way."""

    number: int
    first: int
    rows: int
    due_s: float
    sends: int = 0


@dataclass
class Tally:
    """What became of every request."""

    asked: int = 0
    outcomes: Counter = field(default_factory=Counter)
    """``ok``, ``503 reason``, ``lost``, ``hung``, ``twice``, ``wrong``, ``mixed``, ``another's``."""
    versions: Counter = field(default_factory=Counter)
    resent: int = 0
    """Requests whose kept connection was closed before it answered: sent again, as HTTP clients do."""
    refusals: list = field(default_factory=list)
    """(time, reason) of each 503."""
    faults: list = field(default_factory=list)
    """The first faults, in words."""
    due_s: list = field(default_factory=list)
    latency_s: list = field(default_factory=list)
    issue_delay_s: list = field(default_factory=list)

    def fault(self, kind: str, text: str) -> None:
        self.outcomes[kind] += 1
        if len(self.faults) < 20:
            self.faults.append(f"{kind}: {text}")


class Wire(asyncio.Protocol):
    """One connection. Answers belong to the requests in their order."""

    def __init__(self, traffic: "Traffic") -> None:
        self.traffic = traffic
        self.transport = None
        self.waiting: deque[Asked] = deque()
        self.answers = 0
        self.parser = httptools.HttpResponseParser(self)
        self.headers: dict[bytes, bytes] = {}
        self.body = b""

    def connection_made(self, transport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_message_begin(self) -> None:
        self.headers, self.body = {}, b""

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.lower()] = value

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        if not self.waiting:
            self.traffic.tally.fault("twice", f"an answer that nobody waits for: {self.body[:100]!r}")
            return
        self.answers += 1
        keeps = self.parser.should_keep_alive()
        asked = self.waiting.popleft()
        self.traffic.answered(asked, self.parser.get_status_code(), self.headers, self.body)
        if keeps:
            self.traffic.free(self)
        else:
            self.transport.close()

    def connection_lost(self, error) -> None:
        self.traffic.gone(self, error)


class Traffic:
    """Sends requests to one address and judges what comes back. On one event loop."""

    def __init__(self, place: tuple[str, int], bank: Bank, *, seed: int, keep: bool = True) -> None:
        self.place = place
        self.bank = bank
        self.tally = Tally()
        self.random = random.Random(seed)
        self.keep = keep
        """Keep every latency; a million of them are not needed."""
        self.on_answer = None
        self._idle: list[Wire] = []
        self._wires: set[Wire] = set()
        self._tasks: set[asyncio.Task] = set()
        self._under_way: dict[int, Asked] = {}
        self._loop = asyncio.get_running_loop()

    @property
    def open(self) -> int:
        """Requests without an answer yet."""
        return len(self._under_way)

    # requests

    def ask(self, due_s: float) -> Asked:
        """Make the next request."""
        tally = self.tally
        tally.asked += 1
        rows = self.random.randint(1, MOST_ROWS)
        asked = Asked(tally.asked, self.random.randrange(len(self.bank.rows) - MOST_ROWS), rows, due_s)
        self._under_way[asked.number] = asked
        return asked

    def bytes_of(self, asked: Asked) -> bytes:
        data = self.bank.rows[asked.first : asked.first + asked.rows].tobytes()
        head = (
            b'{"id":"%010d","inputs":[{"name":"x","shape":[%d,%d],"datatype":"FP32","parameters":'
            b'{"binary_data_size":%d}}],"parameters":{"binary_data_output":true}}'
            % (asked.number, asked.rows, FEATURES, len(data))
        )
        return (
            b"POST /v2/models/net/infer HTTP/1.1\r\nHost: here\r\nContent-Type: application/octet-stream\r\n"
            b"Inference-Header-Content-Length: %d\r\nContent-Length: %d\r\n\r\n%b%b"
            % (len(head), len(head) + len(data), head, data)
        )

    def send(self, asked: Asked) -> None:
        """Send over a free connection, else over a new one; again always over a new one, as HTTP clients do."""
        asked.sends += 1
        while self._idle and asked.sends == 1:
            wire = self._idle.pop()
            if not wire.transport.is_closing():
                self._over(wire, asked)
                return
        task = self._loop.create_task(self._connect(asked))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _over(self, wire: Wire, asked: Asked) -> None:
        wire.waiting.append(asked)
        wire.transport.write(self.bytes_of(asked))

    async def _connect(self, asked: Asked) -> None:
        try:
            wire = await self.connect()
        except OSError as error:
            self._lost(asked, f"no connection: {error}")
        else:
            self._over(wire, asked)

    async def connect(self) -> Wire:
        _, wire = await self._loop.create_connection(lambda: Wire(self), *self.place)
        self._wires.add(wire)
        return wire

    def free(self, wire: Wire) -> None:
        """A connection has answered, and is kept."""
        if self.on_answer is not None:
            self.on_answer(wire)
        else:
            self._idle.append(wire)

    # answers

    def answered(self, asked: Asked, status: int, headers: dict[bytes, bytes], body: bytes) -> None:
        now_s, tally = time.monotonic(), self.tally
        if self._under_way.pop(asked.number, None) is None:
            tally.fault("late", f"request {asked.number} was answered after {now_s - asked.due_s:.1f} s")
            return
        if self.keep:
            tally.due_s.append(asked.due_s)
            tally.latency_s.append(now_s - asked.due_s)
        if status != 200:
            reason = headers.get(b"x-reason", b"?").decode()
            tally.outcomes[f"{status} {reason}"] += 1
            tally.refusals.append((now_s, f"{status} {reason}", body[:200].decode("utf-8", "replace")))
            return
        header_bytes = int(headers[b"inference-header-content-length"])
        head = msgspec.json.decode(body[:header_bytes], type=Head)
        tally.versions[head.model_version] += 1
        if head.id != f"{asked.number:010d}":
            tally.fault("another's", f"request {asked.number} got the answer to {head.id}")
            return
        y = np.frombuffer(body, np.float32, offset=header_bytes).reshape(asked.rows, -1)
        self._judge(asked, int(head.model_version), y)

    def _judge(self, asked: Asked, version: int, y: np.ndarray) -> None:
        span = slice(asked.first, asked.first + asked.rows)
        off = np.abs(y - self.bank.right(version)[span]).max(axis=1)
        if (off <= TOLERANCE).all():
            self.tally.outcomes["ok"] += 1
            return
        others = np.abs(y - self.bank.right(version + 1)[span]).max(axis=1)
        kind = "mixed" if ((off <= TOLERANCE) | (others <= TOLERANCE)).all() else "wrong"
        self.tally.fault(kind, f"request {asked.number} of version {version} is off by {off}, from the other {others}")

    def gone(self, wire: Wire, error) -> None:
        """A connection has ended; what it still owed is sent again where HTTP allows it, else lost."""
        self._wires.discard(wire)
        if wire in self._idle:
            self._idle.remove(wire)
        for asked in wire.waiting:
            if wire.answers and asked.sends == 1:
                self.tally.resent += 1
                self.send(asked)
            else:
                self._lost(asked, f"its connection ended ({error or 'closed'}) after {wire.answers} answers")
        wire.waiting.clear()

    def _lost(self, asked: Asked, why: str) -> None:
        if self._under_way.pop(asked.number, None) is not None:
            self.tally.fault("lost", f"request {asked.number}: {why}")

    async def settle(self) -> None:
        """Wait for the answers that are still due; those that do not come count as hung. Then close."""
        end_s = time.monotonic() + HUNG_S
        while self._under_way and time.monotonic() < end_s:
            await asyncio.sleep(0.01)
        for asked in self._under_way.values():
            self.tally.fault("hung", f"request {asked.number} has no answer after {HUNG_S:g} s")
        self._under_way.clear()
        for wire in list(self._wires):
            wire.transport.abort()
        await asyncio.sleep(0)

    # arrivals

    async def poisson(self, rate: float, over: asyncio.Event) -> None:
        """Send at random times, ``rate`` a second on average, until ``over``. Nobody waits for an answer."""
        due_s = time.monotonic()
        async with Alarm() as alarm:
            while not over.is_set():
                due_s += self.random.expovariate(rate)
                if due_s > time.monotonic():
                    await alarm.at(due_s)
                if self.keep:
                    self.tally.issue_delay_s.append(time.monotonic() - due_s)
                self.send(self.ask(due_s))

    async def pipelined(self, total: int, *, connections: int, depth: int, until_s: float = float("inf")) -> None:
        """Send ``total`` requests, ``depth`` of them always under way on each connection."""
        finished = asyncio.Event()
        wires = [await self.connect() for _ in range(connections)]
        begun = self.tally.asked

        def more(wire: Wire) -> None:
            now_s = time.monotonic()
            if self.tally.asked - begun < total and now_s < until_s:
                asked = self.ask(now_s)
                asked.sends = 1
                self._over(wire, asked)
            elif not self._under_way:
                finished.set()

        self.on_answer = more
        for wire in wires:
            for _ in range(depth):
                more(wire)
        try:
            while not finished.is_set() and not (not self._wires and self._under_way):
                try:
                    await asyncio.wait_for(finished.wait(), 1.0)
                except TimeoutError:
                    continue
        finally:
            self.on_answer = None
            self._idle = [wire for wire in self._wires if not wire.waiting]


class Alarm:
    """Wakes at a time to some ten microseconds: the event loop's own timers have a millisecond (timerfd_create(2))."""

    async def __aenter__(self) -> "Alarm":
        self._fd = LIBC.timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._fd, self._rung)
        self._waiter = None
        return self

    async def __aexit__(self, *error) -> None:
        self._loop.remove_reader(self._fd)
        os.close(self._fd)

    async def at(self, when_s: float) -> None:
        self._waiter = self._loop.create_future()
        seconds, rest = divmod(int(when_s * 1e9), 10**9)
        spec = (ctypes.c_long * 4)(0, 0, seconds, max(rest, 1))
        if LIBC.timerfd_settime(self._fd, TFD_TIMER_ABSTIME, spec, None) != 0:
            raise OSError(ctypes.get_errno(), "timerfd_settime")
        await self._waiter

    def _rung(self) -> None:
        try:
            os.read(self._fd, 8)
        except BlockingIOError:
            return
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
