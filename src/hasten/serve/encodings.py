"""gzip and deflate, both ways; what a body may grow to is bounded before it grows."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

from hasten.errors import BadRequest, TooLarge
from hasten.serve.http1_request import Buffer

WBITS: dict[bytes, int] = {b"gzip": 31, b"x-gzip": 31, b"deflate": 15}
"""Content encodings, and how zlib is told of each."""

LEVEL = 1
"""Tensors compress badly: more effort buys next to nothing."""

LEAST_BYTES = 1024
"""A smaller answer is one packet either way."""


def decompress(body: Buffer, encoding: bytes, *, limit_bytes: int) -> bytes:
    """Undo a content encoding.

    Raises:
        BadRequest: the encoding is unknown, or the body is not what it says, or is cut short.
        TooLarge: it would grow over ``limit_bytes``; no more than that was made.
    """
    wbits = WBITS.get(encoding.strip().lower())
    if wbits is None:
        raise BadRequest(f"the content encoding {encoding.decode('latin-1')!r} is not known; use gzip or deflate")
    stream = zlib.decompressobj(wbits)
    try:
        found = stream.decompress(body, limit_bytes + 1)
    except zlib.error as error:
        raise BadRequest(f"the body is no {encoding.decode('latin-1')}: {error}") from error
    if len(found) > limit_bytes:
        raise TooLarge(f"the body grows over {limit_bytes} bytes, the limit, when it is decompressed")
    if not stream.eof or stream.unused_data:
        raise BadRequest(f"the {encoding.decode('latin-1')} body is cut short, or something follows it")
    return found


def chosen(accepted: bytes) -> bytes | None:
    """Give the encoding to answer in, from the header Accept-Encoding; None: as it is."""
    found: dict[bytes, float] = {}
    for item in accepted.lower().split(b","):
        name, _, rest = item.partition(b";")
        quality = rest.strip().removeprefix(b"q=")
        found[name.strip()] = _quality(quality) if rest else 1.0
    best = max((b"gzip", b"deflate"), key=lambda name: found.get(name, 0.0))
    return best if found.get(best, 0.0) > 0 else None


def compress(parts: Sequence[Buffer], encoding: bytes) -> bytes:
    """Apply a content encoding to a body in parts."""
    stream = zlib.compressobj(LEVEL, zlib.DEFLATED, WBITS[encoding])
    return b"".join([*(stream.compress(part) for part in parts), stream.flush()])


def _quality(text: bytes) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0
