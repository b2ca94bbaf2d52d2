"""HTTP/2 for gRPC: the connections of one event loop, and what they share."""

from __future__ import annotations

from hasten.serve.doors import Door
from hasten.serve.http2_connection import Common, Connection


class Http2Server(Common):
    """The connections of one event loop, their bounds, and the routes of their calls."""

    def protocol(self) -> Door:
        """Make the protocol of one connection."""
        return Door(Connection(self))

    def tick(self) -> None:
        """Time out what is due."""
        for connection in self.wheel.advance(self.clock_s()):
            connection.timed_out()

    def drain(self) -> None:
        """Tell every client to open no more calls here; those it has are answered."""
        for connection in list(self.connections):
            connection.drain()

    def abort(self) -> None:
        """Cut every connection."""
        for connection in list(self.connections):
            connection.abort()
