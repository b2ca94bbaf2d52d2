"""Finding a server once, and how many connections this process may open."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from hasten.client.values import Address
from hasten.errors import NoAnswer
from hasten.host import allow_files

T = TypeVar("T")

OPEN_S = 10.0
"""How long the first connection to a server may take."""

SPARE_FILES = 64
"""Descriptors that are left for everything else."""


@dataclass(frozen=True)
class Place:
    """Where a server is, as the name service said once."""

    host: str
    port: int
    family: int


async def find_places(address: Address, loop: asyncio.AbstractEventLoop) -> list[Place]:
    """Ask the name service, once for all connections; a name may have several addresses. Raises NoAnswer."""
    try:
        found = await loop.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise NoAnswer(f"{address.url} is not known: {error.strerror or error}") from error
    return [Place(str(where[0]), address.port, int(family)) for family, _, _, _, where in found]


async def first_reached(address: Address, loop: asyncio.AbstractEventLoop, reach: Callable[[Place], Awaitable[T]]) -> T:
    """Try a server's addresses in turn, and give what the first one that is reached gives.

    Raises:
        NoAnswer: the name is not known. OSError: none was reached within ``OPEN_S``; why the last one was not.
    """
    failed: OSError = ConnectionRefusedError()
    async with asyncio.timeout(OPEN_S):
        for place in await find_places(address, loop):
            try:
                return await reach(place)
            except OSError as error:
                failed = error
    raise failed


def connection_limit(wanted: int) -> int:
    """Allow this process as many files as it may have, and give how many connections that makes, up to ``wanted``."""
    return max(1, min(wanted, allow_files(wanted + SPARE_FILES) - SPARE_FILES))


def connect_failure(error: OSError) -> str:
    """Say in a few words why a connection could not be opened, the same for all addresses of a host."""
    if isinstance(error, TimeoutError) and not error.errno:
        return f"no connection within {OPEN_S:g} s"
    if isinstance(error, ConnectionRefusedError) or "refused" in str(error):
        return "nobody listens there (connection refused)"
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return "this machine has no more files for connections (EMFILE)"
    return " ".join((error.strerror or str(error) or type(error).__name__).split())[:200]
