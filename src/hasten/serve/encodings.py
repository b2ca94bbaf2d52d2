"""gzip and deflate, both ways; what a body may grow to is bounded before it grows."""

from __future__ import annotations

import zlib
from collections.abc import Generator, Sequence

from hasten.errors import BadRequest, TooLarge
from hasten.serve.http1_request import Buffer
from hasten.serve.slices import at_once

WBITS: dict[bytes, int] = {b"gzip": 31, b"x-gzip": 31, b"deflate": 15}
"""Content encodings, and how zlib is told of each."""

LEVEL = 1
"""Tensors compress badly: more effort buys next to nothing."""

PIECE_BYTES = 256 * 2**10
"""What is decompressed at once: a millisecond."""

COMPRESSED_BYTES = 64 * 2**10
"""What is compressed at once: likewise."""

LEAST_BYTES = 1024
"""A smaller answer is one packet either way."""


def decompress(body: Buffer, encoding: bytes, *, limit_bytes: int) -> bytes:
    """Undo a content encoding, at once; see ``decompress_in_pieces``."""
    return at_once(decompress_in_pieces(body, encoding, limit_bytes=limit_bytes))


def decompress_in_pieces(body: Buffer, encoding: bytes, *, limit_bytes: int) -> Generator[None, None, bytes]:
    """Undo a content encoding; yields between pieces.

    Raises:
        BadRequest: the encoding is unknown, or the body is not what it says, or is cut short.
        TooLarge: it would grow over ``limit_bytes``; no more than a piece above that was made.
    """
    wbits = WBITS.get(encoding.strip().lower())
    if wbits is None:
        raise BadRequest(f"the content encoding {encoding.decode('latin-1')!r} is not known; use gzip or deflate")
    stream, left = zlib.decompressobj(wbits), memoryview(body)
    found, size = list[bytes](), 0
    while not stream.eof:
        given = stream.unconsumed_tail or left[:PIECE_BYTES]
        if not stream.unconsumed_tail:
            left = left[PIECE_BYTES:]
        try:
            piece = stream.decompress(given, PIECE_BYTES)
        except zlib.error as error:
            raise BadRequest(f"the body is no {encoding.decode('latin-1')}: {error}") from error
        if not piece and not len(given):
            break
        found.append(piece)
        size += len(piece)
        if size > limit_bytes:
            raise TooLarge(f"the body grows over {limit_bytes} bytes, the limit, when it is decompressed")
        yield
    if not stream.eof or stream.unused_data or len(left):
        raise BadRequest(f"the {encoding.decode('latin-1')} body is cut short, or something follows it")
    return b"".join(found)


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
    """Apply a content encoding to a body in parts, at once; see ``compress_in_pieces``."""
    return at_once(compress_in_pieces(parts, encoding))


def compress_in_pieces(parts: Sequence[Buffer], encoding: bytes) -> Generator[None, None, bytes]:
    """Apply a content encoding to a body in parts; yields between pieces."""
    stream, found = zlib.compressobj(LEVEL, zlib.DEFLATED, WBITS[encoding]), list[bytes]()
    for part in parts:
        for at in range(0, len(part), COMPRESSED_BYTES):
            found.append(stream.compress(memoryview(part)[at : at + COMPRESSED_BYTES]))
            yield
    return b"".join([*found, stream.flush()])


def _quality(text: bytes) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0
