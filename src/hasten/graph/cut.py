"""Cutting channels out of a model: smaller weights, and every shape that spoke of them put right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from hasten.errors import BuildFailed, InvalidSetting, UnknownName
from hasten.graph.costs import bind
from hasten.graph.cut_shapes import Shrunk, repair_shapes
from hasten.graph.groups import Group, Survey
from hasten.graph.model import Graph, attribute, is_standard, refresh_shapes
from hasten.graph.rewrite import remove_dead
from hasten.tensors import Array

Keep = Mapping[str, Sequence[int]]
"""The units that each group keeps; groups that are not named keep all."""


def cut(model: onnx.ModelProto, keep: Keep) -> onnx.ModelProto:
    """Give a copy of a model without the units that ``keep`` does not list, in the order in which they were.

    Inputs and outputs stay as they are. Every tensor is as long as the groups say, or this fails.

    Args:
        model: Any ONNX model; it is not changed.
        keep: For each group by name, the units to keep; groups that are not named keep all.

    Raises:
        UnknownName: there is no such group; offers the nearest.
        InvalidSetting: a group is to keep no unit, one that it does not have, or one twice.
        BuildFailed: the smaller graph does not hold together.
    """
    survey = Survey.of(model)
    dropped = _dropped(survey, keep)
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    if not dropped.any():
        return copy
    shrunk = Shrunk(survey.channels, ~dropped)
    for tensor in copy.graph.initializer:
        _shrink(tensor, shrunk)
    sizes = {tensor.name: tensor.dims for tensor in copy.graph.initializer}
    for value in copy.graph.input:
        for axis, length in enumerate(sizes.get(value.name, ())):
            value.type.tensor_type.shape.dim[axis].dim_value = length
    repair_shapes(copy, shrunk)
    remove_dead(copy)
    refresh_shapes(copy)
    _check(copy, shrunk)
    return copy


def masked(model: onnx.ModelProto, keep: Keep) -> onnx.ModelProto:
    """Give a copy of a model in which the units that ``cut`` would drop are zero where they are made and read.

    It computes what the result of ``cut`` computes, for groups that are ``exact``. Weights behind a DequantizeLinear
    become what stands for zero. Arguments and errors are those of ``cut``.
    """
    survey = Survey.of(model)
    _dropped(survey, keep)
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    tensors = {tensor.name: tensor for tensor in copy.graph.initializer}
    zeros = _zero_points(Graph(model))
    for group in survey.groups:
        lost = [unit for unit in range(group.size) if unit not in set(keep.get(group.name, range(group.size)))]
        for slot in group.slots:
            if lost and slot.role != "carries":
                value = np.moveaxis(numpy_helper.to_array(tensors[slot.tensor]).copy(), slot.axis, 0)
                zero = np.broadcast_to(
                    zeros.get(slot.tensor, np.zeros((), value.dtype)), _shape_of(tensors, slot.tensor)
                )
                gone = np.isin(slot.units, lost)
                value[gone] = np.moveaxis(zero, slot.axis, 0)[gone]
                _store(tensors[slot.tensor], np.moveaxis(value, 0, slot.axis))
    return copy


def _dropped(survey: Survey, keep: Keep) -> npt.NDArray[np.bool_]:
    """Tell for each label whether it goes."""
    groups = {group.name: (number, group) for number, group in enumerate(survey.groups)}
    group, unit = survey.units
    gone = np.zeros(len(group), np.bool_)
    for name, units in keep.items():
        if name not in groups:
            raise UnknownName("channel group", name, groups)
        number, found = groups[name]
        _check_units(found, units)
        gone |= (group == number) & ~np.isin(unit, units)
    return gone


def _check_units(group: Group, units: Sequence[int]) -> None:
    if not len(units):
        raise InvalidSetting(f"channel group {group.name!r} is to keep no unit; keep at least one of its {group.size}")
    for i, unit in enumerate(sorted(units)):
        if not 0 <= unit < group.size:
            raise InvalidSetting(f"channel group {group.name!r} has no unit {unit}; it has 0 to {group.size - 1}")
        if i and sorted(units)[i - 1] == unit:
            raise InvalidSetting(f"channel group {group.name!r} is to keep unit {unit} twice; list it once")


def _shrink(tensor: onnx.TensorProto, shrunk: Shrunk) -> None:
    kept = shrunk.kept(tensor.name)
    if all(axis.all() for axis in kept):
        return
    value = numpy_helper.to_array(tensor)
    for axis, entries in enumerate(kept):
        value = np.compress(entries, value, axis)
    _store(tensor, value)


def _store(tensor: onnx.TensorProto, value: Array) -> None:
    """Change an initializer's value; dtypes that NumPy lacks keep their ONNX type."""
    fresh = numpy_helper.from_array(np.ascontiguousarray(value), tensor.name)
    fresh.doc_string = tensor.doc_string
    tensor.CopyFrom(fresh)


def _shape_of(tensors: Mapping[str, onnx.TensorProto], name: str) -> tuple[int, ...]:
    return tuple(tensors[name].dims)


def _zero_points(graph: Graph) -> dict[str, Array]:
    """Give the zero points of quantized weights that are not zero, shaped to broadcast with them."""
    found: dict[str, Array] = {}
    for node in graph.nodes:
        if not is_standard(node) or node.op_type != "DequantizeLinear" or len(node.input) < 3 or not node.input[2]:
            continue
        tensor, zero = graph.initializers.get(node.input[0]), graph.constant(node.input[2])
        if tensor is not None and zero is not None and zero.astype(np.int32).any():
            axis, rank = attribute(node, "axis", 1), len(tensor.dims)
            along = [-1 if i == axis % rank else 1 for i in range(rank)]
            found[tensor.name] = zero.reshape(along if zero.size > 1 else ())
    return found


def _check(model: onnx.ModelProto, shrunk: Shrunk) -> None:
    """Check that every tensor of a cut model has the shape that follows from the groups.

    Raises:
        BuildFailed: one has another.
    """
    graph = Graph(bind(model, shrunk.channels.bound.lengths))
    for name, spec in graph.specs.items():
        if name in shrunk.channels.labels and name in graph.producers:
            expected = shrunk.shape(name)
            if spec.shape != expected and all(isinstance(dim, int) for dim in spec.shape):
                raise BuildFailed(
                    "cut", f"{name!r} came out as {list(spec.shape)}, not {list(expected)}; please report it"
                )
