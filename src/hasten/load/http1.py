"""Load over HTTP/1.1: kept connections, one request on each at a time; the body of an answer is counted, not kept."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence

from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

from hasten.client.http import trusted
from hasten.errors import NoAnswer
from hasten.load.connect import Place, connect_failure, connection_limit, first_reached
from hasten.load.payloads import Payload
from hasten.load.recorder import ERROR, OK, REFUSED, TIMEOUT, Recorder
from hasten.load.target import Target

SCRATCH_BYTES = 256 * 2**10
LONGEST_HEAD_BYTES = 1 << 16
OUTCOME_OF = {503: REFUSED, 429: REFUSED, 504: TIMEOUT}
NONE = -1
TIMING = b"server-timing"


class Http1Sender:
    """A pool of connections to one server. The connection used last is used next: few stay warm, not all half-cold."""

    def __init__(self, target: Target, payloads: Sequence[Payload], loop: asyncio.AbstractEventLoop) -> None:
        self.recorder = Recorder(began_ns=0, ended=lambda index: None)
        self.scratch = memoryview(bytearray(SCRATCH_BYTES))
        """What every connection reads into: a read is parsed before the loop goes on to the next."""
        self._address = target.address
        self._url = target.url
        self._context = trusted(self._address)
        self._wire = [payload.data for payload in payloads if isinstance(payload.data, bytes)]
        self._loop = loop
        self._limit = connection_limit(target.connections)
        self._idle: list[Connection] = []
        self._open: set[Connection] = set()
        self._carriers: dict[int, Connection] = {}
        self._waiting: dict[int, int] = {}
        """Index -> payload, in order, of what has no connection yet."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._place: Place | None = None

    async def open(self) -> None:
        """Find the server and open a first connection. Raises NoAnswer."""

        async def reach(place: Place) -> Connection:
            self._place = place
            made = Connection(self)
            await self._reach(made)
            return made

        try:
            first = await first_reached(self._address, self._loop, reach)
        except OSError as error:  # a TimeoutError is one
            raise NoAnswer(f"{self._url} gives no answer: {connect_failure(error)}") from error
        self._open.add(first)
        self._idle.append(first)

    def begin(self, recorder: Recorder) -> None:
        """Tell this recorder from now on."""
        for connection in list(self._carriers.values()):
            connection.drop()
        self._carriers.clear()
        self._waiting.clear()
        self.recorder = recorder

    def send(self, index: int, payload: int) -> None:
        """Let a request go over the connection used last, or over a new one; at the limit it waits for one.

        It is noted as gone now: what it waits here is for the server, which has not answered those before it.
        """
        self.recorder.let_go(index)
        if self._idle:
            connection = self._idle.pop()
            self._carriers[index] = connection
            connection.carry(index, payload, self._wire[payload])
        elif len(self._open) < self._limit:
            self._connect(index, payload)
        else:
            self._waiting[index] = payload

    def withdraw(self, index: int) -> None:
        """Drop a request: its connection with it, for the answer may still come over it."""
        connection = self._carriers.pop(index, None)
        if connection is not None:
            connection.drop()
        else:
            self._waiting.pop(index, None)

    def settle(self, recorder: Recorder) -> None:
        """All is known at once here."""

    def close(self) -> None:
        """Cut every connection."""
        for connection in list(self._open):
            connection.drop()
        for task in self._tasks:
            task.cancel()

    # what connections tell

    def free(self, connection: Connection, index: int, *, keep: bool) -> None:
        """A connection has its answer."""
        self._carriers.pop(index, None)
        if not keep:
            connection.drop()
        elif self._waiting:
            index, payload = self._first_waiting()
            self._carriers[index] = connection
            connection.carry(index, payload, self._wire[payload])
        else:
            self._idle.append(connection)

    def lost(self, connection: Connection) -> None:
        """A connection is gone; what waits may open another."""
        self._open.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)
        if self._waiting and len(self._open) < self._limit:
            self._connect(*self._first_waiting())

    def again(self, index: int, payload: int) -> None:
        """Send once more, over a new connection: the server had closed the kept one before the request came."""
        self._connect(index, payload)

    def failed(self, index: int, reason: str, *, unreached: bool) -> None:
        """A request has no answer."""
        self._carriers.pop(index, None)
        self.recorder.fail(index, reason, unreached=unreached)

    def answered(self, index: int) -> None:
        """A request has its answer, and its connection went with it."""
        self._carriers.pop(index, None)

    def _first_waiting(self) -> tuple[int, int]:
        index = next(iter(self._waiting))
        return index, self._waiting.pop(index)

    # connecting

    def _connect(self, index: int, payload: int) -> None:
        connection = Connection(self)
        self._open.add(connection)
        self._carriers[index] = connection
        connection.index = index
        task = self._loop.create_task(self._carry_new(connection, index, payload))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _carry_new(self, connection: Connection, index: int, payload: int) -> None:
        try:
            await self._reach(connection)
        except OSError as error:
            if connection.index == index:
                connection.index = NONE
                self.failed(index, connect_failure(error), unreached=True)
            self.lost(connection)
            return
        if connection.index == index:
            connection.write(payload, self._wire[payload])
        else:  # withdrawn while it was being opened
            connection.drop()

    async def _reach(self, connection: Connection) -> None:
        assert self._place is not None  # noqa: S101 - open() comes first
        place = self._place
        await self._loop.create_connection(
            lambda: connection,
            host=place.host,
            port=place.port,
            family=place.family,
            ssl=self._context,
            server_hostname=self._address.host if self._context else None,
        )


