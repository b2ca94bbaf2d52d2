"""One HTTP/1.1 request as a route sees it, and its answer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from typing import Final, Protocol, TypeAlias

import msgspec

from hasten.serve.codes import DEFECT, LONGEST_TEXT
from hasten.serve.cork import Waiter

logger = logging.getLogger(__name__)

Buffer: TypeAlias = bytes | bytearray | memoryview

JSON: Final = b"application/json"

_STATUS_LINES: Final = {
    int(status): f"HTTP/1.1 {int(status)} {status.phrase}\r\nContent-Type: ".encode() for status in HTTPStatus
} | {499: b"HTTP/1.1 499 Client Closed Request\r\nContent-Type: "}


FULL: Final = b"Retry-After: 1\r\nX-Reason: server_full\r\n"
"""What a 503 says of a bound of the whole server, whatever is asked of it."""


class Replies(Protocol):
    """A connection, as a request needs it."""

    def replied(self, request: Request) -> None:
        """Its reply is complete: write it when its turn comes."""


class Request:
    """A request that was read completely. ``respond`` is called once, on the event loop's thread.

    ``leave`` is called where the client goes away before that; ``waiter`` is told that the answer was handed to the
    socket.
    """

    def __init__(
        self,
        connection: Replies,
        method: bytes,
        target: bytes,
        headers: Mapping[bytes, bytes],
        body: Buffer = b"",
        began_ns: int = 0,
        peer: str = "",
        date: bytes = b"",
    ) -> None:
        self.connection = connection
        self.method = method
        self.target = target
        """As it came: path and query, percent-encoded."""
        self.headers = headers
        """Names in lower case; values of a repeated name joined by a comma."""
        self.body: Buffer = body
        """A memoryview of it is one of bytes."""
        self.began_ns = began_ns
        self.peer = peer
        self.date = date
        """The header Date as a whole line, where the transport does not write it itself."""
        self.keep_alive = True
        self.old = False
        """HTTP/1.0: keep-alive must be said."""
        self.leave: Callable[[], None] | None = None
        self.waiter: Waiter | None = None
        self.status = 0
        self.reply: list[Buffer] | None = None
        self.reply_bytes = 0

    def respond(
        self, status: int, body: Buffer | Sequence[Buffer] = b"", *, kind: bytes = JSON, extra: bytes = b""
    ) -> None:
        """Answer: ``body`` is one buffer or several in order; ``extra`` holds whole header lines.

        The buffers must not change any more, and a memoryview must be one of bytes. After the client has left, and a
        second time, this does nothing.
        """
        if self.reply is not None:
            return
        parts: list[Buffer] = [body] if isinstance(body, (bytes, bytearray, memoryview)) else [*body]
        length = sum(map(len, parts))
        if self.old or not self.keep_alive:
            extra = _CONNECTION[self.keep_alive] + extra
        line = _STATUS_LINES[status]
        head = b"".join([line, kind, b"\r\nContent-Length: %d\r\n" % length, self.date, extra, b"\r\n"])
        self.status, self.reply_bytes = status, length
        self.reply = [head] if self.method == b"HEAD" else [head, *parts]
        self.connection.replied(self)

    def refuse(self, status: int, text: str, extra: bytes = b"") -> None:
        """Answer with an error, as JSON: ``{"error": text}``."""
        self.respond(status, error_body(text), extra=extra)


_CONNECTION: Final = {True: b"Connection: keep-alive\r\n", False: b"Connection: close\r\n"}


def defective(request: Request, error: Exception) -> None:
    """Answer a request whose route failed: a defect of ours is a 500, with the trace in the log."""
    logger.error("a route failed", exc_info=error)
    request.refuse(500, DEFECT)


def error_body(text: str) -> bytes:
    """Give the JSON of an error, shortened to what a client is told."""
    return msgspec.json.encode({"error": text[:LONGEST_TEXT]})
