"""What is checked of an HTTP/1.1 request before its body is read."""

from __future__ import annotations

from typing import Protocol

from hasten.serve.http1_request import Request
from hasten.serve.limits import Limits


class Buffers(Protocol):
    """The server, as its bodies need it."""

    limits: Limits
    buffered_bytes: int


def problem_of(
    request: Request, *, server: Buffers, version: str, head_bytes: int, length: int
) -> tuple[int, str] | None:
    """Say why a request is refused before its body of ``length`` bytes is read, with its status; None: it is not."""
    headers, limits = request.headers, server.limits
    if version not in ("1.0", "1.1"):
        return 505, "this server speaks HTTP/1.1 and HTTP/1.0"
    if not request.old and b"host" not in headers:
        return 400, "the header Host is missing"
    if head_bytes > limits.header_bytes:
        return 431, f"the target and the headers are over {limits.header_bytes} bytes"
    if length > limits.body_bytes:
        return 413, f"the body has {length} bytes; the limit is {limits.body_bytes}"
    if length and server.buffered_bytes + length > limits.buffered_bytes:
        return 503, f"bodies of {server.buffered_bytes} bytes are in work; this one has {length}; try again"
    if headers.get(b"expect", b"100-continue").lower() != b"100-continue":
        return 417, "the only expectation known is 100-continue"
    return None