class Connection(asyncio.BufferedProtocol):
    """One connection, and the request that it carries."""

    __slots__ = (
        *("_sender", "_transport", "_parser", "index", "_payload", "_used", "_received", "_complete", "_keep"),
        *("_until_end", "_in_head", "_told", "_fresh"),
    )

    def __init__(self, sender: Http1Sender) -> None:
        self._sender = sender
        self._transport: asyncio.Transport | None = None
        self._parser = HttpResponseParser(self)
        self.index = NONE
        self._payload = 0
        self._used = 0
        self._clear()

    def _clear(self) -> None:
        self._received = 0
        self._complete = False
        self._keep = False
        self._until_end = True
        self._in_head = True
        self._told: bytes | None = None

    def carry(self, index: int, payload: int, wire: bytes) -> None:
        """Send a request over a kept connection."""
        self.index = index
        self.write(payload, wire)

    def write(self, payload: int, wire: bytes) -> None:
        """Write the request that ``index`` names."""
        self._payload = payload
        self._used += 1
        self._clear()
        if self._transport is not None:
            self._transport.write(wire)

    def drop(self) -> None:
        """Cut it, and forget what it carries."""
        self.index = NONE
        if self._transport is not None:
            self._transport.abort()

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It is open."""
        self._transport = transport  # type: ignore[assignment]
        self._sender.recorder.reached()
        held = transport.get_extra_info("socket")
        if held is not None:
            held.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def connection_lost(self, exc: Exception | None) -> None:
        """It is gone: what it carried is answered, sent again, or lost."""
        self._transport = None
        index, self.index = self.index, NONE
        sender = self._sender
        if index != NONE:
            if self._received and self._until_end and not self._in_head:
                sender.answered(index)
                _tell(sender.recorder, index, (self._parser.get_status_code(), self._told, self._received))
            elif not self._received and self._used > 1:
                sender.again(index, self._payload)
            else:
                what = "ended its answer early" if self._received else "closed the connection without a word"
                sender.failed(index, what, unreached=False)
        sender.lost(self)
        self._parser = None  # type: ignore[assignment]  # it refers back to this object

    def get_buffer(self, sizehint: int) -> memoryview:
        """Give what is read into."""
        return self._sender.scratch

    def buffer_updated(self, nbytes: int) -> None:
        """Take what was read."""
        index, sender = self.index, self._sender
        if index == NONE:  # nobody asked for it
            self.drop()
            return
        if not self._received:
            sender.recorder.began(index)
        self._received += nbytes
        try:
            self._parser.feed_data(sender.scratch[:nbytes])
        except (HttpParserError, HttpParserUpgrade):
            self._break(index, "answered what is no HTTP")
            return
        if self._complete:
            self.index = NONE
            status, told, received = self._parser.get_status_code(), self._told, self._received
            sender.free(self, index, keep=self._keep)  # first: whoever hears of the answer may want a connection
            _tell(sender.recorder, index, (status, told, received))
        elif self._in_head and self._received > LONGEST_HEAD_BYTES:
            self._break(index, f"answered with more than {LONGEST_HEAD_BYTES} bytes of headers")

    def _break(self, index: int, reason: str) -> None:
        self.drop()
        self._sender.failed(index, reason, unreached=False)

    # llhttp's side

    def on_message_begin(self) -> None:
        """What follows a whole answer was not asked for: the connection is of no more use."""
        if self._complete:
            self._keep = False

    def on_header(self, name: bytes, value: bytes) -> None:
        """Look for what tells how the body ends, and for the server's timing."""
        length = len(name)
        if length in (14, 17) and name.lower() in (b"content-length", b"transfer-encoding"):
            self._until_end = False
        elif length == 13 and name.lower() == TIMING:
            self._told = value if self._told is None else self._told + b"," + value

    def on_headers_complete(self) -> None:
        """The head is over."""
        self._in_head = False

    def on_message_complete(self) -> None:
        """The answer is whole, unless it only says that one will come."""
        if self._parser.get_status_code() < 200:
            self._in_head = True
            return
        self._complete = True
        self._keep = self._parser.should_keep_alive()


def _tell(recorder: Recorder, index: int, answer: tuple[int, bytes | None, int]) -> None:
    """Tell of an answer: its status, what it says of phases, its bytes."""
    status, told, received = answer
    recorder.told[index] = told
    recorder.answer(index, OK if 200 <= status < 300 else OUTCOME_OF.get(status, ERROR), status, received)
