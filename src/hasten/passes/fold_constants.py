"""Rules of ``fold`` that compute ahead what does not depend on the model's inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx
from onnx import helper

from hasten.graph.constants import evaluate, known_inputs, may_fold
from hasten.graph.dims import Known, Shapes
from hasten.graph.model import Graph, attribute, is_standard
from hasten.graph.rewrite import Edit, copied, rename_uses
from hasten.tensors import DTYPES, Array, Dim, TensorSpec

_VALUES = {"value_float": "float32", "value_floats": "float32", "value_int": "int64", "value_ints": "int64"}


def name_constants(model: onnx.ModelProto) -> int:
    """Turn Constant nodes into initializers. Gives the number of changes."""
    graph = Graph(model)
    edit = Edit(graph)
    for node in graph.nodes:
        if not is_standard(node) or node.op_type != "Constant" or node.output[0] in graph.outputs:
            continue
        if (value := constant_value(node)) is not None:
            edit.set_constant(node.output[0], value)
            edit.remove(node)
    return edit.commit()


def constant_value(node: onnx.NodeProto) -> Array | None:
    """Give the value of a Constant node, or None where it is sparse or of strings."""
    item = node.attribute[0]
    if item.name == "value" and item.t.data_type != onnx.TensorProto.STRING:
        return np.asarray(onnx.numpy_helper.to_array(item.t))
    if item.name in _VALUES:
        return np.asarray(helper.get_attribute_value(item), dtype=DTYPES[_VALUES[item.name]])
    return None


def fold_constants(model: onnx.ModelProto, *, max_bytes: int = 64 << 20) -> int:
    """Replace each node whose inputs are all constant by its value. Gives the number of changes.

    Left alone are nodes of ``hasten.graph.constants.NEVER``, those that hold graphs, and those whose value would be
    larger than ``max_bytes``, or much larger than what it is made of.
    """
    changes = 0
    while folded := _fold_once(model, max_bytes):
        changes += folded
    return changes


def _fold_once(model: onnx.ModelProto, max_bytes: int) -> int:
    graph = Graph(model)
    edit = Edit(graph)
    for node in graph.nodes:
        if not node.input or not may_fold(graph, node, max_bytes):
            continue
        inputs = known_inputs(graph, node)
        values = None if inputs is None else _values(graph, node, inputs)
        if values is not None:
            for name, value in values.items():
                edit.set_constant(name, value)
            edit.remove(node)
    return edit.commit()


def _values(graph: Graph, node: onnx.NodeProto, inputs: Sequence[Array | None]) -> dict[str, Array] | None:
    """Compute a node's outputs by name; None where the reference implementation cannot, or gives another dtype."""
    try:
        with np.errstate(all="ignore"):  # log(0) is -inf here as in any runtime
            results = evaluate(node, inputs, graph.opset)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return None  # it has gaps; the node stays, for the engine to compute
    values = {name: value for name, value in zip(node.output, results, strict=True) if name}
    return values if all(graph.dtypes.get(name, v.dtype.name) == v.dtype.name for name, v in values.items()) else None


def fold_shapes(model: onnx.ModelProto) -> int:
    """Replace integer arithmetic on shapes by numbers, where every dimension in it is known. Gives the changes.

    Follows Shape, Gather, Slice, Concat, Cast and + - * / as exporters write them (``hasten.graph.dims``).
    """
    graph = Graph(model)
    shapes = Shapes(graph)
    edit = Edit(graph)
    for node in graph.nodes:
        if len(node.output) != 1 or node.output[0] in graph.outputs or node.output[0] in graph.initializers:
            continue
        value = shapes.value(node.output[0])
        if value is not None and value.static:
            dtype = DTYPES[graph.dtypes.get(node.output[0], "int64")]
            limits = np.iinfo(str(dtype))
            if any(not limits.min <= int(entry) <= limits.max for entry in value.entries):
                continue  # it wraps around, as each runtime does it
            entries = np.array(value.entries, dtype=dtype)
            edit.set_constant(node.output[0], entries.reshape(()) if value.scalar else entries)
            edit.remove(node)
    return edit.commit()


def settle_reshapes(model: onnx.ModelProto) -> int:
    """Give each Reshape a constant shape, where dimensions that stay (0) and one that is left over (-1) can say it.

    Gives the number of changes.
    """
    graph = Graph(model)
    shapes = Shapes(graph)
    edit = Edit(graph)
    for node in graph.nodes:
        if not is_standard(node) or node.op_type != "Reshape" or len(node.input) < 2:
            continue
        wanted, source = shapes.value(node.input[1]), shapes.of(node.input[0])
        if wanted is None or (attribute(node, "allowzero", 0) and 0 in wanted.entries):
            continue
        settled = _named(source, wanted) if wanted.static else _settled(source, wanted)
        if settled is not None:
            shape = edit.constant(np.array(settled, np.int64), f"{node.output[0]}_shape")
            edit.replace(node, edit.make("Reshape", [node.input[0], shape], node.output[0]))
    return edit.commit()


