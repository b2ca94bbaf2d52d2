"""The one table of codes: what each ``ServeError`` is in HTTP and in gRPC.

The protocol leaves errors open; these are hasten's choices. A 500 or INTERNAL is a defect or a fault of ours.
"""

from __future__ import annotations

from dataclasses import dataclass

from hasten.errors import (
    BadRequest,
    Cancelled,
    DeadlineExceeded,
    ModelNotFound,
    ModelNotReady,
    NotAllowed,
    Overloaded,
    ServeError,
    ServerFault,
    TooLarge,
)


@dataclass(frozen=True, kw_only=True)
class Code:
    """A class of errors as each protocol says it: an HTTP status, and a gRPC status by number."""

    http: int
    grpc: int


CODES: dict[type[ServeError], Code] = {
    BadRequest: Code(http=400, grpc=3),  # INVALID_ARGUMENT
    TooLarge: Code(http=413, grpc=8),  # RESOURCE_EXHAUSTED
    NotAllowed: Code(http=401, grpc=16),  # UNAUTHENTICATED
    ModelNotFound: Code(http=404, grpc=5),  # NOT_FOUND
    ModelNotReady: Code(http=503, grpc=14),  # UNAVAILABLE
    Overloaded: Code(http=503, grpc=14),  # UNAVAILABLE: another replica may have room
    DeadlineExceeded: Code(http=504, grpc=4),  # DEADLINE_EXCEEDED
    Cancelled: Code(http=499, grpc=1),  # CANCELLED
    ServerFault: Code(http=503, grpc=14),  # UNAVAILABLE: a worker died, another has taken its place
    ServeError: Code(http=500, grpc=13),  # INTERNAL
}


def code_of(error: ServeError) -> Code:
    """Give the codes of an error: those of its class, or of the nearest class above it."""
    return next(CODES[kind] for kind in type(error).__mro__ if kind in CODES)


def retry_after_s(error: ServeError) -> int | None:
    """Give the whole seconds after which to come again; None where that would not help."""
    if isinstance(error, Overloaded):
        return max(1, round(error.retry_after_s))
    return 1 if isinstance(error, (ModelNotReady, ServerFault)) else None
