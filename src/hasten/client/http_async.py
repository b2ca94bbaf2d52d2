"""HTTP for asyncio clients: streams over a small pool of kept connections, answers parsed by ``httptools``."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import httptools

from hasten.client.calls import Call, Reply
from hasten.client.http import GONE, SMALL_BYTES, check_size, headers_of, lost, size_of, trusted, unasked
from hasten.client.values import Address
from hasten.errors import NoAnswer

KEPT = 64
"""Connections that are kept open for the next call; more may be open while they are in use."""

READ_BYTES = 1 << 18
LONGEST_HEAD_BYTES = 1 << 16
SWITCHING_PROTOCOLS = 101


@dataclass(frozen=True)
class Connection:
    """One open connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    @property
    def usable(self) -> bool:
        """Nothing has happened on it since its last answer."""
        if self.writer.is_closing() or unasked(self.writer.get_extra_info("socket").fileno()):
            return False
        step = self.reader.read(1)
        try:
            step.send(None)  # the first step alone: it ends the reading only where something was there already
        except (StopIteration, OSError):
            return False
        step.close()
        return True

    def close(self) -> None:
        """Drop it at once; what was sent and not answered is withdrawn."""
        self.writer.transport.abort()


@dataclass(frozen=True)
class AsyncHttp:
    """Sends calls to one server, on one event loop."""

    address: Address
    _context: ssl.SSLContext | None
    _free: deque[Connection] = field(default_factory=deque)

    async def send(self, call: Call[Any], timeout_s: float) -> Reply:
        """Send a call and read its whole answer, all within ``timeout_s``.

        A call over a kept connection that the server had closed before it answered anything is sent once more.

        Raises:
            NoAnswer: nothing came, or no HTTP. DeadlineExceeded: it did not come in time.
        """
        try:
            async with asyncio.timeout(timeout_s):
                kept = self._kept()
                if kept is not None:
                    with contextlib.suppress(*GONE):
                        return await self._over(kept, call)
                return await self._over(await self._connect(), call)
        except (OSError, UnicodeError, httptools.HttpParserError) as error:
            raise lost(self.address, error, timeout_s) from error

    async def close(self) -> None:
        """Close the kept connections. Closing twice is fine."""
        while self._free:
            self._free.pop().close()

    def _kept(self) -> Connection | None:
        while self._free:
            found = self._free.pop()
            if found.usable:
                return found
            found.close()
        return None

    async def _connect(self) -> Connection:
        return Connection(
            *await asyncio.open_connection(
                self.address.host, self.address.port, ssl=self._context, limit=2 * READ_BYTES
            )
        )

    async def _over(self, connection: Connection, call: Call[Any]) -> Reply:
        kept, answer = False, Answer(self.address)
        try:
            for part in _written(self.address, call):
                connection.writer.write(part)
                await connection.writer.drain()
            while not answer.complete:
                data = await connection.reader.read(READ_BYTES)
                if data:
                    answer.take(data)
                elif not answer.finish():
                    raise _cut(self.address, answer)
            kept = answer.keeps and not answer.until_end and not answer.more
            return Reply(answer.status, answer.headers, bytes(answer.body))
        except GONE as error:
            if not answer.began:  # nothing was answered: the call may be sent once more
                raise
            raise _cut(self.address, answer) from error
        finally:
            if kept and len(self._free) < KEPT:
                self._free.append(connection)
            else:
                connection.close()


class Answer:
    """Takes an answer's parts from the parser: what ``httptools`` calls."""

    def __init__(self, address: Address) -> None:
        self.headers: dict[str, str] = {}
        self.body = bytearray()
        self.complete = False
        self.began = False
        self.until_end = False
        """Its body ends where the connection does."""
        self.more = False
        """Something follows it that nobody asked for."""
        self.keeps = False
        """The connection may be used again."""
        self.status = 0
        self._parser = httptools.HttpResponseParser(self)
        self._address = address
        self._head_bytes = 0
        self._in_head = True
        self._refused: NoAnswer | None = None

    def take(self, data: bytes) -> None:
        """Parse more bytes. Raises NoAnswer: it is larger than what is read."""
        self.began = True
        if self._in_head:
            self._head_bytes += len(data)
        self._parser.feed_data(data)
        if self._refused is not None:
            raise self._refused
        if self._in_head and self._head_bytes > LONGEST_HEAD_BYTES:
            raise NoAnswer(f"{self._address.url} answers with more than {LONGEST_HEAD_BYTES} bytes of headers")

    def finish(self) -> bool:
        """Say whether the end of the connection ends the answer."""
        self.complete = self.complete or (self.until_end and not self._in_head)
        return self.complete

    def on_message_begin(self) -> None:
        """Notice what follows a whole answer."""
        self.more = self.complete

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header."""
        if self.more:
            return
        self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        """Look at how the body comes, before it does."""
        if self.more:
            return
        self._in_head = False
        self.status = self._parser.get_status_code()
        length = self.headers.get("content-length")
        self.until_end = length is None and "transfer-encoding" not in self.headers
        if length is not None and length.isdecimal():
            self._check(int(length))

    def on_body(self, body: bytes) -> None:
        """Keep a piece of the body, unless there is too much of it."""
        self._check(len(self.body) + len(body))
        if self._refused is None and not self.more:
            self.body += body

    def on_message_complete(self) -> None:
        """It is whole. Only here does the parser know whether the connection is kept."""
        if 100 <= self.status < 200 and self.status != SWITCHING_PROTOCOLS:  # the real answer is still to come
            self.headers, self._in_head = {}, True
            return
        if not self.complete:
            self.keeps = self._parser.should_keep_alive()
        self.complete = True

    def _check(self, claimed_bytes: int) -> None:
        """Remember a refusal: what is raised in a callback comes out of the parser as another error."""
        try:
            check_size(self._address, claimed_bytes)
        except NoAnswer as error:
            self._refused = error


def _cut(address: Address, answer: Answer) -> Exception:
    if not answer.began:
        return ConnectionResetError("it closed the connection without a word")
    return NoAnswer(f"{address.url} ended its answer early, after {len(answer.body)} bytes of the body")


def _written(address: Address, call: Call[Any]) -> list[Any]:
    """Give what to write: in one piece where it is small."""
    lines = [f"{call.verb} {call.target} HTTP/1.1", f"Host: {address.authority}"]
    lines += [f"{name}: {value}" for name, value in headers_of(address, call).items()]
    head = ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")
    return [b"".join((head, *call.body))] if size_of(call) <= SMALL_BYTES else [head, *call.body]


def open_http_async(address: Address) -> AsyncHttp:
    """Make what sends calls to an address; nothing is connected yet. Raises BadInput."""
    return AsyncHttp(address, trusted(address))
