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
    if request.method == b"CONNECT":
        return 501, "this server is no proxy: it knows no CONNECT"
    host = headers.get(b"host")
    if not request.old and host is None:
        return 400, "the header Host is missing"
    if host is not None and b", " in host:
        return 400, "the header Host is there more than once; send it once"
    if b"transfer-encoding" in headers and _is_coded(headers[b"transfer-encoding"]):
        return 501, "the only transfer encoding known is chunked; compress with Content-Encoding"
    if head_bytes > limits.header_bytes:
        return 431, f"the target and the headers are over {limits.header_bytes} bytes"
    if length > limits.body_bytes:
        return 413, f"the body has {length} bytes; the limit is {limits.body_bytes}"
    if length and server.buffered_bytes + length > limits.buffered_bytes:
        return 503, f"bodies of {server.buffered_bytes} bytes are in work; this one has {length}; try again"
    if headers.get(b"expect", b"100-continue").lower() != b"100-continue":
        return 417, "the only expectation known is 100-continue"
    return None


def problem_of_part(server: Buffers, n_bytes: int, *, size: int) -> tuple[int, str] | None:
    """Say why a part of ``n_bytes``, with which a body has ``size``, is refused, with its status; None: it is not."""
    limits = server.limits
    if size > limits.body_bytes:
        return 413, f"the body is over {limits.body_bytes} bytes, the limit"
    if server.buffered_bytes + n_bytes > limits.buffered_bytes:
        return 503, f"bodies of {server.buffered_bytes} bytes are in work; try again"
    return None


def _is_coded(value: bytes) -> bool:
    """Say whether a body is more than chunked. (One whose last coding is not chunks has no end: llhttp says so.)"""
    *others, last = value.lower().split(b",")
    return bool(others) and last.strip() == b"chunked"


def framing(length: int, *, chunked: bool) -> bytes:
    """Give a head that says how its body is framed, and nothing else: for a parser that did not read the request's."""
    line = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: %d" % length
    return b"POST / HTTP/1.1\r\n%b\r\n\r\n" % line
