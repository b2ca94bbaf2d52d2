"""What a transport and a service say to each other of one request: the marks of its phases, and its end.

The life of a request: received, decoded, admitted to a queue, taken into a batch, prepared, inferred, finished,
encoded, sent. Each mark is written once, by whoever reaches it, in nanoseconds of ``time.perf_counter_ns``; the phases
are the differences of neighbouring marks, so they add up to the total by construction.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from hasten.errors import ServeError
from hasten.protocol.messages import InferRequest, InferResponse
from hasten.protocol.phases import PHASES

_TIMING = ", ".join(f"{name};dur=%.3f" for name in PHASES[:-1]) + ', rows;desc="%d", instance;desc="%d"'


class Marks:
    """The times of one request. ``ns[k]`` is when phase k began; 0: it was not reached."""

    __slots__ = ("instance", "ns", "rows")

    def __init__(self) -> None:
        self.ns = [0] * (len(PHASES) + 1)
        self.rows = 0
        """Of the batch that it ran in, padding included; of the last one where it was cut; 0: it did not run."""
        self.instance = 0
        """The number of the instance that ran it, from 0."""

    def phases_ns(self) -> dict[str, int]:
        """Give the length of every phase that ended; one that was skipped (its mark is missing) has length 0."""
        found, before = {}, self.ns[0]
        for name, at in zip(PHASES, self.ns[1:], strict=True):
            found[name] = max(at - before, 0) if at else 0
            before = at or before
        return found

    def timing(self) -> str:
        """Give what the header Server-Timing says: the phases up to the encoding, in milliseconds, and where it ran."""
        lengths = [ns / 1e6 for ns in self.phases_ns().values()]
        return _TIMING % (*lengths[:-1], self.rows, self.instance)


Done = Callable[[InferResponse | ServeError], None]
"""Called once, on the event loop's thread, with the answer or the reason that there is none."""


class Ticket(Protocol):
    """A request that was handed in."""

    def cancel(self) -> None:
        """The client has left: drop it if it still waits; its ``done`` is then not called any more. Idempotent."""


class Infers(Protocol):
    """The part of a service that a transport needs to pass a request on."""

    def submit(self, request: InferRequest, marks: Marks, done: Done) -> Ticket:
        """Take a request in, on the event loop's thread. Never blocks, never raises ``ServeError``: ``done`` gets it.

        ``marks.ns[0..2]`` are set by the transport (receive began, decode began, decoded); the service sets the rest
        up to the end of ``post`` (index 7); the transport sets the last two.
        """
