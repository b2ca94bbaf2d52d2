"""Following shapes through the integer arithmetic that exporters write around Reshape and Expand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import onnx

from hasten.graph.model import Graph, attribute, is_standard
from hasten.tensors import Dim

LONGEST = 64
"""No shape has more entries: longer integer tensors are data."""


@dataclass(frozen=True)
class Known:
    """An integer tensor of rank 0 or 1 whose entries are numbers or names of symbolic dimensions."""

    entries: tuple[Dim, ...]
    scalar: bool = False

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
    value = np.asarray(array)
    return Known(tuple(int(v) for v in value.reshape(-1)), scalar=value.ndim == 0)


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
    data, *bounds = (shapes.value(name) for name in node.input)
    if data is None or data.scalar or any(b is None or len(b.entries) != 1 or not b.static for b in bounds):
        return None
    start, end = (int(b.entries[0]) for b in bounds[:2] if b is not None)
    step = bounds[3] if len(bounds) > 3 else None
    return Known(data.entries[slice(start, end, int(step.entries[0]) if step else 1)]) if _positive(step) else None


def _positive(step: Known | None) -> bool:
    return step is None or int(step.entries[0]) > 0


def _concat(shapes: Shapes, node: onnx.NodeProto) -> Known | None:
    parts = [shapes.value(name) for name in node.input]
    if any(part is None or part.scalar for part in parts):
        return None
    return Known(tuple(entry for part in parts if part is not None for entry in part.entries))


def _same(shapes: Shapes, node: onnx.NodeProto) -> Known | None:
    return shapes.value(node.input[0])


def _cast(shapes: Shapes, node: onnx.NodeProto) -> Known | None:
    return shapes.value(node.input[0]) if attribute(node, "to") in _INTEGERS else None


def _to_scalar(shapes: Shapes, node: onnx.NodeProto) -> Known | None:
    value = shapes.value(node.input[0])
    return None if value is None or len(value.entries) != 1 else Known(value.entries, scalar=True)


def _to_list(shapes: Shapes, node: onnx.NodeProto) -> Known | None:
    value = shapes.value(node.input[0])
    return Known(value.entries) if value is not None and value.scalar else None


def _reshape(shapes: Shapes, node: onnx.NodeProto) -> Known | None:
    value, shape = (shapes.value(name) for name in node.input)
    if value is None or shape is None or not shape.static or len(shape.entries) > 1:
        return None
    if shape.entries in ((-1,), (len(value.entries),)):
        return Known(value.entries)
    return Known(value.entries, scalar=True) if not shape.entries and len(value.entries) == 1 else None


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
