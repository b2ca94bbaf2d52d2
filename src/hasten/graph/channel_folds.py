"""How channels pass through operators that fold axes together or apart: Reshape, Flatten, Squeeze, Unsqueeze.

An axis that is folded apart gives its units to one of the new axes: of [batch, length, heads * depth] as
[batch, length, heads, depth] the heads are units, each with all its entries. An axis folded together with others hands
its labels to each entry that it is part of.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import onnx

from hasten.graph.channel_layers import normal_axis
from hasten.graph.channel_moves import slice_bounds
from hasten.graph.channels import Bound, Channels, Ints, Labels, Rule, said
from hasten.graph.model import attribute

Block = tuple[list[int], list[int]]
"""Axes before and behind a fold that hold the same entries."""

Target = list[int | tuple[str, int]]
"""The shape that a Reshape makes: numbers as ONNX has them (0: as before, -1: the rest), or a graph input's axis."""


def target_of(bound: Bound, node: onnx.NodeProto, lengths: Sequence[int]) -> Target | None:
    """Write the target of a Reshape so that it holds for any length of the symbolic dimensions.

    Args:
        bound: The graph, bound.
        node: The Reshape.
        lengths: Of its output, for the first binding; those that depend on symbolic dimensions are not read.

    Returns:
        None where two axes depend on symbolic dimensions in a way that cannot be written.
    """
    before, after = bound.pairs(node.input[0]) or (), bound.pairs(node.output[0]) or ()
    target: Target = []
    for axis, (pair, length) in enumerate(zip(after, lengths, strict=True)):
        if pair[0] == pair[1]:
            target.append(length)
        elif axis < len(before) and before[axis] == pair:
            target.append(0)
        else:
            target.append(-1)
    for axis, entry in enumerate(target):
        if entry == -1 and target.count(-1) > 1 and after[axis] in bound.symbols:
            target[axis] = bound.symbols[after[axis]]
    return target if target.count(-1) <= 1 else None


def _fold(channels: Channels, node: onnx.NodeProto) -> Sequence[Labels] | str:
    before, after = channels.shape(node.input[0]), channels.shape(node.output[0])
    if node.op_type == "Reshape" and target_of(channels.bound, node, after) is None:
        return f"the shape that {said(node)} makes depends on several open lengths"
    blocks = _aligned(before, after)
    if blocks is None:
        return f"{said(node)} makes {list(after)} of {list(before)}"
    x = channels.of(node.input[0])
    result: list[Ints] = [channels.fixed(n, f"{said(node)} adds it") for n in after]
    for sources, places in blocks:
        whole = _folded(channels, node, x, sources)
        if len(places) == 1:
            result[places[0]] = whole
        else:
            for place, labels in zip(places, _unfolded(channels, node, whole, places), strict=True):
                result[place] = labels
    _carry_ones(x, result)
    return [tuple(result)]


def _aligned(before: Sequence[int], after: Sequence[int]) -> list[Block] | None:
    """Pair runs of axes that hold the same entries, without axes of length 1. None where there are no entries."""
    if 0 in before or 0 in after or math.prod(before) != math.prod(after):
        return None
    old = [axis for axis, n in enumerate(before) if n != 1]
    new = [axis for axis, n in enumerate(after) if n != 1]
    blocks: list[Block] = []
    while old:
        a, b = [old.pop(0)], [new.pop(0)]
        while (left := math.prod(before[i] for i in a)) != (right := math.prod(after[i] for i in b)):
            (a if left < right else b).append((old if left < right else new).pop(0))
        blocks.append((a, b))
    return blocks


def _carry_ones(x: Labels, result: list[Ints]) -> None:
    """Hand on the label of a single axis of length 1, where there is one before and behind."""
    ones = [labels for labels in x if len(labels) == 1]
    places = [axis for axis, labels in enumerate(result) if len(labels) == 1]
    if len(ones) == len(places) == 1:
        result[places[0]] = ones[0]


