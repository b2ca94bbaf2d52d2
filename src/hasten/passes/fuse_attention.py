"""Rules of ``fuse`` for attention: the whole of it as one operator, and its projections as one product.

Vaswani et al., "Attention Is All You Need", arXiv:1706.03762, section 3.2: softmax(Q K^T * scale + mask) V per head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import numpy as np
import onnx
from onnx import helper

from hasten.graph.model import Graph, attribute, is_standard
from hasten.graph.opset import raise_opset
from hasten.graph.patterns import scalar, split_constant
from hasten.graph.rewrite import Edit
from hasten.tensors import Dim

MICROSOFT = "com.microsoft"


@dataclass(frozen=True)
class Heads:
    """A tensor [batch, length, heads * depth] that is split into heads."""

    source: str
    batch: Dim
    length: Dim
    heads: int
    depth: int


@dataclass(frozen=True)
class Attention:
    """One attention: ``root`` is the Reshape that joins the heads again. ``mask`` is added to the scaled scores."""

    root: onnx.NodeProto
    query: Heads
    key: Heads
    value: Heads
    scale: float
    mask: str | None


def fuse_attention(model: onnx.ModelProto, *, microsoft: bool = False) -> int:
    """Write attention as Attention (version 23), or as ``com.microsoft.MultiHeadAttention``. Gives the changes.

    Matches Reshape and Transpose to heads, MatMul, scale, mask, Softmax, MatMul, Transpose and Reshape back.
    """
    if not any(_attentions(Graph(model))) or not raise_opset(model, 15 if microsoft else 23):
        return 0
    edit = Edit(Graph(model))
    masks: dict[tuple[str, Dim], str] = {}
    for found in list(_attentions(edit.graph)):
        mask = _full_mask(edit, found, masks) if found.mask else None
        inputs = [found.query.source, found.key.source, found.value.source]
        heads = found.query.heads
        if microsoft:
            inputs += ["", "", mask] if mask else []
            node = edit.make(
                *("MultiHeadAttention", inputs, found.root.output[0]),
                domain=MICROSOFT,
                num_heads=heads,
                scale=found.scale,
            )
        else:
            inputs += [mask] if mask else []
            node = edit.make(
                *("Attention", inputs, found.root.output[0]), q_num_heads=heads, kv_num_heads=heads, scale=found.scale
            )
        edit.replace(found.root, node)
    changes = edit.commit()
    if microsoft and all(item.domain != MICROSOFT for item in model.opset_import):
        model.opset_import.append(helper.make_opsetid(MICROSOFT, 1))
    return changes


def merge_projections(model: onnx.ModelProto) -> int:
    """Make one MatMul and a Split of the MatMuls that share an input, such as Q, K and V. Gives the changes.

    Constant weights [in, out_i] are laid side by side; biases that each of them adds go along.
    """
    if not any(_projections(Graph(model))) or not raise_opset(model, 13):
        return 0
    edit = Edit(Graph(model))
    for group in list(_projections(edit.graph)):
        _merge(edit, group)
    return edit.commit()


def _attentions(graph: Graph) -> Iterator[Attention]:
    for node in graph.nodes:
        if node.op_type == "Softmax" and is_standard(node) and (found := _attention(graph, node)) is not None:
            yield found


def _attention(graph: Graph, softmax: onnx.NodeProto) -> Attention | None:
    product = graph.only_consumer(softmax.output[0])
    root = _joined(graph, product) if _last_axis(graph, softmax) else None
    scores, mask = _unmasked(graph, softmax.input[0])
    found = _scaled_product(graph, scores)
    if product is None or root is None or found is None or product.input[0] != softmax.output[0]:
        return None
    left, right, scale = found
    query, key = _heads(graph, left, [0, 2, 1, 3]), _heads(graph, right, [0, 2, 3, 1])
    value = _heads(graph, product.input[1], [0, 2, 1, 3])
    if query is None or key is None or value is None:
        return None
    if key.batch != value.batch or (query.batch != key.batch and 1 in (query.batch, key.batch)):
        return None  # one is repeated for the other, which the fused operators do not do
    if not query.heads == key.heads == value.heads or query.depth != key.depth or key.length != value.length:
        return None
    if _shape(graph, root.output[0])[1:] != (query.length, value.heads * value.depth):
        return None
    if mask is not None and not _mask_fits(graph, mask, query, key):
        return None
    return Attention(root, query, key, value, scale, mask)


def _shape(graph: Graph, name: str) -> tuple[Dim, ...]:
    spec = graph.specs.get(name)
    return spec.shape if spec is not None else ()


def _last_axis(graph: Graph, softmax: onnx.NodeProto) -> bool:
    rank = len(_shape(graph, softmax.input[0]))
    return rank == 4 and attribute(softmax, "axis", -1 if graph.opset >= 13 else 1) in (-1, 3)


def _joined(graph: Graph, product: onnx.NodeProto | None) -> onnx.NodeProto | None:
    """Follow [batch, heads, length, depth] back to [batch, length, heads * depth]."""
    if product is None or product.op_type != "MatMul":
        return None
    turn = graph.only_consumer(product.output[0])
    if turn is None or turn.op_type != "Transpose" or attribute(turn, "perm") != [0, 2, 1, 3]:
        return None
    root = graph.only_consumer(turn.output[0])
    return root if root is not None and root.op_type == "Reshape" and len(_shape(graph, root.output[0])) == 3 else None


def _unmasked(graph: Graph, scores: str) -> tuple[str, str | None]:
    """Take the addition of a mask off the scores."""
    node = graph.producer(scores, "Add")
    if node is None:
        return scores, None
    for own, other in (tuple(node.input), tuple(reversed(node.input))):
        if _scaled_product(graph, own) is not None:
            return own, other
    return scores, None


def _scaled_product(graph: Graph, name: str) -> tuple[str, str, float] | None:
    """Read a tensor as left @ right * scale, where parts of the scale may stand on either side."""
    name, outer = _unscaled(graph, name)
    product = graph.producer(name, "MatMul")
    if product is None:
        return None
    (left, a), (right, b) = (_unscaled(graph, side) for side in product.input)
    return left, right, outer * a * b


def _unscaled(graph: Graph, name: str) -> tuple[str, float]:
    node = graph.producer(name, "Mul", "Div")
    split = split_constant(graph, node) if node is not None else None
    value = scalar(graph, split[1]) if split else None
    if node is None or split is None or not value:
        return name, 1.0
    if node.op_type == "Div" and split[1] != node.input[1]:
        return name, 1.0
    return split[0], value if node.op_type == "Mul" else 1 / value


def _heads(graph: Graph, name: str, perm: list[int]) -> Heads | None:
    turn = graph.producer(name, "Transpose")
    split = graph.producer(turn.input[0], "Reshape") if turn is not None else None
    if turn is None or split is None or attribute(turn, "perm") != perm:
        return None
    before, after = _shape(graph, split.input[0]), _shape(graph, split.output[0])
    if len(before) != 3 or len(after) != 4 or not isinstance(after[2], int) or not isinstance(after[3], int):
        return None
    # The lengths multiply to the same number, so where one of two agrees, so does the other.
    if before[2] != after[2] * after[3] or not (before[0] == after[0] or before[1] == after[1]):
        return None
    return Heads(split.input[0], before[0], before[1], after[2], after[3])


def _mask_fits(graph: Graph, mask: str, query: Heads, key: Heads) -> bool:
    """A mask [1 or batch, 1 or heads, 1 or length, key length]; a single row needs a length that can be repeated."""
    shape = _shape(graph, mask)
    if len(shape) != 4 or shape[0] not in (1, query.batch) or shape[1] not in (1, query.heads):
        return False
    if shape[3] != key.length or shape[2] not in (1, query.length):
        return False
    return shape[2] == query.length or isinstance(query.length, int) or query.length == key.length


def _full_mask(edit: Edit, found: Attention, masks: dict[tuple[str, Dim], str]) -> str:
    """Give the mask with a row for each query: ONNX Runtime's kernels do not repeat a single one."""
    mask = cast("str", found.mask)
    if _shape(edit.graph, mask)[2] == found.query.length:
        return mask
    key = (mask, found.query.length)  # queries of another length may read the same mask
    if key not in masks:
        masks[key] = edit.name(f"{mask}_rows")
        shape = _rows(edit, found, mask)
        edit.insert(edit.make("Expand", [mask, shape], masks[key]), before=found.root)
    return masks[key]


