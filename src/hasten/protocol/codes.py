"""The one table of codes: what each ``ServeError`` is in HTTP and in gRPC, for servers and for clients.

The protocol leaves errors open; these are hasten's choices. A 500 or INTERNAL is a defect or a fault of the server.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from hasten.errors import (
    BadRequest,
    Cancelled,
    DeadlineExceeded,
    ModelNotFound,
    ModelNotReady,
    NoAnswer,
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
    NoAnswer: Code(http=502, grpc=14),  # UNAVAILABLE: a server behind this one does not answer
    ServeError: Code(http=500, grpc=13),  # INTERNAL
}


_BY_REASON: dict[str, type[ServeError]] = {kind.reason: kind for kind in CODES}
_BY_HTTP = {CODES[kind].http: kind for kind in reversed(CODES)}
_BY_GRPC = {CODES[kind].grpc: kind for kind in reversed(CODES)}
_AMBIGUOUS: dict[int, type[ServeError]] = {503: Overloaded, 403: NotAllowed, 429: Overloaded}
_AMBIGUOUS_GRPC: dict[int, type[ServeError]] = {14: NoAnswer, 8: Overloaded, 7: NotAllowed}
"""Without a reason. Over gRPC, 14 is also what the library says where nothing answered at all."""

_OF_SIZE = re.compile(r"message (after decompression |length )?(is )?(larger than|too large|exceeds (the )?max)", re.I)
"""What the libraries of gRPC say, with status 8 and no reason, of a message over a limit."""


@dataclass(frozen=True, kw_only=True)
class Said:
    """What a server said of a request that it refused."""

    text: str
    reason: str | None = None
    """Its word for it, where it has one."""
    retry_after_s: float | None = None


def error_of_http(status: int, said: Said) -> ServeError:
    """Give the error that a server's HTTP status stands for: by its reason, else by the status."""
    return _error(_AMBIGUOUS.get(status) or _BY_HTTP.get(status), 400 <= status < 500, said)


def error_of_grpc(status: int, said: Said) -> ServeError:
    """Give the error that a server's gRPC status stands for: by its reason, else by the status."""
    kind = _AMBIGUOUS_GRPC.get(status) or _BY_GRPC.get(status)
    if kind is NoAnswer and said.reason is not None:
        kind = Overloaded  # a server that gives a reason has answered: that of a bound
    if status == CODES[TooLarge].grpc and said.reason is None and _OF_SIZE.search(said.text):
        kind = TooLarge
    return _error(kind, False, said)


def _error(kind: type[ServeError] | None, ours: bool, said: Said) -> ServeError:
    kind = _BY_REASON.get(said.reason or "") or kind or (BadRequest if ours else ServeError)
    if kind is Overloaded:  # its reasons are several: which bound was met
        return Overloaded(
            said.text,
            reason=said.reason or Overloaded.reason,
            retry_after_s=1.0 if said.retry_after_s is None else said.retry_after_s,
        )
    return kind(said.text)
