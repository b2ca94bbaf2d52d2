"""What asyncio gets to see of a connection: the class that it asks for, and the connection's own methods.

Event loops look at the class of a protocol to see how it wants to be read. A connection that inherits from one of
theirs cannot be compiled to a struct (``docs/decisions/0010``), so it inherits from nothing and stands behind a
door. The door is not in the way of a read: what the loop calls is the connection's own.
"""

from __future__ import annotations

import asyncio
from typing import Protocol


class Connects(Protocol):
    """What a connection of either kind does."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client is there."""

    def connection_lost(self, exc: Exception | None) -> None:
        """It is gone."""

    def eof_received(self) -> bool:
        """It sends nothing more; True: the transport stays open."""

    def pause_writing(self) -> None:
        """It does not read what was written to it."""

    def resume_writing(self) -> None:
        """It reads again."""


class ReadsInto(Connects, Protocol):
    """A connection that says where what comes is to be put."""

    def get_buffer(self, sizehint: int) -> memoryview:
        """Give the place for the next read."""

    def buffer_updated(self, nbytes: int) -> None:
        """Take what was read there."""


class ReadsPieces(Connects, Protocol):
    """A connection that is given what came."""

    def data_received(self, data: bytes) -> None:
        """Take it."""


_COMMON = ("connection_lost", "connection_made", "eof_received", "pause_writing", "resume_writing")


class BufferedDoor(asyncio.BufferedProtocol):
    """The protocol of a connection that says where to read to."""

    __slots__ = (*_COMMON, "buffer_updated", "get_buffer")

    def __init__(self, connection: ReadsInto) -> None:
        for name in BufferedDoor.__slots__:
            setattr(self, name, getattr(connection, name))


class Door(asyncio.Protocol):
    """The protocol of a connection that is given what came."""

    __slots__ = (*_COMMON, "data_received")

    def __init__(self, connection: ReadsPieces) -> None:
        for name in Door.__slots__:
            setattr(self, name, getattr(connection, name))
