"""Rules of ``fold`` that drop nodes which change nothing, and merge those that move data twice."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx

from hasten.graph.dims import Shapes
from hasten.graph.model import Graph, attribute, is_standard
from hasten.graph.rewrite import Edit
from hasten.tensors import DTYPES, Dim

WIDENS: Mapping[str, tuple[str, ...]] = {
    "float16": ("float32", "float64"),
    "bfloat16": ("float32", "float64"),
    "float32": ("float64",),
    "int8": ("int16", "int32", "int64"),
    "uint8": ("uint16", "uint32", "uint64", "int16", "int32", "int64"),
    "int32": ("int64",),
}
"""The dtypes that hold every value of another: a cast there and back is a no-op."""

FOREVER = 2**31 - 1
"""Exporters write an end of a Slice at least this large for "to the end"."""


def drop_noops(model: onnx.ModelProto) -> int:
    """Drop each node that gives back its first input as it is. Gives the number of changes.

    Identity, Dropout, Cast to the same dtype, Reshape and Expand to the same shape, Transpose in order, Pad by nothing,
    whole Slice, Concat and Sum of one, Clip without bounds, and arithmetic with 0 or 1.
    """
    graph = Graph(model)
    shapes = Shapes(graph)
    edit = Edit(graph)
    for node in graph.nodes:
        test = _NOOPS.get(node.op_type)
        if is_standard(node) and test and test(graph, shapes, node) and not _has_users(graph, node.output[1:]):
            edit.bypass(node)
    return edit.commit()


def settle_casts(model: onnx.ModelProto) -> int:
    """Make each CastLike a Cast, and a Cast of a widening Cast one. Gives the number of changes."""
    graph = Graph(model)
    edit = Edit(graph)
    for node in graph.nodes:
        if not is_standard(node):
            continue
        if node.op_type == "CastLike" and (dtype := graph.dtypes.get(node.input[1])) in DTYPES:
            to = onnx.helper.np_dtype_to_tensor_dtype(DTYPES[dtype])
            edit.replace(node, edit.make("Cast", node.input[:1], node.output[0], to=to))
        elif node.op_type == "Cast" and (source := _widened_from(graph, node.input[0])):
            edit.replace(node, edit.make("Cast", [source], node.output[0], to=attribute(node, "to")))
    return edit.commit()


def merge_moves(model: onnx.ModelProto) -> int:
    """Merge Transpose of Transpose, Reshape of Reshape, and Reshape-Transpose-Reshape where it swaps two axes.

    Gives the number of changes.
    """
    graph = Graph(model)
    shapes = Shapes(graph)
    edit = Edit(graph)
    for node in graph.nodes:
        if node.op_type in _MERGES and is_standard(node):
            merged = _MERGES[node.op_type](graph, shapes, edit, node)
            if merged is not None:
                edit.replace(node, merged)
    return edit.commit()


def drop_expands(model: onnx.ModelProto) -> int:
    """Drop each Expand whose only user would broadcast anyway to the shape of its other inputs. Gives the changes."""
    graph = Graph(model)
    shapes = Shapes(graph)
    edit = Edit(graph)
    for node in graph.nodes:
        if not is_standard(node) or node.op_type != "Expand":
            continue
        user = graph.only_consumer(node.output[0])
        if user is None or not is_standard(user) or user.op_type not in BROADCASTING:
            continue
        target = shapes.value(node.input[1])
        others = [shapes.of(name) for name in user.input if name != node.output[0]]
        if target is not None and any(other == target.entries for other in others):
            edit.bypass(node)
    return edit.commit()


BROADCASTING = frozenset(
    ("Add", "Sub", "Mul", "Div", "Where", "Pow", "Equal", "Less", "Greater", "And", "Or", "Max", "Min")
)
"""Operators that broadcast their inputs to one shape, as NumPy does."""


def _has_users(graph: Graph, names: Sequence[str]) -> bool:
    return any(name and (name in graph.consumers or name in graph.outputs) for name in names)


def _widened_from(graph: Graph, name: str) -> str | None:
    first = graph.producer(name, "Cast")
    if first is None:
        return None
    source, middle = graph.dtypes.get(first.input[0]), graph.dtypes.get(name)
    return first.input[0] if source and middle in WIDENS.get(source, ()) else None


def _always(graph: Graph, shapes: Shapes, node: onnx.NodeProto) -> bool:
    return True


def _one_input(graph: Graph, shapes: Shapes, node: onnx.NodeProto) -> bool:
    return len([name for name in node.input if name]) == 1


def _inference(graph: Graph, shapes: Shapes, node: onnx.NodeProto) -> bool:
    if len(node.input) < 3 or not node.input[2]:
        return graph.opset >= 7
    training = graph.constant(node.input[2])
    return training is not None and not training.any()


def _same_dtype(graph: Graph, shapes: Shapes, node: onnx.NodeProto) -> bool:
    before, after = graph.dtypes.get(node.input[0]), graph.dtypes.get(node.output[0])
    return before is not None and before == after


def _same_shape(graph: Graph, shapes: Shapes, node: onnx.NodeProto) -> bool:
    before, after = shapes.of(node.input[0]), shapes.of(node.output[0])
    return before is not None and before == after


def _kept_dims(graph: Graph, shapes: Shapes, node: onnx.NodeProto) -> bool:
    """A Reshape that says 0 (keep) for each axis, or for all but one."""
    wanted, before = shapes.value(node.input[1]), shapes.of(node.input[0])
    if wanted is None or before is None or len(before) != len(wanted.entries) or attribute(node, "allowzero", 0):
        return _same_shape(graph, shapes, node)
    pairs = list(zip(wanted.entries, before, strict=True))
    others = [(entry, dim) for entry, dim in pairs if entry not in (0, dim)]
    return not others or (len(others) == 1 and others[0][0] == -1 and 0 not in before)


def _covered(graph: Graph, shapes: Shapes, node: onnx.NodeProto) -> bool:
    """An Expand to lengths that the input has, or to 1."""
    wanted, before = shapes.value(node.input[1]), shapes.of(node.input[0])
    if wanted is None or before is None or len(wanted.entries) > len(before):
        return False
    tail = before[len(before) - len(wanted.entries) :]
    return all(entry in (1, dim) for entry, dim in zip(wanted.entries, tail, strict=True))


def _in_order(graph: Graph, shapes: Shapes, node: onnx.NodeProto) -> bool:
    perm = attribute(node, "perm")
    return perm is not None and perm == list(range(len(perm)))


def _no_padding(graph: Graph, shapes: Shapes, node: onnx.NodeProto) -> bool:
    pads = attribute(node, "pads") if len(node.input) < 2 else graph.constant(node.input[1])
    return pads is not None and not np.any(np.asarray(pads))


def _whole(graph: Graph, shapes: Shapes, node: onnx.NodeProto) -> bool:
    if len(node.input) < 3:
        return False
    start, end = (graph.constant(name) for name in node.input[1:3])
    step = graph.constant(node.input[4]) if len(node.input) > 4 and node.input[4] else np.ones(1, np.int64)
    if start is None or end is None or step is None or (step != 1).any():
        return False
    return not np.any(start) and bool(np.all(end.astype(np.int64) >= FOREVER) or _same_shape(graph, shapes, node))


def _without_bounds(graph: Graph, shapes: Shapes, node: onnx.NodeProto) -> bool:
    return graph.opset >= 11 and not any(node.input[1:])


def _neutral(value: float) -> Callable[[Graph, Shapes, onnx.NodeProto], bool]:
    """The second input is ``value`` everywhere, and does not widen the first."""

    def test(graph: Graph, shapes: Shapes, node: onnx.NodeProto) -> bool:
        tensor, before = graph.initializers.get(node.input[1]), shapes.of(node.input[0])
        if tensor is None or before is None or len(tensor.dims) > len(before):
            return False
        if any(dim not in (1, other) for dim, other in zip(reversed(tensor.dims), reversed(before), strict=False)):
            return False
        return bool(np.all(np.asarray(graph.constant(node.input[1])) == value))

    return test


_NOOPS: Mapping[str, Callable[[Graph, Shapes, onnx.NodeProto], bool]] = {
    "Identity": _always,
    "Dropout": _inference,
    "Cast": _same_dtype,
    "Reshape": _kept_dims,
    "Flatten": _same_shape,
    "Squeeze": _same_shape,
    "Expand": _covered,
    "Transpose": _in_order,
    "Pad": _no_padding,
    "Slice": _whole,
    "Concat": _one_input,
    "Sum": _one_input,
    "Max": _one_input,
    "Min": _one_input,
    "Mean": _one_input,
    "Clip": _without_bounds,
    "Add": _neutral(0),
    "Sub": _neutral(0),
    "Mul": _neutral(1),
    "Div": _neutral(1),
    "Pow": _neutral(1),
}
"""When a node of each kind gives back its first input."""


def _transposes(graph: Graph, shapes: Shapes, edit: Edit, node: onnx.NodeProto) -> onnx.NodeProto | None:
    first = graph.producer(node.input[0], "Transpose")
    if first is None:
        return None
    inner, outer = (attribute(item, "perm") for item in (first, node))
    if inner is None or outer is None:
        return None
    return edit.make("Transpose", [first.input[0]], node.output[0], perm=[inner[axis] for axis in outer])


def _reshapes(graph: Graph, shapes: Shapes, edit: Edit, node: onnx.NodeProto) -> onnx.NodeProto | None:
    if (swapped := _swap(graph, shapes, edit, node)) is not None:
        return swapped
    first = graph.producer(node.input[0], "Reshape", "Flatten", "Squeeze", "Unsqueeze")
    wanted = graph.constant(node.input[1]) if len(node.input) > 1 else None
    if first is None or wanted is None or (wanted == 0).any():
        return None  # 0 would copy a length of the shape in between
    return edit.make("Reshape", [first.input[0], node.input[1]], node.output[0])


def _swap(graph: Graph, shapes: Shapes, edit: Edit, node: onnx.NodeProto) -> onnx.NodeProto | None:
    """Find [a, b, m, n] -> [a * b, m, n] -> [a * b, n, m] -> [a, b, n, m]: a Transpose of the last two axes."""
    turn = graph.producer(node.input[0], "Transpose")
    flat = graph.producer(turn.input[0], "Reshape") if turn is not None else None
    if turn is None or flat is None or attribute(turn, "perm") != [0, 2, 1]:
        return None
    before, middle, after = shapes.of(flat.input[0]), shapes.of(flat.output[0]), _target(shapes, node)
    if before is None or middle is None or after is None or len(before) != 4 or middle[1:] != before[2:]:
        return None
    wanted = (*before[:2], before[3], before[2])
    if len(after) != 4 or any(entry not in (dim, -1) for entry, dim in zip(after, wanted, strict=True)):
        return None
    return edit.make("Transpose", [flat.input[0]], node.output[0], perm=[0, 1, 3, 2])


def _target(shapes: Shapes, node: onnx.NodeProto) -> tuple[Dim, ...] | None:
    """Give the shape that a Reshape asks for: names say more there than inference finds. -1 is what is left over."""
    asked = shapes.value(node.input[1]) if len(node.input) > 1 else None
    return shapes.of(node.output[0]) if asked is None or 0 in asked.entries else asked.entries


_MERGES: Mapping[str, Callable[[Graph, Shapes, Edit, onnx.NodeProto], onnx.NodeProto | None]] = {
    "Transpose": _transposes,
    "Reshape": _reshapes,
}
