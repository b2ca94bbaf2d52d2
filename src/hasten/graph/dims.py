"""Following shapes through the integer arithmetic that exporters write around Reshape and Expand."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from hasten.graph.model import Graph, attribute, is_standard
from hasten.tensors import Dim

LONGEST = 64
"""No shape has more entries: longer integer tensors are data."""


@dataclass(frozen=True)
class Known:
    """An integer tensor whose entries are numbers or names of symbolic dimensions, row by row."""

    entries: tuple[Dim, ...]
    scalar: bool = False
    """It has no axis."""
    lengths: tuple[int, ...] | None = None
    """Of its axes, where there are two or more: exporters turn pads about as a matrix."""

    @property
    def static(self) -> bool:
        """Every entry is a number."""
        return all(isinstance(entry, int) for entry in self.entries)


@dataclass(frozen=True)
class Shapes:
    """What is known of a graph's shapes: of tensors, and of integer tensors that hold shapes."""

    graph: Graph

    def of(self, name: str) -> tuple[Dim, ...] | None:
        """Give a tensor's shape, or None where its rank is unknown. A dimension without a name has one of its own."""
        spec = self.graph.specs.get(name)
        return None if spec is None else spec.shape

    def value(self, name: str) -> Known | None:
        """Give what is known of an integer tensor of at most one axis, or None."""
        found = self.tensor(name)
        return None if found is None or found.lengths is not None else found

    def tensor(self, name: str) -> Known | None:
        """Give what is known of an integer tensor's value, or None."""
        if name in self._computed:
            return self._computed[name]
        tensor = self.graph.initializers.get(name)
        if tensor is None or tensor.data_type not in _INTEGERS or len(tensor.dims) > 1:
            return None
        if tensor.dims and tensor.dims[0] > LONGEST:
            return None
        return _known(self.graph.constant(name))

    @cached_property
    def _computed(self) -> dict[str, Known]:
        found: dict[str, Known] = {}
        self.__dict__["_computed"] = found  # value() looks into it while it grows, in the order of the nodes
        for node in self.graph.nodes:
            if is_standard(node) and node.op_type in _RULES and len(node.output) == 1:
                value = _RULES[node.op_type](self, node)
                if value is not None and len(value.entries) <= LONGEST:
                    found[node.output[0]] = value
        return found


def _known(array: object) -> Known:
    return _known_array(np.asarray(array))


def _known_array(value: npt.NDArray[Any]) -> Known:
    entries = tuple(entry if isinstance(entry, str) else int(entry) for entry in value.reshape(-1))
    return Known(entries, scalar=value.ndim == 0, lengths=value.shape if value.ndim > 1 else None)


def _array(known: Known) -> npt.NDArray[np.object_]:
    value = np.empty(len(known.entries), object)
    value[:] = known.entries
    return value.reshape(() if known.scalar else known.lengths or (-1,))


def _shape(shapes: Shapes, node: onnx.NodeProto) -> Known | None:
    shape = shapes.of(node.input[0])
    if shape is None:
        return None
    start, end = attribute(node, "start", 0), attribute(node, "end", len(shape))
    return Known(shape[slice(start, end)])


def _size(shapes: Shapes, node: onnx.NodeProto) -> Known | None:
    shape = shapes.of(node.input[0])
    return None if shape is None else Known((_product(shape),), scalar=True)


def _gather(shapes: Shapes, node: onnx.NodeProto) -> Known | None:
    data, index = (shapes.value(name) for name in node.input)
    if data is None or index is None or data.scalar or not index.static:
        return None
    if not all(-len(data.entries) <= int(i) < len(data.entries) for i in index.entries):
        return None
    return Known(tuple(data.entries[int(i)] for i in index.entries), scalar=index.scalar)


def _slice(shapes: Shapes, node: onnx.NodeProto) -> Known | None:
    if len(node.input) < 3:
        return None
    data, starts = shapes.tensor(node.input[0]), shapes.value(node.input[1])
    if data is None or data.scalar or starts is None:
        return None
    absent = Known(tuple(range(len(starts.entries)))), Known((1,) * len(starts.entries))
    names = (*node.input[2:], "", "")[:3]
    bounds = [starts, *(shapes.value(n) if n else absent[i - 1] for i, n in enumerate(names))]
    if any(b is None or not b.static or len(b.entries) != len(starts.entries) for b in bounds):
        return None
    array = _array(data)
    cut = [slice(None)] * array.ndim
    for start, end, axis, step in zip(*([int(e) for e in b.entries] for b in bounds if b is not None), strict=True):
        if step == 0 or not -array.ndim <= axis < array.ndim:
            return None
        cut[axis] = slice(start, end, step)
    return _known_array(array[tuple(cut)])


def _concat(shapes: Shapes, node: onnx.NodeProto) -> Known | None:
    parts = [shapes.value(name) for name in node.input]
    if any(part is None or part.scalar for part in parts):
        return None
    return Known(tuple(entry for part in parts if part is not None for entry in part.entries))


def _same(shapes: Shapes, node: onnx.NodeProto) -> Known | None:
    return shapes.tensor(node.input[0])


