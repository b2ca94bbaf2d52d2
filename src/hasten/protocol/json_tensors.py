"""A tensor's elements as JSON: flat or nested, row-major, checked against shape and datatype before an array is made.

FP16 and BF16 never travel as JSON, and JSON has no NaN and no infinity: both are refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import msgspec
import numpy as np

from hasten.errors import BadRequest
from hasten.protocol.messages import DATATYPES
from hasten.tensors import DTYPES, Array

LARGEST_RANK = 32
LARGEST_COUNT = 2**48
"""Elements that a shape may claim; what is really there is bounded by the body."""

COUNTED_BYTES = 64 * 2**10
"""From this size on, elements are counted before they are made: a Python number takes sixteen times its text."""

BINARY_ONLY = ("FP16", "BF16")
_JSON = msgspec.json.Encoder()
_ELEMENT: dict[str, type] = {"BOOL": bool, "FP32": float, "FP64": float, "BYTES": str}
"""Python's type of an element; those not listed are whole numbers."""


def count_of(name: str, shape: Sequence[int]) -> int:
    """Give the elements of a shape.

    Raises:
        BadRequest: it has too many axes, a negative length, or claims more than any body holds.
    """
    if len(shape) > LARGEST_RANK:
        raise BadRequest(f"tensor {name!r} has {len(shape)} dimensions; {LARGEST_RANK} are the most")
    if any(length < 0 for length in shape):
        raise BadRequest(f"tensor {name!r} has shape {list(shape)}; no length may be negative")
    claimed = math.prod(length for length in shape if length)  # an empty tensor must not claim more either
    if claimed > LARGEST_COUNT:
        raise BadRequest(f"tensor {name!r} has shape {list(shape)}; the limit is {LARGEST_COUNT} elements")
    return math.prod(shape)


def check_datatype(name: str, datatype: str) -> None:
    """Check that a datatype is one of the protocol's. Raises BadRequest."""
    if datatype not in DATATYPES:
        raise BadRequest(f"tensor {name!r} has datatype {datatype[:40]!r}; known: {', '.join(DATATYPES)}")


def decode(name: str, datatype: str, shape: Sequence[int], data: bytes | memoryview) -> Array:
    """Read elements from JSON text into an array of ``shape``.

    Args:
        name: The tensor's, for messages.
        datatype: A key of ``DATATYPES``.
        shape: Its lengths.
        data: The JSON text of the elements.

    Raises:
        BadRequest: the elements do not fit datatype or shape.
    """
    count = count_of(name, shape)
    if datatype in BINARY_ONLY:
        raise BadRequest(f"tensor {name!r} is {datatype}, which JSON cannot carry; send it as binary data")
    depth = _depth(data)
    check_depth(name, depth, shape)
    if len(data) > COUNTED_BYTES and datatype != "BYTES":  # text may hold commas of its own
        _check_commas(name, shape, data)
    try:
        values = _decoder(_ELEMENT.get(datatype, int), depth).decode(data)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise BadRequest(f"the data of tensor {name!r} is not {datatype}: {error}") from error
    if depth > 1:
        values = _flat(name, values, shape)
    if len(values) != count:
        raise miscounted(name, len(values), shape)
    return _array(name, datatype, values).reshape(shape)


def check_depth(name: str, depth: int, shape: Sequence[int]) -> None:
    """Check how deep lists lie in each other: they are flat, or nested as their shape. Raises BadRequest."""
    if depth == 0 or depth not in (1, len(shape)):
        raise BadRequest(f"tensor {name!r} has data nested {depth} deep, and shape {list(shape)}")


def miscounted(name: str, count: int, shape: Sequence[int]) -> BadRequest:
    """Give the error of data that has too many elements, or too few."""
    return BadRequest(f"tensor {name!r} has {count} elements; shape {list(shape)} wants {math.prod(shape)}")


def misnested(name: str, shape: Sequence[int]) -> BadRequest:
    """Give the error of lists that lie in each other otherwise than the shape says."""
    return BadRequest(f"the data of tensor {name!r} is not nested as its shape {list(shape)} says")


def encode(name: str, datatype: str, array: Array) -> list[Any]:
    """Give an array's elements, flat, as JSON can hold them.

    Raises:
        BadRequest: JSON cannot hold them; the client is told to ask for binary data.
    """
    if datatype in BINARY_ONLY:
        raise BadRequest(f"output {name!r} is {datatype}, which JSON cannot carry; ask for it as binary data")
    flat: list[Any] = array.ravel().tolist()
    if datatype in ("FP32", "FP64") and not np.isfinite(array).all():
        raise BadRequest(f"output {name!r} holds NaN or infinity, which JSON cannot carry; ask for it as binary data")
    if datatype != "BYTES":
        return flat
    try:
        return [item.decode() for item in flat]
    except UnicodeDecodeError as error:
        raise BadRequest(f"output {name!r} is no UTF-8 text; ask for it as binary data: {error}") from error


def text(name: str, datatype: str, array: Array) -> bytes:
    """Write an array's elements as JSON, flat; see ``encode``. Raises BadRequest."""
    return _JSON.encode(encode(name, datatype, array))


def _array(name: str, datatype: str, values: list[Any]) -> Array:
    """Make a flat array of decoded elements."""
    if datatype == "BYTES":
        held = np.empty(len(values), object)
        held[:] = [item.encode() for item in values]
        return held
    try:
        with np.errstate(over="ignore"):
            made = np.array(values, DTYPES[DATATYPES[datatype]])
    except OverflowError as error:
        raise BadRequest(f"the data of tensor {name!r} is out of the range of {datatype}: {error}") from error
    if datatype in ("FP32", "FP64") and not np.isfinite(made).all():
        raise BadRequest(f"the data of tensor {name!r} is out of the range of {datatype}")
    return made


def _check_commas(name: str, shape: Sequence[int], data: bytes | memoryview) -> None:
    """Refuse what has more commas than elements, however it is nested. Raises BadRequest."""
    most = math.prod(length for length in shape if length)  # of lists too, where there are no elements
    commas = bytes(data).count(b",")
    if commas >= most:
        raise BadRequest(f"tensor {name!r} has {commas + 1} elements or more; shape {list(shape)} wants {most}")


def _depth(data: bytes | memoryview) -> int:
    """Count the brackets that JSON text begins with."""
    depth = 0
    for char in bytes(data[: 4 * LARGEST_RANK]):
        if char == ord("["):
            depth += 1
        elif char not in b" \t\r\n":
            break
    return depth


def _flat(name: str, values: list[Any], shape: Sequence[int]) -> list[Any]:
    """Flatten nested lists. Lists of level k have the length of axis k.

    Raises:
        BadRequest: one has another length.
    """
    level = [values]
    for length in shape[:-1]:
        if any(len(item) != length for item in level):
            raise misnested(name, shape)
        level = [inner for item in level for inner in item]
    if any(len(item) != shape[-1] for item in level):
        raise misnested(name, shape)
    return [value for item in level for value in item]


@lru_cache(maxsize=256)
def _decoder(element: type, depth: int) -> msgspec.json.Decoder[list[Any]]:
    kind: Any = element
    for _ in range(depth):
        kind = list[kind]
    return msgspec.json.Decoder(kind)
