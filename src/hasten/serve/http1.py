"""An HTTP/1.1 server: the connections of one event loop, and what they share. It knows nothing of models."""

from __future__ import annotations

from collections.abc import Callable
from email.utils import formatdate

from hasten.serve.cork import Cork
from hasten.serve.http1_connection import Connection, Route
from hasten.serve.http1_heads import Heads
from hasten.serve.http1_request import Request
from hasten.serve.limits import Limits
from hasten.serve.turns import Turns
from hasten.serve.wheel import Wheel

TICK_S = 0.5
SCRATCH_BYTES = 256 * 2**10


class Http1Server:
    """The connections of one event loop, their common bounds, and the route of their requests."""

    def __init__(
        self,
        route: Route,
        *,
        limits: Limits,
        clock_s: Callable[[], float],
        log: Callable[[Request], None] | None = None,
        cork: Cork | None = None,
        turns: Turns | None = None,
    ) -> None:
        self.route = route
        self.cork = cork or Cork()
        self.turns = turns or Turns()
        self.limits = limits
        self.clock_s = clock_s
        self.log = log
        self.connections: set[Connection] = set()
        self.wheel: Wheel[Connection] = Wheel(TICK_S, clock_s())
        self.scratch_bytes = bytearray(SCRATCH_BYTES)
        self.scratch = memoryview(self.scratch_bytes)
        self.heads: Heads = {}
        self.requests = 0
        self.buffered_bytes = 0
        self.date = _date()
        self.draining = False

    def protocol(self) -> Connection:
        """Make the protocol of one connection, for ``loop.create_server``."""
        return Connection(self)

    def tick(self) -> None:
        """Time out what is due, and read the date. Called every ``TICK_S``."""
        self.date = _date()
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


def _date() -> bytes:
    return f"Date: {formatdate(usegmt=True)}\r\n".encode()