def _cast(shapes: Shapes, node: onnx.NodeProto) -> Known | None:
    return shapes.tensor(node.input[0]) if attribute(node, "to") in _INTEGERS else None


def _transpose(shapes: Shapes, node: onnx.NodeProto) -> Known | None:
    value = shapes.tensor(node.input[0])
    return None if value is None else _known_array(_array(value).transpose(attribute(node, "perm")))


def _filled(shapes: Shapes, node: onnx.NodeProto) -> Known | None:
    shape, given = shapes.value(node.input[0]), attribute(node, "value")
    if shape is None or not shape.static or given is None or given.data_type not in _INTEGERS:
        return None
    lengths = [int(entry) for entry in shape.entries]
    if math.prod(lengths) > LONGEST:
        return None
    fill = int(numpy_helper.to_array(given).reshape(-1)[0])
    return _known_array(np.full(lengths, fill, object))


def _to_scalar(shapes: Shapes, node: onnx.NodeProto) -> Known | None:
    value = shapes.value(node.input[0])
    return None if value is None or len(value.entries) != 1 else Known(value.entries, scalar=True)


def _to_list(shapes: Shapes, node: onnx.NodeProto) -> Known | None:
    value = shapes.value(node.input[0])
    axes = attribute(node, "axes") if len(node.input) < 2 else shapes.graph.constant(node.input[1])
    one = axes is not None and np.size(axes) == 1
    return Known(value.entries) if one and value is not None and value.scalar else None


def _reshape(shapes: Shapes, node: onnx.NodeProto) -> Known | None:
    value, shape = shapes.tensor(node.input[0]), shapes.value(node.input[1])
    if value is None or shape is None or not shape.static or 0 in shape.entries:
        return None
    lengths = [int(entry) for entry in shape.entries]
    known = math.prod(length for length in lengths if length > 0)
    left = lengths.count(-1)
    if left > 1 or known * (len(value.entries) // known if left else 1) != len(value.entries):
        return None  # a defect of the model, which is not said here
    return _known_array(_array(value).reshape(lengths))


def _expand(shapes: Shapes, node: onnx.NodeProto) -> Known | None:
    value, shape = (shapes.value(name) for name in node.input)
    if value is None or shape is None or not shape.static or len(shape.entries) != 1 or len(value.entries) != 1:
        return None
    return Known(value.entries * int(shape.entries[0])) if 0 < int(shape.entries[0]) <= LONGEST else None


def _arithmetic(combine: Callable[[Dim, Dim], Dim | None]) -> Callable[[Shapes, onnx.NodeProto], Known | None]:
    def rule(shapes: Shapes, node: onnx.NodeProto) -> Known | None:
        a, b = (shapes.value(name) for name in node.input)
        if a is None or b is None:
            return None
        n = max(len(a.entries), len(b.entries))
        if n == 0 or any(len(x.entries) not in (1, n) for x in (a, b)):
            return None
        pairs = zip(a.entries * (n // len(a.entries)), b.entries * (n // len(b.entries)), strict=True)
        entries = [combine(x, y) for x, y in pairs]
        if any(entry is None for entry in entries):
            return None
        return Known(tuple(e for e in entries if e is not None), scalar=a.scalar and b.scalar)

    return rule


def _product(dims: tuple[Dim, ...]) -> Dim:
    numbers = int(np.prod([dim for dim in dims if isinstance(dim, int)], dtype=np.int64))
    names = sorted(dim for dim in dims if isinstance(dim, str))
    if not names or numbers == 0:
        return numbers
    return "*".join(([str(numbers)] if numbers != 1 else []) + names)


def _multiply(a: Dim, b: Dim) -> Dim | None:
    return _product((a, b))


def _add(a: Dim, b: Dim) -> Dim | None:
    if isinstance(a, int) and isinstance(b, int):
        return a + b
    return a if b == 0 else b if a == 0 else None


def _subtract(a: Dim, b: Dim) -> Dim | None:
    if isinstance(a, int) and isinstance(b, int):
        return a - b
    return 0 if a == b else a if b == 0 else None


def _divide(a: Dim, b: Dim) -> Dim | None:
    if isinstance(a, int) and isinstance(b, int):
        return (abs(a) // abs(b)) * (1 if (a < 0) == (b < 0) else -1) if b else None  # C's division, towards zero
    return a if b == 1 else None


_INTEGERS = (onnx.TensorProto.INT64, onnx.TensorProto.INT32)

_RULES: Mapping[str, Callable[[Shapes, onnx.NodeProto], Known | None]] = {
    "Shape": _shape,
    "Size": _size,
    "Gather": _gather,
    "Slice": _slice,
    "Concat": _concat,
    "Identity": _same,
    "Cast": _cast,
    "Transpose": _transpose,
    "ConstantOfShape": _filled,
    "Squeeze": _to_scalar,
    "Unsqueeze": _to_list,
    "Reshape": _reshape,
    "Expand": _expand,
    "Mul": _arithmetic(_multiply),
    "Add": _arithmetic(_add),
    "Sub": _arithmetic(_subtract),
    "Div": _arithmetic(_divide),
}
"""How each operator carries shapes on."""