def _folded(channels: Channels, node: onnx.NodeProto, x: Labels, sources: Sequence[int]) -> Ints:
    """Give the labels of several axes as one: those of the first that may be cut. The others stay."""
    if len(sources) == 1:
        return x[sources[0]]
    carrier = next((axis for axis in sources if channels.free(x[axis])), sources[0])
    for axis in sources:
        if axis != carrier:
            channels.stay(x[axis], f"{said(node)} folds it into another axis")
    sizes = [len(x[axis]) for axis in sources]
    along = [len(x[axis]) if axis == carrier else 1 for axis in sources]
    return np.broadcast_to(x[carrier].reshape(along), sizes).reshape(-1)


def _unfolded(channels: Channels, node: onnx.NodeProto, whole: Ints, places: Sequence[int]) -> list[Ints]:
    """Spread the labels of one axis over several: the units go to one of them."""
    after = channels.shape(node.output[0])
    sizes = [after[place] for place in places]
    cube = whole.reshape(sizes)
    unit = _unit_axis(channels, cube, [place in _picked(channels, node.output[0]) for place in places])
    rows = np.moveaxis(cube, unit, 0).reshape(sizes[unit], -1)
    channels.join(rows[:, :1], rows)
    why = f"{said(node)} folds units apart along it"
    return [rows[:, 0] if i == unit else channels.fixed(n, why) for i, n in enumerate(sizes)]


def _unit_axis(channels: Channels, cube: Ints, picked: Sequence[bool]) -> int:
    """Choose the axis whose coordinate tells the unit; else the first from which nobody picks parts, as q, k and v."""
    classes = channels.classes()[cube]
    for axis in range(cube.ndim):
        rows = np.moveaxis(classes, axis, 0).reshape(cube.shape[axis], -1)
        if np.array_equal(rows, np.broadcast_to(rows[:, :1], rows.shape)) and len(np.unique(rows[:, 0])) > 1:
            return axis
    return next((axis for axis, is_picked in enumerate(picked) if not is_picked), 0)


def _picked(channels: Channels, name: str) -> set[int]:
    """Give the axes of a tensor from which single entries or parts are taken, directly or behind moves of axes."""
    found: set[int] = set()
    rank = len(channels.bound.shape(name) or ())
    for user in channels.graph.consumers.get(name, []):
        if user.op_type in ("Gather", "Split", "SplitToSequence"):
            found.add(normal_axis(attribute(user, "axis", 0), rank))
        elif user.op_type == "Slice":
            found |= {axis for axis, *_ in slice_bounds(channels, user) or ()}
        elif user.op_type in _ORDERS and (order := _ORDERS[user.op_type](channels, user, rank)) is not None:
            found |= {order[axis] for axis in _picked(channels, user.output[0]) if order.get(axis) is not None}
    return found


def _kept(channels: Channels, node: onnx.NodeProto, rank: int) -> dict[int, int]:
    return {axis: axis for axis in range(rank)}


def _transposed(channels: Channels, node: onnx.NodeProto, rank: int) -> dict[int, int]:
    return dict(enumerate(attribute(node, "perm", list(range(rank))[::-1])))


def _widened(channels: Channels, node: onnx.NodeProto, rank: int) -> dict[int, int] | None:
    axes = _axes(channels, node)
    if axes is None:
        return None
    full = rank + len(axes)
    left = [axis for axis in range(full) if axis not in {normal_axis(a, full) for a in axes}]
    return {behind: before for before, behind in enumerate(left)}


def _narrowed(channels: Channels, node: onnx.NodeProto, rank: int) -> dict[int, int] | None:
    axes = _axes(channels, node)
    if axes is None:
        return None
    return dict(enumerate(axis for axis in range(rank) if axis not in {normal_axis(a, rank) for a in axes}))


def _axes(channels: Channels, node: onnx.NodeProto) -> list[int] | None:
    listed = attribute(node, "axes")
    if listed is not None:
        return [int(axis) for axis in listed]
    value = channels.bound.constant(node, 1)
    return None if value is None else [int(axis) for axis in value.reshape(-1)]


_ORDERS = {
    **dict.fromkeys(("Identity", "Cast", "Dropout"), _kept),
    "Transpose": _transposed,
    "Unsqueeze": _widened,
    "Squeeze": _narrowed,
}
"""For each axis behind an operator, the axis before it."""

FOLDS: Mapping[str, Rule] = dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), _fold)
"""Operators that fold axes."""
