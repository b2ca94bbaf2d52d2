"""Tensors that checks send and read: made from a model's metadata, written and read with ``struct`` and ``json``."""

from __future__ import annotations

import math
import random
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hasten.conformance.wire import NotMet, met, typed

FORMATS = {
    "BOOL": "?",
    "UINT8": "B",
    "UINT16": "H",
    "UINT32": "I",
    "UINT64": "Q",
    "INT8": "b",
    "INT16": "h",
    "INT32": "i",
    "INT64": "q",
    "FP16": "e",
    "FP32": "f",
    "FP64": "d",
}
"""Datatypes of a fixed size, and how ``struct`` writes one element."""

NO_JSON = ("FP16", "BF16")
DATATYPES = (*FORMATS, "BF16", "BYTES")
CONTENTS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
"""The field of ``InferTensorContents`` for each datatype that has one."""

LARGEST_ELEMENTS = 2**22
"""Of an input that is made: a model that wants more is not asked."""


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A tensor as metadata has it; -1 is any length."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """A tensor with its elements, flat and in row-major order: bool, int, float, or bytes for BYTES."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    values: tuple[Any, ...]

    def json(self, *, nested: bool = False) -> dict[str, Any]:
        """Give it as an input of a JSON request."""
        flat = [value.decode() if isinstance(value, bytes) else value for value in self.values]
        data = _nested(flat, self.shape) if nested else flat
        return {"name": self.name, "shape": list(self.shape), "datatype": self.datatype, "data": data}

    def raw(self) -> bytes:
        """Give its elements as bytes: little-endian, BYTES with a length of 4 bytes each."""
        if self.datatype == "BYTES":
            return b"".join(struct.pack("<I", len(value)) + value for value in self.values)
        if self.datatype == "BF16":
            return b"".join(struct.pack("<f", value)[2:] for value in self.values)
        return struct.pack(f"<{len(self.values)}{FORMATS[self.datatype]}", *self.values)


def tensors(specs: Sequence[Spec], rows: int, *, fill: str = "zeros") -> tuple[Tensor, ...]:
    """Make inputs: a first axis of any length gets ``rows``, other such axes 1.

    ``fill`` is "zeros", "ones" or "random" (seeded; small non-negative whole numbers where the type is whole).

    Raises:
        NotMet: the metadata has an unknown datatype, or a negative length other than -1.
    """
    made = []
    for spec in specs:
        met(spec.datatype in DATATYPES, f"input {spec.name!r} has the datatype {spec.datatype!r}, which nobody knows")
        met(all(n >= -1 for n in spec.shape), f"input {spec.name!r} has the shape {list(spec.shape)}")
        shape = tuple((rows if axis == 0 else 1) if n == -1 else n for axis, n in enumerate(spec.shape))
        met(math.prod(shape) <= LARGEST_ELEMENTS, f"input {spec.name!r} has {list(shape)}: too many elements to make")
        draw = random.Random(7)  # noqa: S311 - for reproducible inputs
        values = tuple(_value(spec.datatype, fill, draw) for _ in range(math.prod(shape)))
        made.append(Tensor(name=spec.name, datatype=spec.datatype, shape=shape, values=values))
    return tuple(made)


def fits(shape: Sequence[int], spec: Spec) -> bool:
    """Say whether a tensor's shape is one that metadata promises."""
    return len(shape) == len(spec.shape) and all(
        wanted in (-1, length) for length, wanted in zip(shape, spec.shape, strict=True)
    )


def unpacked(name: str, datatype: str, shape: Sequence[int], data: bytes) -> tuple[Any, ...]:
    """Read elements from bytes. Raises NotMet: there are more or fewer bytes than the shape says."""
    count = math.prod(shape)
    if datatype == "BYTES":
        return _unpacked_bytes(name, count, data)
    met(datatype in DATATYPES, f"output {name!r} has the datatype {datatype!r}, which nobody knows")
    size = 2 if datatype == "BF16" else struct.calcsize(f"<{FORMATS[datatype]}")
    met(
        len(data) == size * count,
        f"output {name!r} has {len(data)} bytes; {datatype} {list(shape)} has {size * count}",
    )
    if datatype == "BF16":
        return tuple(struct.unpack("<f", b"\0\0" + data[at : at + 2])[0] for at in range(0, len(data), 2))
    return struct.unpack(f"<{count}{FORMATS[datatype]}", data)


def flat(name: str, datatype: str, shape: Sequence[int], data: Any) -> tuple[Any, ...]:
    """Read elements from JSON, flat or nested. Raises NotMet: too many or few, or of another type."""
    values = list[Any]()
    _flatten(typed(data, list, f"data of output {name!r}"), values)
    count = math.prod(shape)
    met(len(values) == count, f"output {name!r} has {len(values)} elements; its shape {list(shape)} has {count}")
    kind = _JSON_KINDS.get(datatype, (int, float))
    for value in values:
        right = isinstance(value, kind) and (datatype == "BOOL" or not isinstance(value, bool))
        met(right, f"output {name!r} is {datatype}, and holds {value!r}")
    return tuple(value.encode() if isinstance(value, str) else value for value in values)


def same(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """Say whether two tensors hold the same, up to what rounding in JSON and summing in another order may do."""
    return len(one) == len(other) and all(
        math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-5)
        if isinstance(a, float) and isinstance(b, (int, float))
        else a == b
        for a, b in zip(one, other, strict=True)
    )


_JSON_KINDS: dict[str, tuple[type, ...]] = {
    "BOOL": (bool,),
    "BYTES": (str,),
    "FP32": (int, float),
    "FP64": (int, float),
    **{name: (int,) for name in FORMATS if name.startswith(("INT", "UINT"))},
}


def _value(datatype: str, fill: str, draw: random.Random) -> Any:
    number = {"zeros": 0.0, "ones": 1.0}.get(fill)
    if number is None:
        number = draw.random() if datatype.startswith(("FP", "BF")) else draw.randrange(3)
    if datatype == "BYTES":
        return str(int(number)).encode()
    if datatype == "BOOL":
        return bool(int(number))
    return float(number) if datatype.startswith(("FP", "BF")) else int(number)


def _nested(flat_values: list[Any], shape: Sequence[int]) -> Any:
    if not shape:
        return flat_values
    if len(shape) == 1:
        return flat_values
    step = math.prod(shape[1:])
    return [_nested(flat_values[at * step : (at + 1) * step], shape[1:]) for at in range(shape[0])]


def _flatten(data: list[Any], into: list[Any]) -> None:
    for item in data:
        if isinstance(item, list):
            _flatten(item, into)
        else:
            into.append(item)


def _unpacked_bytes(name: str, count: int, data: bytes) -> tuple[bytes, ...]:
    found, at = list[bytes](), 0
    while at < len(data):
        if at + 4 > len(data) or at + 4 + (size := struct.unpack_from("<I", data, at)[0]) > len(data):
            raise NotMet(f"output {name!r} ends within its element {len(found)}")
        found.append(data[at + 4 : at + 4 + size])
        at += 4 + size
    met(len(found) == count, f"output {name!r} has {len(found)} elements; its shape has {count}")
    return tuple(found)
