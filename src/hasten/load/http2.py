"""Load over gRPC: HTTP/2 framed by hand, many calls on one connection; messages of answers are counted, not kept.

We tell the server that our header table has no room (RFC 7541, section 4.2), so that each block of headers can be read
by itself: trailers are kept as they came, and read once the run is over.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Sequence

from hpack import Decoder, HPACKError

from hasten.client.http import trusted
from hasten.errors import NoAnswer
from hasten.load.connect import OPEN_S, Place, connect_failure, connection_limit, first_reached
from hasten.load.http2_connection import LARGEST_BLOCK_BYTES, Connection
from hasten.load.payloads import Payload
from hasten.load.recorder import ERROR, OK, REFUSED, TIMEOUT, Recorder
from hasten.load.target import Target
from hasten.protocol.http2_frames import literal

OUTCOME_OF = {b"0": OK, b"8": REFUSED, b"14": REFUSED, b"4": TIMEOUT}
METHOD = b"/inference.GRPCInferenceService/ModelInfer"


class Http2Sender:
    """A pool of connections to one server: a new one is opened where all that there are carry all they may."""

    def __init__(self, target: Target, payloads: Sequence[Payload], loop: asyncio.AbstractEventLoop) -> None:
        self.recorder = Recorder(began_ns=0, ended=lambda index: None)
        self.loop = loop
        self.address = target.address
        self.wire: Sequence[bytes] = [payload.data for payload in payloads if isinstance(payload.data, bytes)]
        self.block = _request_block(target)
        self.context = trusted(self.address)
        if self.context is not None:
            self.context.set_alpn_protocols(["h2"])
        self._limit = connection_limit(target.connections)
        self.open_connections: set[Connection] = set()
        self._connections: list[Connection] = []
        """Those that take calls."""
        self._carriers: dict[int, Connection] = {}
        self._waiting: dict[int, int] = {}
        self._refused: set[int] = set()
        """Calls that were turned away once."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._place: Place | None = None

    async def open(self) -> None:
        """Find the server and open a first connection. Raises NoAnswer: nobody is there, or it speaks no HTTP/2."""

        async def reach(place: Place) -> Connection:
            self._place = place
            made = Connection(self)
            await self._reach(made)
            return made

        try:
            first = await first_reached(self.address, self.loop, reach)
        except OSError as error:  # a TimeoutError is one
            raise NoAnswer(f"{self.address.url} gives no answer: {connect_failure(error)}") from error
        try:
            await asyncio.wait_for(first.greeted, OPEN_S)
        except TimeoutError as error:
            raise NoAnswer(f"{self.address.url} does not greet as HTTP/2 does; is it a gRPC port?") from error
        except OSError as error:
            raise NoAnswer(f"{self.address.url} gives no answer: {connect_failure(error)}") from error
        self._connections.append(first)

    def begin(self, recorder: Recorder) -> None:
        """Tell this recorder from now on."""
        for index, connection in list(self._carriers.items()):
            connection.withdraw(index)
        self._carriers.clear()
        self._waiting.clear()
        self._refused.clear()
        self.recorder = recorder

    def send(self, index: int, payload: int) -> None:
        """Let a call go over the first connection that has room, or wait for one; it is noted as gone now."""
        self.recorder.let_go(index)
        self._place_call(index, payload)

    def _place_call(self, index: int, payload: int) -> None:
        connection = self._with_room()
        if connection is None:
            self._waiting[index] = payload
            return
        self._carriers[index] = connection
        connection.call(index, payload)

    def withdraw(self, index: int) -> None:
        """Tell the server that nobody waits any more."""
        connection = self._carriers.pop(index, None)
        if connection is not None:
            connection.withdraw(index)
            self._next_waiting()
        self._waiting.pop(index, None)

    def settle(self, recorder: Recorder) -> None:
        """Read the trailers that were kept."""
        for index, block in enumerate(recorder.told):
            if block is None:
                continue
            headers = _headers(block)
            status = headers.get(b"grpc-status", b"")
            recorder.outcome[index] = OUTCOME_OF.get(status, ERROR)
            recorder.status[index] = int(status) if status.isdigit() and len(status) < 4 else -1
            recorder.told[index] = headers.get(b"server-timing")

    def close(self) -> None:
        """Cut every connection."""
        for connection in list(self.open_connections):
            connection.abort()
        for task in self._tasks:
            task.cancel()

    # what connections tell

    def ended(self, index: int) -> None:
        """A call is over; what waits may take its place."""
        self._carriers.pop(index, None)
        self._next_waiting()

    def fail(self, index: int, reason: str, *, unreached: bool = False) -> None:
        """A call has no answer."""
        self._carriers.pop(index, None)
        self.recorder.fail(index, reason, unreached=unreached)
        self._next_waiting()

    def refuse(self, index: int, payload: int | None = None) -> None:
        """A call was turned away before it was looked at (REFUSED_STREAM, ENHANCE_YOUR_CALM).

        Where it has its ``payload`` it may go once more, as gRPC's clients send it (RFC 9113, 8.7; gRFC A6).
        """
        self._carriers.pop(index, None)
        if payload is not None and index not in self._refused:
            self._refused.add(index)
            self._place_call(index, payload)
            return
        self.recorder.answer(index, REFUSED, -1, 0)
        self._next_waiting()

    def again(self, index: int, payload: int) -> None:
        """Send a call over another connection that was never looked at (RFC 9113, 6.8), or has not left yet."""
        self._place_call(index, payload)

    def lost(self, connection: Connection) -> None:
        """A connection takes no more calls."""
        if connection in self._connections:
            self._connections.remove(connection)

    def _next_waiting(self) -> None:
        if self._waiting:
            first = next(iter(self._waiting))
            self._place_call(first, self._waiting.pop(first))

    # connecting

    def _with_room(self) -> Connection | None:
        """Give the first connection that takes a call, a new one where none does; None: there are too many."""
        for connection in self._connections:
            if connection.room > 0:
                return connection
        return self._connect() if len(self._connections) < self._limit else None

    def _connect(self) -> Connection:
        connection = Connection(self)
        self._connections.append(connection)

        async def reach() -> None:
            try:
                await self._reach(connection)
            except OSError as error:
                self.lost(connection)
                connection.fail_all(connect_failure(error), unreached=True)

        task = self.loop.create_task(reach())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return connection

    async def _reach(self, connection: Connection) -> None:
        assert self._place is not None  # noqa: S101 - open() comes first
        place = self._place
        await self.loop.create_connection(
            lambda: connection,
            host=place.host,
            port=place.port,
            family=place.family,
            ssl=self.context,
            server_hostname=self.address.host if self.context else None,
        )


def _request_block(target: Target) -> bytes:
    """Write the headers of a call, the same bytes for every one."""
    address = target.address
    pairs = [
        (b":method", b"POST"),
        (b":scheme", b"https" if address.secure else b"http"),
        (b":path", METHOD),
        (b":authority", address.authority.encode()),
        (b"te", b"trailers"),
        (b"content-type", b"application/grpc"),
        (b"user-agent", b"hasten-load"),
    ]
    if address.api_key is not None:
        pairs.append((b"authorization", f"Bearer {address.api_key}".encode()))
    return b"".join(literal(name, value) for name, value in pairs)


@functools.lru_cache(maxsize=1024)
def _headers(block: bytes) -> dict[bytes, bytes]:
    """Read a block by itself; what cannot be read says nothing, and its call counts as an error."""
    try:
        return dict(Decoder(max_header_list_size=LARGEST_BLOCK_BYTES).decode(block, raw=True))
    except (HPACKError, UnicodeDecodeError):
        return {}
