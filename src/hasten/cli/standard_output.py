"""With ``--json`` standard output holds documents alone: what anything else prints goes to standard error meanwhile."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TextIO

_DOCUMENTS: ContextVar[TextIO | None] = ContextVar("_DOCUMENTS", default=None)


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """While the block runs, send what is printed, by the user's own code too, to standard error."""
    token = _DOCUMENTS.set(sys.stdout)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        _DOCUMENTS.reset(token)


def write_now(text: str) -> None:
    """Write to the true standard output at once, for a verb that answers while it goes on."""
    out = _DOCUMENTS.get() or sys.stdout
    out.write(text)
    out.flush()
