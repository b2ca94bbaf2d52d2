"""Putting right what nodes say of lengths that were cut: shapes of Reshape, sizes of Split, numbers of groups."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper

from hasten.graph.channel_folds import target_of
from hasten.graph.channel_layers import normal_axis
from hasten.graph.channel_moves import slice_bounds
from hasten.graph.channels import Channels
from hasten.graph.model import Graph, attribute, infer_shapes, is_standard
from hasten.graph.rewrite import Edit, copied

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Shrunk:
    """Which entries of which tensors are kept."""

    channels: Channels
    stays: Mask
    """By label."""

    def kept(self, name: str) -> list[Mask]:
        """Give for each axis of a tensor which of its entries stay."""
        return [self.stays[labels] for labels in self.channels.labels[name]]

    def shape(self, name: str) -> tuple[int, ...]:
        """Give a tensor's shape behind the cut, for the first binding of symbolic dimensions."""
        return tuple(int(axis.sum()) for axis in self.kept(name))

    def touches(self, *names: str) -> bool:
        """Tell whether any of these tensors is cut."""
        return any(not axis.all() for name in names if name in self.channels.labels for axis in self.kept(name))


Repair = Callable[[Edit, Shrunk, onnx.NodeProto], onnx.NodeProto | None]
"""Gives what takes the place of a node whose inputs or outputs are cut; None: it fits as it is."""


def repair_shapes(model: onnx.ModelProto, shrunk: Shrunk) -> None:
    """Change, in place, every node that would not fit the tensors behind the cut."""
    edit = Edit(Graph(model))
    for node in edit.graph.nodes:
        repair = _REPAIRS.get(node.op_type) if is_standard(node) else None
        named = (node.input[0], *(name for name in node.output if name)) if repair is not None else ()
        if repair is not None and (shrunk.touches(*named) or _sized_by_cut(edit.graph, shrunk, node)):
            changed = repair(edit, shrunk, node)
            if changed is not None:
                edit.replace(node, changed)
    edit.commit()


def _sized_by_cut(graph: Graph, shrunk: Shrunk, node: onnx.NodeProto) -> bool:
    """Tell whether a Resize computes its sizes from a tensor that is cut, whether or not what it resizes is."""
    left = [*node.input[3:4]] if node.op_type == "Resize" else []
    seen: set[str] = set()
    while left:
        name = left.pop()
        if shrunk.touches(name):
            return True
        if name in graph.producers and name not in seen:
            left += graph.producers[name].input
        seen.add(name)
    return False


def _groups(edit: Edit, shrunk: Shrunk, node: onnx.NodeProto) -> onnx.NodeProto | None:
    """A group of a convolution or a group-norm stays whole or goes."""
    name = "num_groups" if node.op_type == "GroupNormalization" else "group"
    groups = attribute(node, name, 1)
    if groups == 1:
        return None
    return _with(node, {name: int(shrunk.kept(node.input[0])[1].reshape(groups, -1)[:, 0].sum())})


def _split(edit: Edit, shrunk: Shrunk, node: onnx.NodeProto) -> onnx.NodeProto | None:
    """Sizes along an axis that is not cut stay as they were written, or open."""
    axis = normal_axis(attribute(node, "axis", 0), len(shrunk.shape(node.input[0])))
    if all(shrunk.kept(name)[axis].all() for name in (node.input[0], *node.output)):
        return None
    sizes = [shrunk.shape(name)[axis] for name in node.output]
    if edit.graph.opset < 13:
        return _with(node, {"split": sizes})
    return _with(node, {"num_outputs": None}, {1: _integers(edit, sizes, f"{node.output[0]}_sizes")})


def settle_splits(model: onnx.ModelProto) -> onnx.ModelProto:
    """Give the model with the sizes of each Split written down, as they are after a cut, where they are known."""
    known = infer_shapes(model)
    edit = Edit(Graph(known))
    for node in edit.graph.nodes:
        told = len(node.input) > 1 and bool(node.input[1])
        if not is_standard(node) or node.op_type != "Split" or edit.graph.opset < 13 or told:
            continue
        specs = [edit.graph.specs.get(name) for name in node.output]
        shapes = [spec.shape for spec in specs if spec is not None]
        if len(shapes) < len(specs):
            continue
        axis = normal_axis(attribute(node, "axis", 0), len(shapes[0]))
        sizes = [shape[axis] for shape in shapes]
        if all(isinstance(size, int) for size in sizes):
            sizes_name = _integers(edit, sizes, f"{node.output[0]}_sizes")
            edit.replace(node, _with(node, {"num_outputs": None}, {1: sizes_name}))
    edit.commit()
    return known


def _slice(edit: Edit, shrunk: Shrunk, node: onnx.NodeProto) -> onnx.NodeProto | None:
    """Along cut axes the bounds move with what is kept before them; others stay as they were written."""
    kept, bounds = shrunk.kept(node.input[0]), slice_bounds(shrunk.channels, shrunk.channels.bound.twin(node))
    if bounds is None or all(kept[axis].all() for axis, *_ in bounds):
        return None
    moved = []
    for axis, start, end, step in bounds:
        if kept[axis].all():
            moved.append((start, end, axis, step))
        else:
            first, last, _ = slice(start, end).indices(len(kept[axis]))
            moved.append((int(kept[axis][:first].sum()), int(kept[axis][: max(first, last)].sum()), axis, step))
    starts, ends, axes, steps = (list(part) for part in zip(*moved, strict=True))
    if edit.graph.opset < 10:
        return _with(node, {"starts": starts, "ends": ends, "axes": axes})
    lists = {1: starts, 2: ends, 3: axes, 4: steps}
    return _with(node, {}, {i: _integers(edit, v, f"{node.output[0]}_slice") for i, v in lists.items()})


