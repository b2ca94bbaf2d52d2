"""JSON requests whose text but for the tensors' elements was read before: the elements are parsed by simdjson.

Most of a JSON request is numbers. They are cut out, what is left is looked up by its bytes, and simdjson (Langdale and
Lemire 2019, arXiv:1902.08318) reads each tensor's into an array, with no Python number made. An array may stand in for
another wherever JSON allows one, so that what was read of the rest holds for the same bytes. Whatever is unusual, or
wrong, is None here, and ``rest.decode_request`` reads it anew: it alone says what is wrong.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from hasten.protocol.json_tensors import COUNTED_BYTES
from hasten.protocol.messages import DATATYPES, InferRequest, Parameters, Tensor
from hasten.tensors import DTYPES, Array

try:
    import simdjson
except ImportError:  # not everyone who speaks the protocol serves: a client has no use for it
    simdjson = None  # type: ignore[assignment]

MARK = b'"data"'
OPENS = re.compile(rb"[ \t\r\n]*:[ \t\r\n]*(\[+)")
MOST_PARTS = 64
"""Tensors that are cut out of a request; more are read anew."""

LARGEST_KEPT_BYTES = 1 << 20
"""A parser keeps room for the longest text that it has read; longer ones have one of their own."""

LARGEST_NESTED = 1 << 16
"""Elements of a nested tensor, at most, whose brackets are compared with what its shape wants."""

NUMBERS = b"0123456789+-.eE \t\r\n"
_INTEGERS = frozenset(name for name in DATATYPES if name.startswith(("INT", "UINT")))
_FLOATS = frozenset(("FP32", "FP64"))


@dataclass(frozen=True, slots=True)
class Parted:
    """A body in two: the text without elements, each list of them as ``[]``; and where each was, and how deep."""

    head: bytes
    parts: tuple[tuple[int, int, int], ...]
    """Begin, end, and the brackets that it begins with."""


@dataclass(frozen=True, slots=True)
class Slot:
    """What the head says of one tensor."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    parameters: Parameters


def part(body: bytes) -> Parted | None:
    """Cut the lists of elements out of a body; None where it does not have the usual form."""
    pieces: list[bytes] = []
    parts: list[tuple[int, int, int]] = []
    at = looked = 0
    while (found := body.find(MARK, looked)) >= 0:
        looked = found + len(MARK)
        opens = OPENS.match(body, looked)
        if opens is None:
            continue  # a value that is the word itself
        start, depth = opens.start(1), opens.end(1) - opens.start(1)
        closes = body.find(b"]" * depth, opens.end())
        if closes < 0 or len(parts) == MOST_PARTS:
            return None
        pieces.append(body[at:start])
        at = looked = closes + depth
        parts.append((start, at, depth))
    pieces.append(body[at:])
    return Parted(b"[]".join(pieces), tuple(parts)) if parts else None


def slots_of(request: InferRequest, said: Sequence[tuple[str, Sequence[int], str, bytes]]) -> tuple[Slot, ...] | None:
    """Give the slots of a request that was read; ``said`` is what its head says without elements, a row a tensor.

    None where elements are more than numbers, or are not in the text alone.
    """
    if simdjson is None or len(said) != len(request.inputs):
        return None
    found = []
    for (name, shape, datatype, data), tensor in zip(said, request.inputs, strict=True):
        numbers = datatype in _FLOATS or datatype in _INTEGERS
        if data != b"[]" or not numbers or (name, tuple(shape)) != (tensor.name, tensor.data.shape):
            return None
        found.append(Slot(name, datatype, tuple(shape), tensor.parameters))
    return tuple(found)


class Numbers:
    """Reads elements. On one thread."""

    def __init__(self) -> None:
        self._parser: Any = None if simdjson is None else simdjson.Parser()

    def tensors(self, body: bytes, parted: Parted, slots: Sequence[Slot]) -> tuple[Tensor, ...] | None:
        """Read every tensor; None where one has to be looked at by ``rest.decode_request``."""
        found, view = [], memoryview(body)
        for slot, (start, end, depth) in zip(slots, parted.parts, strict=True):
            data = self._array(slot, view[start:end], depth)
            if data is None:
                return None
            found.append(Tensor(name=slot.name, datatype=slot.datatype, data=data, parameters=slot.parameters))
        return tuple(found)

    def _array(self, slot: Slot, text: memoryview, depth: int) -> Array | None:
        count = math.prod(slot.shape)
        if len(text) > COUNTED_BYTES and bytes(text).count(b",") >= max(count, 1):
            return None  # elements are counted before they are made
        if depth > 1 and not _nested(bytes(text), slot.shape, depth):
            return None
        data = self.flat(text, slot.datatype)
        return data.reshape(slot.shape) if data is not None and len(data) == count else None

    def flat(self, text: memoryview, datatype: str) -> Array | None:
        """Read one list of numbers; None where it is something else, or does not fit the datatype."""
        if datatype in _INTEGERS:
            return self._integers(text, DTYPES[DATATYPES[datatype]])
        return self._floats(text, DTYPES[DATATYPES[datatype]]) if datatype in _FLOATS else None

    def _floats(self, text: memoryview, dtype: np.dtype[np.generic]) -> Array | None:
        given = self._buffer(text, "d")
        if given is None:
            return None
        with np.errstate(over="ignore"):
            data = np.frombuffer(given, np.float64).astype(dtype)
        return data if np.isfinite(data).all() else None

    def _integers(self, text: memoryview, dtype: np.dtype[np.generic]) -> Array | None:
        given = self._buffer(text, "i")
        if given is None:
            return None
        whole, kind = np.frombuffer(given, np.int64), np.iinfo(dtype.name)
        fits = not whole.size or (int(whole.min()) >= kind.min and int(whole.max()) <= kind.max)
        return whole.astype(dtype) if fits else None

    def _buffer(self, text: memoryview, kind: Literal["d", "i"]) -> bytes | None:
        parser = self._parser if len(text) <= LARGEST_KEPT_BYTES else simdjson.Parser()
        try:
            listed = parser.parse(text)
            return listed.as_buffer(of_type=kind) if isinstance(listed, simdjson.Array) else None
        except (ValueError, TypeError, RuntimeError):  # no JSON, no numbers, or too large for 64 bits
            return None


def _nested(text: bytes, shape: tuple[int, ...], depth: int) -> bool:
    """Tell whether lists lie in each other as the shape says."""
    if depth != len(shape) or math.prod(length for length in shape if length) > LARGEST_NESTED:
        return False
    return text.translate(None, NUMBERS) == _brackets(shape)


def brackets(shape: tuple[int, ...]) -> bytes:
    """Write what is left of nested lists without their numbers."""
    found = b""
    for length in reversed(shape):  # copied, not joined: a list of as many references would be as large as the text
        found = b"[" + (found + b",") * (length - 1) + found + b"]" if length else b"[]"
    return found


_brackets = lru_cache(maxsize=32)(brackets)
