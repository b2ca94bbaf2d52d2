"""What transports and the service tell of a request to whoever traces it. Nothing here knows a tracer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from hasten.errors import ServeError
from hasten.protocol.messages import InferRequest, InferResponse

if TYPE_CHECKING:
    from hasten.serve.ticket import Marks


class Trace(Protocol):
    """One request that is traced. All methods on the event loop's thread."""

    @property
    def header(self) -> bytes:
        """W3C's ``traceparent`` of the request's own span, for the answer."""

    def of(self, request: InferRequest) -> None:
        """The request was decoded: which model it asks for."""

    def end(self, marks: Marks, outcome: InferResponse | ServeError) -> None:
        """It was answered, or refused, or its client has left. Ending twice is fine."""


def end_trace(marks: Marks, outcome: InferResponse | ServeError) -> None:
    """End a request's trace, where it has one."""
    if marks.trace is not None:
        marks.trace.end(marks, outcome)


class Traces(Protocol):
    """Traces every request of a service."""

    def start(self, headers: Mapping[bytes, bytes], began_ns: int) -> Trace:
        """Begin a trace, or go on with the one that ``traceparent`` among the headers names."""

    def close(self) -> None:
        """Hand over what was noted. It may wait for whoever collects it, for some seconds."""
