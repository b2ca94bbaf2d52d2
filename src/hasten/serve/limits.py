"""What a transport takes before it refuses: sizes, counts and times. Every bound is finite."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds of a transport. They are checked before memory of that size is taken."""

    connections: int = 16_384
    """Open at once; one more gets a 503 and is closed, after ``linger_s`` at the latest."""
    descriptors: int = sys.maxsize
    """File descriptors below this number are for connections, the system gives the lowest that is free: who gets a
    higher one is one too many, while there are some yet to tell it so, and for models, logs and pipes."""
    surplus: int = 128
    """Connections over the limit that may stay until they have read why; beyond, they are closed at once."""
    requests: int = 4_096
    """In work at once over all connections; one more gets a 503."""
    body_bytes: int = 64 * 2**20
    """The largest body, and what a compressed one may grow to."""
    buffered_bytes: int = 2**30
    """Bodies held at once over all connections, as far as they have come; one more gets a 503."""
    header_bytes: int = 32 * 2**10
    """Request line and headers together."""
    header_count: int = 100
    pipelined: int = 16
    """Requests of one connection in work at once; then reading pauses."""
    header_s: float = 10.0
    """From a request's first byte to the end of its headers."""
    body_s: float = 10.0
    """Grace for a body, before ``body_rate`` counts."""
    body_rate: float = 16 * 2**10
    """The least bytes per second at which a body must come."""
    idle_s: float = 75.0
    """Keep-alive: longer than the 60 s after which usual proxies drop a connection, so that they close first."""
    write_s: float = 30.0
    """How long a client may leave an answer unread, or over HTTP/1.1 read it slower than ``body_rate``, once the
    socket's buffer is full."""
    linger_s: float = 2.0
    """How long to go on reading, and throwing away, after a refusal, so that the client gets to read it."""


def one_too_many(held: int, limits: Limits, transport: asyncio.BaseTransport) -> bool:
    """Say whether a new connection, beside ``held`` others, is over its transport's limits.

    Over TLS this is asked after the handshake, which is given ``header_s``.
    """
    if held >= limits.connections:
        return True
    taken = transport.get_extra_info("socket")
    return taken is not None and bool(taken.fileno() >= limits.descriptors)
