"""Putting a call's messages together from the frames that they come in, each bounded before it is kept.

A message is a flag (compressed), its length in 4 bytes, and its bytes (PROTOCOL-HTTP2.md of gRPC).
"""

from __future__ import annotations

from typing import Final, Protocol

from hasten.errors import TooLarge
from hasten.protocol import http2_frames as h2
from hasten.serve.http2_stream import RESOURCE_EXHAUSTED, Call
from hasten.serve.limits import Limits

INVALID_ARGUMENT, DEADLINE_EXCEEDED, UNIMPLEMENTED, INTERNAL, UNAVAILABLE = 3, 4, 12, 13, 14

FULL: Final = {"reason": "server_full", "retry-after": "1"}
"""What a refusal says of a bound of the whole server, whatever is asked of it."""
LARGE: Final = {"reason": TooLarge.reason}
"""Without it a client would take the status for one of a server that is busy, and come again."""

PREFIX_BYTES: Final = 5
LARGEST_STREAMED_BYTES: Final = 64 * 2**10
"""Of one message of a stream, which asks for no more than a name."""


class Buffers(Protocol):
    """The server, as its messages need it."""

    limits: Limits
    buffered_bytes: int


def take_whole(server: Buffers, call: Call, flags: int, payload: memoryview) -> bool:
    """Keep a message that came in one frame as it lies; False where it is not that plain."""
    size = len(payload)
    if size < PREFIX_BYTES or flags & h2.PADDED or payload[0] or call.on_message is not None:
        return False
    limits = server.limits
    if size - PREFIX_BYTES != int.from_bytes(payload[1:5], "big") or size - PREFIX_BYTES > limits.body_bytes:
        return False
    if server.buffered_bytes + size > limits.buffered_bytes:
        return False
    call.whole = payload
    server.buffered_bytes += size
    return True


def grow(server: Buffers, call: Call, payload: memoryview) -> bool:
    """Keep a piece of a message, bounded by what its prefix says; False: the call is over."""
    body = call.body
    if server.buffered_bytes + len(payload) > server.limits.buffered_bytes:
        call.fail(UNAVAILABLE, f"messages of {server.buffered_bytes} bytes are in work; try again", FULL)
        return False
    body += payload
    server.buffered_bytes += len(payload)
    most = server.limits.body_bytes
    if call.on_message is not None:
        most = min(most, LARGEST_STREAMED_BYTES)
    while len(body) >= PREFIX_BYTES:
        length = int.from_bytes(body[1:5], "big")
        if body[0]:
            call.fail(UNIMPLEMENTED, "compressed messages are not taken; send them as they are")
        elif length > most:
            call.fail(RESOURCE_EXHAUSTED, f"the message has {length} bytes; the limit is {most}", LARGE)
        elif call.on_message is None and len(body) > length + PREFIX_BYTES:
            call.fail(INVALID_ARGUMENT, "more than one message, where the call takes one")
        elif call.on_message is not None and len(body) >= length + PREFIX_BYTES:
            message = bytes(body[PREFIX_BYTES : length + PREFIX_BYTES])
            del body[: length + PREFIX_BYTES]
            server.buffered_bytes -= length + PREFIX_BYTES
            call.on_message(message)
            if call.trailers is None:
                continue
        else:
            return True
        return False
    return True


def is_cut_short(call: Call) -> bool:
    """Tell whether less came of the only message than its prefix says."""
    body = call.body
    if call.whole is not None:
        return False
    return len(body) < PREFIX_BYTES or len(body) != PREFIX_BYTES + int.from_bytes(body[1:5], "big")
