"""HTTP/2 frames (RFC 9113): their types, how they are packed, and what a peer's settings mean."""

from __future__ import annotations

import struct
from enum import IntEnum

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HEAD = struct.Struct(">BHBBL")
"""Length (high byte, low bytes), type, flags, stream."""
HEAD_BYTES = 9
LARGEST_WINDOW = 2**31 - 1
FIRST_WINDOW = 65_535
"""Of every stream and of the connection, until settings and updates say otherwise."""
FIRST_FRAME_BYTES = 16_384

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM, ACK, END_HEADERS, PADDED, WITH_PRIORITY = 0x1, 0x1, 0x4, 0x8, 0x20
MAX_STREAMS_ID, WINDOW_ID, FRAME_ID, LIST_ID = 3, 4, 5, 6


class Code(IntEnum):
    """Error codes of RFC 9113, section 7."""

    NO_ERROR = 0
    PROTOCOL_ERROR = 1
    FLOW_CONTROL_ERROR = 3
    STREAM_CLOSED = 5
    FRAME_SIZE_ERROR = 6
    REFUSED_STREAM = 7
    CANCEL = 8
    COMPRESSION_ERROR = 9
    ENHANCE_YOUR_CALM = 11


class Broken(Exception):
    """The peer broke the protocol: the connection ends with this code."""

    def __init__(self, code: Code, text: str) -> None:
        self.code = code
        super().__init__(text)


def frame(kind: int, flags: int, stream: int, payload: bytes | memoryview = b"") -> bytes:
    """Pack a frame."""
    length = len(payload)
    return HEAD.pack(length >> 16, length & 0xFFFF, kind, flags, stream) + payload


def settings(values: dict[int, int]) -> bytes:
    """Pack a SETTINGS frame."""
    return frame(SETTINGS, 0, 0, b"".join(struct.pack(">HL", key, value) for key, value in values.items()))


def window_update(stream: int, more: int) -> bytes:
    """Pack a WINDOW_UPDATE."""
    return frame(WINDOW_UPDATE, 0, stream, more.to_bytes(4, "big"))


def reset(stream: int, code: Code) -> bytes:
    """Pack a RST_STREAM."""
    return frame(RST_STREAM, 0, stream, int(code).to_bytes(4, "big"))


def goaway(last: int, code: Code, text: str = "") -> bytes:
    """Pack a GOAWAY."""
    return frame(GOAWAY, 0, 0, struct.pack(">LL", last, code) + text.encode()[:200])


def literal(name: bytes, value: bytes) -> bytes:
    """Write a header for HPACK without its table: the same bytes at any time on any connection."""
    return b"\x00" + _length(len(name)) + name + _length(len(value)) + value


def _length(value: int) -> bytes:
    """Write an integer with a prefix of 7 bits (RFC 7541, section 5.1)."""
    if value < 127:
        return bytes([value])
    out, value = bytearray([127]), value - 127
    while value >= 128:
        out.append(value % 128 + 128)
        value //= 128
    out.append(value)
    return bytes(out)


def unpadded(flags: int, payload: memoryview) -> memoryview:
    """Take the padding off. Raises Broken where there is more of it than payload."""
    if not flags & PADDED:
        return payload
    if not payload or payload[0] >= len(payload):
        raise Broken(Code.PROTOCOL_ERROR, "the padding is longer than the frame")
    return payload[1 : len(payload) - payload[0]]


def of_connection(name: str, number: int) -> None:
    """Check that a frame which is about the whole connection names no stream. Raises Broken."""
    if number:
        raise Broken(Code.PROTOCOL_ERROR, f"{name} of stream {number}; it is the connection's")


def read_settings(payload: memoryview) -> dict[int, int]:
    """Read and check a peer's settings. Raises Broken."""
    if len(payload) % 6:
        raise Broken(Code.FRAME_SIZE_ERROR, f"SETTINGS of {len(payload)} bytes")
    found = dict(struct.iter_unpack(">HL", payload))
    if found.get(WINDOW_ID, 0) > LARGEST_WINDOW:
        raise Broken(Code.FLOW_CONTROL_ERROR, f"a window of {found[WINDOW_ID]} bytes")
    if not FIRST_FRAME_BYTES <= found.get(FRAME_ID, FIRST_FRAME_BYTES) < 2**24:
        raise Broken(Code.PROTOCOL_ERROR, f"frames of {found[FRAME_ID]} bytes")
    return found