def _expand(edit: Edit, shrunk: Shrunk, node: onnx.NodeProto) -> onnx.NodeProto | None:
    """Only cut axes are given anew; the others may be computed."""
    entries = shrunk.channels.shape(node.input[1])[0]
    mask = [not axis.all() for axis in shrunk.kept(node.output[0])][-entries:]
    lengths = shrunk.shape(node.output[0])[-entries:]
    if not entries or not any(mask):
        return None
    shape, hint = edit.graph.constant(node.input[1]), f"{node.output[0]}_shape"
    if shape is not None:
        return _with(node, {}, {1: _integers(edit, np.where(mask, lengths, shape), hint)})
    return _replaced(edit, node, 1, mask, lengths)


def _replaced(
    edit: Edit, node: onnx.NodeProto, place: int, mask: Sequence[bool], lengths: Sequence[int]
) -> onnx.NodeProto:
    """Put lengths where ``mask`` says so into a shape that is computed."""
    hint = f"{node.output[0]}_shape"
    inputs = [edit.constant(np.array(mask), hint), _integers(edit, lengths, hint), node.input[place]]
    where = edit.make("Where", inputs, edit.name(hint))
    edit.insert(where, before=node)
    return _with(node, {}, {place: where.output[0]})


def _squeeze(edit: Edit, shrunk: Shrunk, node: onnx.NodeProto) -> onnx.NodeProto | None:
    """Axes that are not named are those of one entry before the cut: one that is left of many stays."""
    if attribute(node, "axes") is not None or (len(node.input) > 1 and node.input[1]):
        return None
    before, after = shrunk.channels.shape(node.input[0]), shrunk.shape(node.input[0])
    axes = [axis for axis, n in enumerate(before) if n == 1]
    if len(axes) == after.count(1):
        return None
    if edit.graph.opset < 13:
        return _with(node, {"axes": axes})
    named = copied(node)
    del named.input[1:]
    named.input.append(_integers(edit, axes, f"{node.output[0]}_axes"))
    return named


def _resize(edit: Edit, shrunk: Shrunk, node: onnx.NodeProto) -> onnx.NodeProto | None:
    """Sizes of cut axes are written anew, beside those that are computed; scales hold for any length."""
    if len(node.input) < 4 or not node.input[3]:
        return None
    shape, kept = shrunk.shape(node.output[0]), shrunk.kept(node.output[0])
    axes = list(attribute(node, "axes") or range(len(shape)))
    sizes = edit.graph.constant(node.input[3])
    if sizes is None:
        labels = shrunk.channels.labels[node.output[0]]  # units have one each; the places of another axis share one
        mask = [len(set(labels[axis].tolist())) > 1 for axis in axes]
        return _replaced(edit, node, 3, mask, [shape[axis] for axis in axes]) if any(mask) else None
    if not sizes.size:
        return None
    fresh = [int(old) if kept[axis].all() else shape[axis] for axis, old in zip(axes, sizes.tolist(), strict=True)]
    return _with(node, {}, {3: _integers(edit, fresh, f"{node.output[0]}_sizes")})


def _reshape(edit: Edit, shrunk: Shrunk, node: onnx.NodeProto) -> onnx.NodeProto:
    bound = shrunk.channels.bound
    target = target_of(bound, bound.twin(node), shrunk.shape(node.output[0]))
    assert target is not None, node.output[0]  # noqa: S101 - no channels go through such a node
    hint = f"{node.output[0]}_shape"
    numbers = [entry for entry in target if isinstance(entry, int)]
    if len(numbers) == len(target):
        return _with(node, {"allowzero": None}, {1: _integers(edit, numbers, hint)})
    parts = []
    for entry in target:
        if isinstance(entry, int):
            parts.append(_integers(edit, [entry], hint))
            continue
        whole = edit.make("Shape", [entry[0]], edit.name(f"{entry[0]}_shape"))
        index = _integers(edit, [entry[1]], f"{entry[0]}_axis")
        length = edit.make("Gather", [whole.output[0], index], edit.name(f"{entry[0]}_length"))
        edit.insert(whole, length, before=node)
        parts.append(length.output[0])
    joined = edit.make("Concat", parts, edit.name(hint), axis=0)
    edit.insert(joined, before=node)
    return _with(node, {"allowzero": None}, {1: joined.output[0]})


def _integers(edit: Edit, values: npt.ArrayLike, hint: str) -> str:
    return edit.constant(np.asarray(values, np.int64), hint)


def _with(
    node: onnx.NodeProto, attributes: Mapping[str, object], inputs: Mapping[int, str] | None = None
) -> onnx.NodeProto:
    """Give a copy of a node with some attributes (None: without it) and inputs set."""
    made = copied(node)
    left = [item for item in made.attribute if item.name not in attributes]
    del made.attribute[:]
    made.attribute.extend(left)
    made.attribute.extend(helper.make_attribute(k, v) for k, v in attributes.items() if v is not None)
    for place, name in (inputs or {}).items():
        made.input.extend([""] * (place + 1 - len(made.input)))
        made.input[place] = name
    return made


_REPAIRS: Mapping[str, Repair] = {
    "Conv": _groups,
    "ConvTranspose": _groups,
    "GroupNormalization": _groups,
    "Split": _split,
    "Slice": _slice,
    "Expand": _expand,
    "Resize": _resize,
    "Reshape": _reshape,
    "Squeeze": _squeeze,
}
"""Operators that are told lengths. All others take them from their inputs."""
