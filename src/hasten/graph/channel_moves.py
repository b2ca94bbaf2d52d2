"""How channels pass through operators that move them: reshapes, transpositions, joining, splitting, cutting out.

The semantics are those of the ONNX operator specification, https://onnx.ai/onnx/operators.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx

from hasten.graph.channel_layers import normal_axis
from hasten.graph.channels import Channels, Labels, Rule, said
from hasten.graph.model import attribute, is_standard

TAKES_A_SHAPE = frozenset(
    ("Reshape", "Expand", "ConstantOfShape", "Slice", "Tile", "Range", "Unsqueeze", "Squeeze", "Resize", "Split", "Pad")
)
"""Operators that may take lengths: they are put right when something is cut, or do not let channels through."""

ARITHMETIC_ON_LENGTHS = frozenset(
    (
        "Gather",
        "Slice",
        "Concat",
        "Cast",
        "Squeeze",
        "Unsqueeze",
        "Reshape",
        "Expand",
        "Identity",
        "Add",
        "Sub",
        "Mul",
        "Div",
    )
)
"""Operators through which lengths go on their way into a shape."""


def _transpose(channels: Channels, node: onnx.NodeProto) -> Sequence[Labels]:
    x = channels.of(node.input[0])
    order = attribute(node, "perm", list(range(len(x)))[::-1])
    return [tuple(x[axis] for axis in order)]


def _concat(channels: Channels, node: onnx.NodeProto) -> Sequence[Labels]:
    parts = [channels.of(name) for name in node.input]
    axis = normal_axis(attribute(node, "axis"), len(parts[0]))
    for part in parts[1:]:
        for other in range(len(part)):
            if other != axis:
                channels.join(parts[0][other], part[other])
    return [tuple(np.concatenate([p[axis] for p in parts]) if i == axis else x for i, x in enumerate(parts[0]))]


def _split(channels: Channels, node: onnx.NodeProto) -> Sequence[Labels]:
    x = channels.of(node.input[0])
    axis = normal_axis(attribute(node, "axis", 0), len(x))
    ends = np.cumsum([channels.shape(name)[axis] for name in node.output])
    return [(*x[:axis], part, *x[axis + 1 :]) for part in np.split(x[axis], ends[:-1])]


def slice_bounds(channels: Channels, node: onnx.NodeProto) -> list[tuple[int, int, int, int]] | None:
    """Give (axis, start, end, step) of each axis that a Slice cuts; None where they depend on lengths."""
    rank = len(channels.shape(node.input[0]))
    if channels.graph.opset < 10:
        starts, ends = attribute(node, "starts"), attribute(node, "ends")
        axes, steps = attribute(node, "axes"), None
    else:
        values = [channels.bound.constant(node, place) for place in range(1, len(node.input))]
        if any(value is None and node.input[i + 1] for i, value in enumerate(values)):
            return None
        listed = [None if value is None else [int(v) for v in value.reshape(-1)] for value in values]
        starts, ends, axes, steps = [*listed, None, None][:4]
    axes = axes or range(len(starts))
    steps = steps or [1] * len(starts)
    return [(normal_axis(a, rank), s, e, n) for a, s, e, n in zip(axes, starts, ends, steps, strict=True)]


def _slice(channels: Channels, node: onnx.NodeProto) -> Sequence[Labels] | str:
    bounds = slice_bounds(channels, node)
    if bounds is None:
        return _lengthwise(channels, node, f"{said(node)} cuts a computed part out of it")
    result = list(channels.of(node.input[0]))
    for axis, start, end, step in bounds:
        if step != 1:
            channels.stay(result[axis], f"{said(node)} takes each {abs(step)}th of it")
        result[axis] = result[axis][start:end:step]
    return [tuple(result)]


def _lengthwise(channels: Channels, node: onnx.NodeProto, why: str) -> Sequence[Labels]:
    """Let the axes through whose lengths stay as they are, and hold the others, as ``why`` says."""
    x, pairs = channels.of(node.input[0]), channels.bound.pairs(node.input[0]) or ()
    after = channels.bound.pairs(node.output[0]) or ()
    result = []
    for labels, before, length in zip(x, pairs, after, strict=True):
        if before != length:
            channels.stay(labels, why)
        result.append(labels if before == length else channels.fixed(length[0], why))
    return [tuple(result)]


def _pad(channels: Channels, node: onnx.NodeProto) -> Sequence[Labels] | str:
    x = channels.of(node.input[0])
    pads = attribute(node, "pads")
    if pads is None:
        value, axes = channels.bound.constant(node, 1), channels.bound.constant(node, 3)
        if value is None or (len(node.input) > 3 and node.input[3] and axes is None):
            return f"the padding of {said(node)} is computed"
        places = range(len(x)) if axes is None else [normal_axis(int(a), len(x)) for a in axes.reshape(-1)]
        padded = {axis for axis, ends in zip(places, value.reshape(2, -1).T, strict=True) if ends.any()}
    else:
        padded = {axis for axis, ends in enumerate(np.reshape(pads, (2, -1)).T) if ends.any()}
    why, result = f"{said(node)} pads it", list(x)
    for axis in padded:
        channels.stay(x[axis], why)
        result[axis] = channels.fixed(channels.shape(node.output[0])[axis], why)
    return [tuple(result)]


def _resize(channels: Channels, node: onnx.NodeProto) -> Sequence[Labels] | str:
    if attribute(node, "coordinate_transformation_mode", "") == "tf_crop_and_resize":
        return f"{said(node)} crops as it is told at run time"
    made = _lengthwise(channels, node, f"{said(node)} resizes it")
    scales = channels.bound.constant(node, 2 if node.op_type == "Resize" and channels.graph.opset >= 11 else 1)
    axes = attribute(node, "axes") or range(len(made[0]))
    if scales is not None and scales.size:
        for axis, scale in zip(axes, scales.reshape(-1), strict=True):
            if float(scale) != 1.0:
                channels.stay(made[0][axis], f"{said(node)} resizes it")
    return made


def _expand(channels: Channels, node: onnx.NodeProto) -> Sequence[Labels]:
    """One entry that is repeated may be repeated less often, where that does not depend on open lengths."""
    x, pairs = channels.of(node.input[0]), channels.bound.pairs(node.output[0]) or ()
    result = []
    for axis, (length, other) in zip(range(-len(pairs), 0), pairs, strict=True):
        if len(x) >= -axis and len(x[axis]) == length:
            result.append(x[axis])
        elif length == other:
            result.append(channels.fresh(length))
        else:
            result.append(channels.fixed(length, f"{said(node)} repeats it"))
    return [tuple(result)]


def _tile(channels: Channels, node: onnx.NodeProto) -> Sequence[Labels]:
    return _lengthwise(channels, node, f"{said(node)} repeats it")


def _depth_to_space(channels: Channels, node: onnx.NodeProto) -> Sequence[Labels]:
    """DCR lays channels out as [block, block, depth], CRD as [depth, block, block]: a unit is one of ``depth``."""
    x, shape = channels.of(node.input[0]), channels.shape(node.output[0])
    depth_last = attribute(node, "mode", "DCR") == "DCR"
    blocks = x[1].reshape(-1, shape[1]).T if depth_last else x[1].reshape(shape[1], -1)
    channels.join(blocks[:, :1], blocks)
    why = f"{said(node)} mixes channels into it"
    return [(x[0], blocks[:, 0], *(channels.fixed(n, why) for n in shape[2:]))]


def _space_to_depth(channels: Channels, node: onnx.NodeProto) -> Sequence[Labels]:
    x, shape = channels.of(node.input[0]), channels.shape(node.output[0])
    for axis in x[2:]:
        channels.stay(axis, f"{said(node)} mixes it into channels")
    why = f"{said(node)} mixes it into channels"
    return [(x[0], np.tile(x[1], shape[1] // len(x[1])), *(channels.fixed(n, why) for n in shape[2:]))]


def _length(channels: Channels, node: onnx.NodeProto) -> Sequence[Labels]:
    """A length that is computed with, other than for a shape, must not change."""
    x = channels.of(node.input[0])
    for axis in _measured(channels, node, len(x)):
        channels.stay(x[axis], f"{said(node)} computes with its length")
    return []


def _measured(channels: Channels, node: onnx.NodeProto, rank: int) -> set[int]:
    """Give the axes whose lengths go elsewhere than into a shape."""
    axes = np.arange(rank)
    if node.op_type == "Shape":
        axes = axes[attribute(node, "start", 0) : attribute(node, "end", rank)]
    found: set[int] = set()
    for user in channels.graph.consumers.get(node.output[0], []):
        index = channels.graph.constant(user.input[1]) if user.op_type == "Gather" else None
        picked = axes if index is None or node.op_type != "Shape" else axes[index.reshape(-1).astype(np.int64)]
        if not _only_shapes(channels, user, node.output[0]):
            found.update(int(axis) for axis in picked)
    if node.output[0] in channels.graph.outputs:
        found.update(int(axis) for axis in axes)
    return found


def _only_shapes(channels: Channels, node: onnx.NodeProto, name: str) -> bool:
    """Tell whether a length ends up in shapes alone. ``name`` is the input of ``node`` that holds it."""
    if not is_standard(node):
        return False
    if node.op_type in ("ConstantOfShape", "Range"):
        return False  # what it makes would stay as long as it was
    if node.op_type in TAKES_A_SHAPE and node.input[0] != name:
        return True
    if node.op_type not in ARITHMETIC_ON_LENGTHS or channels.graph.dtypes.get(node.output[0]) not in ("int64", "int32"):
        return False
    users = channels.graph.consumers.get(node.output[0], [])
    return node.output[0] not in channels.graph.outputs and all(
        _only_shapes(channels, user, node.output[0]) for user in users
    )


MOVES: Mapping[str, Rule] = {
    "Transpose": _transpose,
    "Concat": _concat,
    "Split": _split,
    "Slice": _slice,
    "Pad": _pad,
    "Resize": _resize,
    "Upsample": _resize,
    "Expand": _expand,
    "Tile": _tile,
    "DepthToSpace": _depth_to_space,
    "SpaceToDepth": _space_to_depth,
    "Shape": _length,
    "Size": _length,
}
"""Operators that move channels, but for those that fold axes (``channel_folds``)."""
