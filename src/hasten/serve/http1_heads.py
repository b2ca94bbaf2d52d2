"""Heads of requests that were parsed before, by their bytes: most clients send the same one again and again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hasten.serve.http1_request import Request

KEPT_HEADS, LONGEST_HEAD = 256, 4096
"""Heads that are remembered, then all are forgotten; and the longest of them, in bytes."""


@dataclass(frozen=True)
class Head:
    """What a request's head means."""

    method: bytes
    target: bytes
    headers: Mapping[bytes, bytes]
    length: int
    """Of the body, in bytes."""


Heads = dict[bytes, Head]


def keep_head(heads: Heads, head: bytes, request: Request, length: int) -> None:
    """Remember what a head means, where it is a plain one of a request whose body is not chunked.

    Its lines end with CRLF and nothing else looks like an end of line, so that where it ends is beyond doubt.
    """
    lines = head.count(b"\r\n")
    plain = lines == head.count(b"\n") == head.count(b"\r") and not head.startswith(b"\r")
    usual = request.keep_alive and not request.old and b"upgrade" not in request.headers
    if plain and usual and len(head) <= LONGEST_HEAD:
        if len(heads) >= KEPT_HEADS:
            heads.clear()
        heads[head] = Head(request.method, request.target, request.headers, length)