def _rows(edit: Edit, found: Attention, mask: str) -> str:
    """Give the shape [1, 1, query length, 1]."""
    if isinstance(found.query.length, int):
        return edit.constant(np.array([1, 1, found.query.length, 1], np.int64), f"{mask}_shape")
    one = edit.constant(np.ones(1, np.int64), f"{mask}_one")
    length = edit.make("Shape", [mask], edit.name(f"{mask}_length"), start=3, end=4)  # of the keys, which are as many
    shape = edit.make("Concat", [one, one, length.output[0], one], edit.name(f"{mask}_shape"), axis=0)
    edit.insert(length, shape, before=found.root)
    return str(shape.output[0])


@dataclass(frozen=True)
class _Projection:
    product: onnx.NodeProto
    bias: onnx.NodeProto | None

    @property
    def output(self) -> str:
        return str((self.bias or self.product).output[0])


def _projections(graph: Graph) -> Iterator[list[_Projection]]:
    groups: dict[tuple[str, int, int], list[_Projection]] = {}
    for node in graph.nodes:
        if node.op_type != "MatMul" or not is_standard(node):
            continue
        weight = graph.initializers.get(node.input[1])
        if weight is None or len(weight.dims) != 2 or node.output[0] in graph.outputs:
            continue
        groups.setdefault((node.input[0], weight.data_type, weight.dims[0]), []).append(
            _Projection(node, _bias_of(graph, node))
        )
    yield from (group for group in groups.values() if len(group) > 1)


