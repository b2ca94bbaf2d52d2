"""An HTTP/1.1 server: the connections of one event loop, and what they share. It knows nothing of models."""

from __future__ import annotations

from hasten.serve.doors import BufferedDoor
from hasten.serve.http1_connection import Common, Connection, date_line


class Http1Server(Common):
    """The connections of one event loop, their common bounds, and the route of their requests."""

    def protocol(self) -> BufferedDoor:
        """Make the protocol of one connection, for ``loop.create_server``."""
        return BufferedDoor(Connection(self))

    def tick(self) -> None:
        """Time out what is due, and read the date. Called every ``wheel.TICK_S``."""
        self.date = date_line()
        for connection in self.wheel.advance(self.clock_s()):
            connection.timed_out()

    def close_idle(self, *, fresh: bool = True) -> None:
        """Close every connection that waits for a request; with ``fresh``, also those that never had one."""
        for connection in list(self.connections):
            if fresh or not connection.fresh:
                connection.close_if_idle()

    def abort(self) -> None:
        """Cut every connection."""
        for connection in list(self.connections):
            connection.abort()
