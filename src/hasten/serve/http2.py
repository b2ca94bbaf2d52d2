"""HTTP/2 for gRPC: the connections of one event loop, and what they share."""

from __future__ import annotations

from collections.abc import Callable

from hasten.serve.cork import Cork
from hasten.serve.http2_connection import Connection, Route
from hasten.serve.http2_stream import Call
from hasten.serve.limits import Limits
from hasten.serve.turns import Turns
from hasten.serve.wheel import Wheel


class Http2Server:
    """The connections of one event loop, their bounds, and the routes of their calls.

    ``opened`` is called with each call once its headers are there, and may set ``on_message``; ``route`` with each
    unary call once its message is there; ``log`` with each call that was answered, and who had sent it.
    """

    def __init__(
        self,
        *,
        opened: Route,
        route: Route,
        limits: Limits,
        clock_s: Callable[[], float],
        cork: Cork | None = None,
        turns: Turns | None = None,
        log: Callable[[Call, str], None] | None = None,
    ) -> None:
        self.cork = cork or Cork()
        self.turns = turns or Turns()
        self.log = log
        self.opened = opened
        self.route = route
        self.limits = limits
        self.clock_s = clock_s
        self.connections: set[Connection] = set()
        self.wheel: Wheel[Connection] = Wheel(0.5, clock_s())
        self.calls = 0
        self.buffered_bytes = 0

    def protocol(self) -> Connection:
        """Make the protocol of one connection."""
        return Connection(self)

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