def _bias_of(graph: Graph, product: onnx.NodeProto) -> onnx.NodeProto | None:
    user = graph.only_consumer(product.output[0])
    split = split_constant(graph, user) if user is not None and user.op_type == "Add" else None
    if user is None or split is None or user.output[0] in graph.outputs:
        return None
    width = graph.initializers[product.input[1]].dims[1]
    return user if list(graph.initializers[split[1]].dims) == [width] else None


def _merge(edit: Edit, group: list[_Projection]) -> None:
    graph, first = edit.graph, group[0].product
    weights = [np.asarray(graph.constant(item.product.input[1])) for item in group]
    merged = edit.make(
        "MatMul",
        [first.input[0], edit.constant(np.concatenate(weights, axis=1), f"{first.input[1]}_merged")],
        edit.name(f"{first.output[0]}_merged"),
    )
    nodes, last = [merged], merged.output[0]
    if biased := all(item.bias is not None for item in group):
        nodes.append(_merged_bias(edit, group, last))
        last = nodes[-1].output[0]
    widths = edit.constant(np.array([weight.shape[1] for weight in weights], np.int64), "widths")
    outputs = [item.output if biased else item.product.output[0] for item in group]
    nodes.append(helper.make_node("Split", [last, widths], outputs, name=edit.name(f"{last}/Split"), axis=-1))
    edit.insert(*nodes, before=first)
    for item in group:
        edit.remove(item.product)
        if biased and item.bias is not None:
            edit.remove(item.bias)


def _merged_bias(edit: Edit, group: list[_Projection], product: str) -> onnx.NodeProto:
    biases = []
    for item in group:
        split = split_constant(edit.graph, cast("onnx.NodeProto", item.bias))
        biases.append(np.asarray(edit.graph.constant(cast("tuple[str, str]", split)[1])))
    bias = edit.constant(np.concatenate(biases), f"{product}_bias")
    return edit.make("Add", [product, bias], edit.name(f"{product}_biased"))