def _settled(source: Sequence[Dim] | None, wanted: Known) -> list[int] | None:
    """Write ``wanted`` with 0 for a dimension that stays in its place and -1 for at most one other."""
    known = list(source or ())
    entries = [
        0 if isinstance(dim, str) and axis < len(known) and known[axis] == dim else dim
        for axis, dim in enumerate(wanted.entries)
    ]
    if any(dim == 0 and wanted.entries[axis] == 0 for axis, dim in enumerate(entries)):
        return None  # an empty tensor: what 0 means depends on allowzero
    names = [dim for dim in entries if isinstance(dim, str)]
    if len(names) + entries.count(-1) > 1:
        return None
    return [dim if isinstance(dim, int) else -1 for dim in entries]


def _named(source: Sequence[Dim] | None, wanted: Known) -> list[int] | None:
    """Write 0 for a -1 that can only stand for the named dimension in its place: then its name is not lost."""
    entries = [dim for dim in wanted.entries if isinstance(dim, int)]
    if source is None or entries.count(-1) != 1 or (axis := entries.index(-1)) >= len(source):
        return None
    if isinstance(source[axis], int):
        return None
    full = [source[i] if dim == 0 and i < len(source) else dim for i, dim in enumerate(entries)]
    others, rest = ([*dims[:axis], *dims[axis + 1 :]] for dims in (source, full))
    if _factors(others) != _factors(rest) or 0 in (*others, *rest):
        return None
    return [*entries[:axis], 0, *entries[axis + 1 :]]


def _factors(dims: Sequence[Dim]) -> tuple[int, list[str]]:
    """Give a product as its number and its names."""
    number = math.prod(dim for dim in dims if isinstance(dim, int))
    return int(number), sorted(dim for dim in dims if isinstance(dim, str))


def name_ranges(model: onnx.ModelProto) -> int:
    """Note in ``value_info`` that a Range from 0 to a named dimension is as long. Gives the number of changes."""
    graph = Graph(model)
    shapes = Shapes(graph)
    changes = 0
    for value in model.graph.value_info:
        node = graph.producer(value.name, "Range")
        if node is None or [shapes.value(name) for name in (node.input[0], node.input[2])] != _FROM_0_BY_1:
            continue
        limit, dims = shapes.value(node.input[1]), value.type.tensor_type.shape.dim
        named = limit is not None and limit.entries[0] in {dim for spec in _inputs(graph) for dim in spec.shape}
        if limit is not None and named and len(dims) == 1 and dims[0].dim_param != limit.entries[0]:
            dims[0].dim_param = str(limit.entries[0])
            changes += 1
    return changes


_FROM_0_BY_1 = [Known((0,), scalar=True), Known((1,), scalar=True)]


def _inputs(graph: Graph) -> list[TensorSpec]:
    return [graph.specs[value.name] for value in graph.model.graph.input if value.name in graph.specs]


def choose_branches(model: onnx.ModelProto) -> int:
    """Replace each If whose condition is constant by the branch that is taken. Gives the number of changes."""
    graph = Graph(model)
    edit = Edit(graph)
    for node in graph.nodes:
        condition = graph.constant(node.input[0]) if is_standard(node) and node.op_type == "If" else None
        if condition is None:
            continue
        _inline(edit, node, attribute(node, "then_branch" if bool(condition.reshape(-1)[0]) else "else_branch"))
    return edit.commit()


def _inline(edit: Edit, node: onnx.NodeProto, branch: onnx.GraphProto) -> None:
    """Put a branch in the place of its If, under names of its own."""
    inner = {name: edit.name(name) for item in branch.node for name in item.output if name}
    for tensor in branch.initializer:
        inner[tensor.name] = edit.constant(np.asarray(onnx.numpy_helper.to_array(tensor)), tensor.name)
    nodes = [copied(item) for item in branch.node]
    for item in nodes:
        item.name = edit.name(item.name) if item.name else ""  # each graph has names of its own
        rename_uses(item, inner)
        for i, name in enumerate(item.output):
            item.output[i] = inner.get(name, name)
    results = [
        edit.make("Identity", [inner.get(value.name, value.name)], output)
        for value, output in zip(branch.output, node.output, strict=True)
        if output
    ]
    edit.replace(node, *nodes, *results)
