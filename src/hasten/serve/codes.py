"""What a server says of an error: its codes, and when to come again. The table is ``hasten.protocol.codes``."""

from __future__ import annotations

from hasten.errors import ModelNotReady, Overloaded, ServeError, ServerFault
from hasten.protocol.codes import CODES, Code

__all__ = ["CODES", "LONGEST_TEXT", "Code", "code_of", "retry_after_s"]

DEFECT = "the server has a defect; its log says more"
"""What a client is told of an exception that nobody expected."""

LONGEST_TEXT = 1000
"""Characters of an error that a client is told: a name of a megabyte in a request is no megabyte of answer."""


def code_of(error: ServeError) -> Code:
    """Give the codes of an error: those of its class, or of the nearest class above it."""
    return CODES.get(type(error)) or next(CODES[kind] for kind in type(error).__mro__ if kind in CODES)


def retry_after_s(error: ServeError) -> int | None:
    """Give the whole seconds after which to come again; None where that would not help."""
    if isinstance(error, Overloaded):
        return max(1, round(error.retry_after_s))
    return 1 if isinstance(error, (ModelNotReady, ServerFault)) else None
