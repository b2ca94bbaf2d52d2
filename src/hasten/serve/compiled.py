"""Whether the modules of a request's way were compiled (docs/decisions/0010): the same source, as machine code."""

from __future__ import annotations

from hasten.serve import batching


def is_compiled() -> bool:
    """Say whether this installation's server is machine code, and not run by the interpreter."""
    return not str(batching.__file__).endswith(".py")
