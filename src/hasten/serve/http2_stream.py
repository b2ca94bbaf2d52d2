"""One gRPC call on an HTTP/2 connection, as a route sees it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Final, Protocol
from urllib.parse import quote

from hasten.protocol.http2_frames import FIRST_WINDOW, literal
from hasten.serve.codes import LONGEST_TEXT
from hasten.serve.cork import Waiter

OPENING: Final = b"\x88" + literal(b"content-type", b"application/grpc")
"""``:status: 200`` and the content type, by HPACK's static table alone."""
MOST_UNREAD_BYTES: Final = 64 * 2**10
"""Of a stream's messages that its client leaves unread; one more ends the call."""
RESOURCE_EXHAUSTED: Final = 8
SAFE = " !\"#$&'()*+,/:;<=>?@[\\]^_`{|}~"
"""What stays as it is in a message, besides letters, digits, and ``-._``: all printable ASCII but the percent sign."""
PLAIN = re.compile(r"[ -$&-~]*")
"""Such a text alone."""
GOOD_END: Final = literal(b"grpc-status", b"0")


class Sends(Protocol):
    """A connection, as a call needs it."""

    def pump(self, call: Call) -> None:
        """Send what the windows let through."""


def trailers_of(status: int, text: str, extra: Mapping[str, str]) -> bytes:
    """Give the trailers of a call that has no answer, as HPACK writes them."""
    shown = text[:LONGEST_TEXT]
    said = shown.encode() if PLAIN.fullmatch(shown) else quote(shown, safe=SAFE).encode()
    pairs = [(b"grpc-status", b"%d" % status), (b"grpc-message", said)]
    pairs += [(name.encode(), value.encode()) for name, value in extra.items()]
    return b"".join([literal(name, value) for name, value in pairs])


class Call:
    """One call. Its methods are called on the event loop's thread; after the client has left they do nothing."""

    __slots__ = (
        *("began_ns", "body", "connection", "counted", "ended", "headers", "id", "leave", "on_message", "out"),
        *("path", "receive_left", "send_window", "sent_bytes", "started", "status"),
        *("trailers", "waiter", "whole"),
    )

    def __init__(self, connection: Sends, number: int, headers: Mapping[bytes, bytes]) -> None:
        self.connection: Sends | None = connection
        self.id = number
        self.headers = headers
        self.path = headers[b":path"]
        self.whole: memoryview | None = None
        """The only message, with its prefix, where it came in one frame; ``body`` is then empty."""
        self.body = bytearray()
        """What came of a message, its prefix of 5 bytes with it."""
        self.began_ns = 0
        self.ended = False
        """The client has sent all."""
        self.counted = False
        """The connection counts it among those whose message has not come whole."""
        self.started = False
        self.receive_left = 0
        self.send_window = FIRST_WINDOW
        self.out: list[memoryview] = []
        self.trailers: bytes | None = None
        self.status = 0
        """The gRPC status that it ended with."""
        self.sent_bytes = 0
        """Of its messages."""
        self.leave: Callable[[], None] | None = None
        self.waiter: Waiter | None = None
        """Told that all of it was handed to the socket."""
        self.on_message: Callable[[bytes], None] | None = None
        """Set by a route that answers each message of a stream; None: one message, and then the call is routed."""

    @property
    def message(self) -> bytes:
        """The only message of a unary call."""
        return bytes((memoryview(self.body) if self.whole is None else self.whole)[5:])

    def send(self, message: bytes) -> None:
        """Send one message; the call stays open, unless its client has left too many unread."""
        if self.trailers is None and sum(map(len, self.out)) > MOST_UNREAD_BYTES:
            self.fail(RESOURCE_EXHAUSTED, f"over {MOST_UNREAD_BYTES} bytes of answers are unread; read them first")
        elif self.trailers is None:
            self.sent_bytes += len(message)
            self.out.append(memoryview(b"\x00" + len(message).to_bytes(4, "big") + message))
            self._pump()

    def respond(self, message: bytes, extra: bytes = b"") -> None:
        """Send one message and end the call well; ``extra`` are trailers, as HPACK writes them."""
        if self.trailers is None:
            self.trailers = GOOD_END + extra
            self.sent_bytes = len(message)
            self.out.append(memoryview(b"\x00" + len(message).to_bytes(4, "big") + message))
            self._pump()

    def finish(self) -> None:
        """End the call well."""
        if self.trailers is None:
            self.trailers = GOOD_END
            self._pump()

    def fail(self, status: int, text: str, extra: Mapping[str, str] | None = None) -> None:
        """End the call with a gRPC status and the reason for it."""
        self.end(status, trailers_of(status, text, extra or {}))

    def end(self, status: int, trailers: bytes) -> None:
        """End the call with a gRPC status, and trailers that say it."""
        if self.trailers is None:
            self.status = status
            self.trailers = trailers
            self._pump()

    def _pump(self) -> None:
        if self.connection is not None:
            self.connection.pump(self)
