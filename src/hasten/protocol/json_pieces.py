"""Requests and answers in JSON that are large, in pieces: who reads or writes them can see to others in between.

The lists of elements are cut out as in ``json_templates``, but nothing is kept: what is left is read each time, and
each list a piece at a time, up to a comma. What a request says, and what is wrong with it, is what
``rest.decode_request`` finds; what is written is what ``rest.encode_response`` writes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Final

import numpy as np

from hasten.errors import BadRequest
from hasten.protocol import json_tensors, rest
from hasten.protocol.json_templates import NUMBERS, Numbers, brackets, part
from hasten.protocol.messages import DATATYPES, InferRequest, InferResponse, ModelMetadata, Tensor
from hasten.protocol.shared_memory import REGION, Regions
from hasten.tensors import DTYPES, Array

PIECE_BYTES: Final = 128 * 2**10
"""Text that is read at once: about a millisecond."""

PIECE_ELEMENTS: Final = 8192
"""Numbers that are written at once: likewise."""

COUNTED_BYTES: Final = 2 * 2**20
"""Text whose commas are counted at once: likewise."""

LONGEST_HEAD_BYTES: Final = 64 * 2**10
"""What is left of a request without its elements may have this size; a longer one is read whole."""

ELEMENTS = NUMBERS + b"truefalsn"
"""What stands between brackets and commas: numbers, and the letters of true, false and null."""

BLANK = bytes.maketrans(b"[]", b"  ")

MISPLACED = re.compile(rb"\][ \t\r\n]*[^\]\[, \t\r\n]|[^\]\[, \t\r\n][ \t\r\n]*\[")
"""An element behind the end of a list, or before the begin of one."""


def decode_in_pieces(
    body: bytes, *, model: str, version: str | None, metadata: Callable[[], ModelMetadata], regions: Regions | None
) -> Generator[None, None, InferRequest]:
    """Read a request that is JSON alone; yields between pieces. See ``rest.decode_request``. Raises BadRequest."""
    numbers, parted = Numbers(), part(body)
    yield
    head, found = body, list[Array]()
    if parted is not None and len(parted.head) <= LONGEST_HEAD_BYTES:
        said = rest.said_of(parted.head)
        alike = len(said) == len(parted.parts) and b"\\" not in parted.head  # escaped, a key could hide from the cut
        numbers_only = all(body.find(b'"', start, end) < 0 for start, end, _ in parted.parts)  # else it was cut too far
        if alike and numbers_only and all(_in_pieces(datatype, data) for _, _, datatype, data in said):
            head = parted.head
            for (name, shape, datatype, _), place in zip(said, parted.parts, strict=True):
                found.append((yield from _elements(numbers, body, place, (name, datatype, shape))))
    return rest.decode_request(
        head,
        header_bytes=None,
        model=model,
        version=version,
        metadata=metadata,
        regions=regions,
        elements=found,
    )


def encode_in_pieces(
    response: InferResponse, request: InferRequest, *, regions: Regions | None
) -> Generator[None, None, tuple[list[bytes | memoryview], int | None]]:
    """Write an answer; yields between pieces. See ``rest.encode_response``. Raises BadRequest."""
    texts = dict[str, bytes]()
    is_binary, elsewhere = rest.binary_outputs(request), {o.name for o in request.outputs if REGION in o.parameters}
    for tensor in response.outputs:
        if not is_binary(tensor) and tensor.name not in elsewhere:
            texts[tensor.name] = yield from _text(tensor)
    return rest.encode_response(response, request, regions=regions, texts=texts)


def _text(tensor: Tensor) -> Generator[None, None, bytes]:
    flat, written = tensor.data.reshape(-1), list[bytes]()
    for at in range(0, max(flat.size, 1), PIECE_ELEMENTS):
        text = json_tensors.text(tensor.name, tensor.datatype, flat[at : at + PIECE_ELEMENTS])
        written.append(text[1:-1])
        yield
    return b"[%b]" % b",".join(written)


def _in_pieces(datatype: str, data: bytes) -> bool:
    """Say whether the elements of a tensor were cut out, and hold no commas of their own."""
    return data == b"[]" and datatype in DATATYPES and datatype not in ("BYTES", *json_tensors.BINARY_ONLY)


def _elements(
    numbers: Numbers, text: bytes, place: tuple[int, int, int], said: tuple[str, str, Sequence[int]]
) -> Generator[None, None, Array]:
    """Read one tensor from where it is in the text, with how deep its lists lie in each other."""
    start, end, depth = place
    name, datatype, shape = said
    count = json_tensors.count_of(name, shape)
    json_tensors.check_depth(name, depth, shape)
    commas = 0
    for at in range(start, end, COUNTED_BYTES):
        commas += text.count(b",", at, min(at + COUNTED_BYTES, end))
        yield
    if not count:  # lists of which none holds an element
        return json_tensors.decode(name, datatype, shape, memoryview(text)[start:end])
    if commas != count - 1:
        raise json_tensors.miscounted(name, commas + 1, shape)
    wanted, seen, deep = b"", 0, 0
    if depth > 1:
        opened = sum(math.prod(shape[:level]) for level in range(depth))
        if 2 * opened + commas > end - start:
            raise json_tensors.misnested(name, shape)
        wanted = brackets(tuple(shape))
    else:
        start, end = start + 1, end - 1
    made, filled = np.empty(count, DTYPES[DATATYPES[datatype]]), 0
    for at, cut in _pieces(text, start, end):
        piece, n = text[at:cut], text.count(b",", at, cut) + 1
        listed = b"[%b]" % piece
        if depth > 1:
            lists = piece.translate(None, ELEMENTS) + b"," * (cut < end)
            if not wanted.startswith(lists, seen):
                raise json_tensors.misnested(name, shape)
            seen += len(lists)
            before, deep = deep, deep + lists.count(b"[") - lists.count(b"]")
            listed = b"[" * before + piece + b"]" * deep
        data = numbers.flat(memoryview(listed), datatype)
        if data is None or len(data) != n:
            data = _one_by_one(piece, said, (filled, n), nested=depth > 1)
        made[filled : filled + n] = data
        filled += n
        yield
    if seen < len(wanted):
        raise json_tensors.misnested(name, shape)
    return made.reshape(shape)


def _one_by_one(piece: bytes, said: tuple[str, str, Sequence[int]], place: tuple[int, int], *, nested: bool) -> Array:
    """Read a piece that holds something else than numbers of the usual size, or say what is wrong with it."""
    (name, datatype, shape), (first, count) = said, place
    if nested:
        if MISPLACED.search(piece):
            raise json_tensors.misnested(name, shape)
        piece = piece.translate(BLANK)
    try:
        return json_tensors.decode(name, datatype, (count,), b"[%b]" % piece)
    except BadRequest as error:
        raise BadRequest(f"{error} (the piece of its data from element {first})") from error


def _pieces(text: bytes, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Give where pieces begin and end; the comma at the end of each but the last is in none."""
    while end - start > PIECE_BYTES:
        cut = text.find(b",", start + PIECE_BYTES, end)
        if cut < 0:
            break
        yield start, cut
        start = cut + 1
    yield start, end
