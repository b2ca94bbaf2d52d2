"""How channels pass through operators that compute: products with weights, normalizations, reductions, arithmetic.

The semantics are those of the ONNX operator specification, https://onnx.ai/onnx/operators.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx

from hasten.graph.channels import Channels, Ints, Labels, Rule, said
from hasten.graph.model import attribute

UNARY = (
    *("Relu", "LeakyRelu", "Sigmoid", "Tanh", "Elu", "Selu", "Celu", "HardSigmoid", "HardSwish", "Softplus"),
    *("Softsign", "Mish", "Gelu", "Swish", "ThresholdedRelu", "Shrink", "Erf", "Exp", "Log", "Sqrt", "Abs", "Neg"),
    *("Reciprocal", "Floor", "Ceil", "Round", "Sign", "Sin", "Cos", "Not", "IsNaN", "IsInf", "Identity", "Cast"),
    *("CastLike", "Clip"),
)
"""Operators that compute each element from the one at its place in the first input; other inputs are scalars."""

BROADCASTING = (
    *("Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "Mean", "Sum", "Mod", "Where", "PRelu", "And", "Or", "Xor"),
    *("Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual"),
)
"""Operators that compute each element from those at its place in all inputs, broadcast to one shape."""


def broadcast(channels: Channels, operands: Sequence[Labels]) -> Labels:
    """Join operands' labels as broadcasting aligns them, from the last axis on; give those of the result."""
    rank = max(map(len, operands))
    result = []
    for axis in range(-rank, 0):
        found = [labels[axis] for labels in operands if len(labels) >= -axis]
        length = next((len(item) for item in found if len(item) != 1), 1)
        wide = [item for item in found if len(item) == length]
        for item in wide[1:]:
            channels.join(wide[0], item)
        result.append(wide[0])
    return tuple(result)


def normal_axis(axis: int, rank: int) -> int:
    """Give an axis counted from the front."""
    return axis + rank if axis < 0 else axis


def _same(channels: Channels, node: onnx.NodeProto) -> Sequence[Labels]:
    return [channels.of(node.input[0])]


def _dropout(channels: Channels, node: onnx.NodeProto) -> Sequence[Labels]:
    return [channels.of(node.input[0])] * len(node.output)


def _arithmetic(channels: Channels, node: onnx.NodeProto) -> Sequence[Labels]:
    # A weight's labels are not known to stay until the end: those of an activation tell more on the way.
    names = sorted((name for name in node.input if name), key=lambda name: name in channels.constants)
    return [broadcast(channels, [channels.of(name) for name in names])]


def _convolution(channels: Channels, node: onnx.NodeProto) -> Sequence[Labels] | str:
    return _convolved(channels, node, out_axis=0)


def _transposed_convolution(channels: Channels, node: onnx.NodeProto) -> Sequence[Labels] | str:
    return _convolved(channels, node, out_axis=1)


def _convolved(channels: Channels, node: onnx.NodeProto, out_axis: int) -> Sequence[Labels] | str:
    """The weight is [out, in / groups, ...] for Conv, [in, out / groups, ...] for ConvTranspose."""
    if node.input[1] not in channels.constants:
        return f"the weight of {said(node)} is computed"
    x, weight, bias = channels.of(node.input[0]), channels.of(node.input[1]), channels.given(node, 2)
    groups = attribute(node, "group", 1)
    for axis in (*x[2:], *weight[2:]):
        channels.stay(axis, f"{said(node)} slides over it")
    if groups == 1:
        channels.join(x[1], weight[1 - out_axis])
        channels.reads.append(weight[1 - out_axis])
        made = out = weight[out_axis]
    else:
        # A group of the convolution is one unit: it takes its channels and gives its channels alone.
        made, n = weight[0], channels.shape(node.output[0])[1]
        channels.stay(weight[1], f"{said(node)} mixes the channels of each of its groups")
        first = _blocks(channels, x[1], groups)
        _join_blocks(channels, first, made)
        out = made if out_axis == 0 else first.repeat(n // groups)
    channels.makes.append((node, made))
    if bias is not None:
        channels.join(out, bias[0])
        channels.makes.append((node, bias[0]))
    return [(x[0], out, *_positions(channels, node))]


def _blocks(channels: Channels, labels: Ints, n: int) -> Ints:
    """Join the entries of each of ``n`` equal blocks; give the first of each."""
    blocks = labels.reshape(n, -1)
    channels.join(blocks[:, :1], blocks)
    return blocks[:, 0]


def _join_blocks(channels: Channels, first: Ints, labels: Ints) -> None:
    channels.join(first[:, None], labels.reshape(len(first), -1))


def _positions(channels: Channels, node: onnx.NodeProto) -> list[Ints]:
    """Label the axes behind the channels anew: windows mix what lies along them."""
    return [channels.fixed(n, f"{said(node)} slides over it") for n in channels.shape(node.output[0])[2:]]


def _pooling(channels: Channels, node: onnx.NodeProto) -> Sequence[Labels]:
    x = channels.of(node.input[0])
    for axis in x[2:]:
        channels.stay(axis, f"{said(node)} slides over it")
    if any(name in channels.graph.consumers or name in channels.graph.outputs for name in node.output[1:]):
        channels.stay(x[1], f"{said(node)} gives places that count over all channels")
    return [(*x[:2], *_positions(channels, node))]


def _product(channels: Channels, node: onnx.NodeProto, a: Labels, b: Labels) -> Labels:
    """[..., m, k] x [..., k, n] -> [..., m, n]."""
    channels.join(a[-1], b[-2])
    if node.input[1] in channels.constants:
        channels.reads.append(b[-2])
        channels.makes.append((node, b[-1]))
    elif node.input[0] in channels.constants:
        channels.reads.append(a[-1])
        channels.makes.append((node, a[-2]))
    else:
        channels.mixed.append(a[-1])
    leading = broadcast(channels, [a[:-2], b[:-2]]) if len(a) > 2 or len(b) > 2 else ()
    return (*leading, a[-2], b[-1])


def _matmul(channels: Channels, node: onnx.NodeProto) -> Sequence[Labels] | str:
    a, b = channels.of(node.input[0]), channels.of(node.input[1])
    if min(len(a), len(b)) < 2:
        return f"{said(node)} multiplies with a vector"
    return [_product(channels, node, a, b)]


def _gemm(channels: Channels, node: onnx.NodeProto) -> Sequence[Labels]:
    a, b, c = channels.of(node.input[0]), channels.of(node.input[1]), channels.given(node, 2)
    a = a[::-1] if attribute(node, "transA", 0) else a
    b = b[::-1] if attribute(node, "transB", 0) else b
    made = _product(channels, node, a, b)
    if c is not None:
        broadcast(channels, [made, c])
        if node.input[2] in channels.constants and c:
            channels.makes.append((node, c[-1]))
    return [made]


def _einsum(channels: Channels, node: onnx.NodeProto) -> Sequence[Labels] | str:
    """Letters are axes: those that the result lacks are summed over."""
    left, arrow, result = str(attribute(node, "equation")).replace(" ", "").partition("->")
    terms = left.split(",")
    if not arrow or "." in left or any(len(set(term)) < len(term) for term in (*terms, result)):
        return f"{said(node)} has an equation that repeats or leaves out letters"
    axes: dict[str, Ints] = {}
    weights = [name in channels.constants for name in node.input]
    for term, name, weight in zip(terms, node.input, weights, strict=True):
        for letter, labels in zip(term, channels.of(name), strict=True):
            known = axes.get(letter, labels)
            if len(known) == len(labels):
                channels.join(known, labels)
            axes[letter] = known if len(known) >= len(labels) else labels
            if letter not in result:
                (channels.reads if weight else channels.mixed if not any(weights) else []).append(labels)
            elif weight and sum(letter in other for other in terms) == 1:
                channels.makes.append((node, labels))
    return [tuple(axes[letter] for letter in result)]


def _batch_norm(channels: Channels, node: onnx.NodeProto) -> Sequence[Labels] | str:
    x = channels.of(node.input[0])
    if len(x) < 2:
        return f"{said(node)} has no channel axis"
    for name in node.input[1:]:
        channels.join(x[1], channels.of(name)[0])
    return [x, *((x[1],) for _ in node.output[1:])]


def _instance_norm(channels: Channels, node: onnx.NodeProto) -> Sequence[Labels]:
    x = channels.of(node.input[0])
    for name in node.input[1:]:
        channels.join(x[1], channels.of(name)[0])
    channels.mixed += x[2:]
    return [x]


def _group_norm(channels: Channels, node: onnx.NodeProto) -> Sequence[Labels]:
    """Scale and bias are [channels], before operator set 21 [groups]."""
    x = channels.of(node.input[0])
    first = _blocks(channels, x[1], attribute(node, "num_groups"))
    for name in node.input[1:]:
        _join_blocks(channels, first, channels.of(name)[0])
    channels.mixed += x[2:]
    return [x]


def _layer_norm(channels: Channels, node: onnx.NodeProto) -> Sequence[Labels]:
    x = channels.of(node.input[0])
    axis = normal_axis(attribute(node, "axis", -1), len(x))
    channels.mixed += x[axis:]
    return [broadcast(channels, [x, *(channels.of(name) for name in node.input[1:] if name)])]


def _softmax(channels: Channels, node: onnx.NodeProto) -> Sequence[Labels]:
    """Before operator set 13 it goes over the axis and all behind it."""
    x, old = channels.of(node.input[0]), channels.graph.opset < 13
    axis = normal_axis(attribute(node, "axis", 1 if old else -1), len(x))
    for labels in x[axis:] if old else x[axis : axis + 1]:
        channels.stay(labels, f"{said(node)} goes over the channels")
    return [x]


def _reduction(channels: Channels, node: onnx.NodeProto) -> Sequence[Labels] | str:
    """An average over channels is another one without those that are cut; any other reduction keeps its axes."""
    x = channels.of(node.input[0])
    axes: list[int] | None = attribute(node, "axes")
    if axes is None and len(node.input) > 1 and node.input[1]:
        value = channels.bound.constant(node, 1)
        if value is None:
            return f"the axes of {said(node)} are computed"
        axes = [int(axis) for axis in value.reshape(-1)]
    if not axes:
        axes = [] if attribute(node, "noop_with_empty_axes", 0) else list(range(len(x)))
    reduced = {normal_axis(axis, len(x)) for axis in axes}
    for axis in reduced:
        if node.op_type == "ReduceMean":
            channels.mixed.append(x[axis])
        else:
            channels.stay(x[axis], f"{said(node)} goes over the channels")
    why = f"{said(node)} reduces it"
    kept = attribute(node, "keepdims", 1)
    result = [channels.fixed(1, why) if i in reduced else labels for i, labels in enumerate(x)]
    return [tuple(labels for i, labels in enumerate(result) if kept or i not in reduced)]


def _embedding(channels: Channels, node: onnx.NodeProto) -> Sequence[Labels]:
    """A table's columns are channels that its lookup makes; what is picked from stays as long as it is."""
    data, indices = channels.of(node.input[0]), channels.of(node.input[1])
    axis = normal_axis(attribute(node, "axis", 0), len(data))
    channels.stay(data[axis], f"{said(node)} picks from it by index")
    for labels in indices:
        channels.stay(labels, f"{said(node)} picks by it")
    if node.input[0] in channels.constants and len(data) > 1 and node.input[1] not in channels.constants:
        channels.makes += ((node, labels) for i, labels in enumerate(data) if i != axis)
    return [(*data[:axis], *indices, *data[axis + 1 :])]


def _quantization(channels: Channels, node: onnx.NodeProto) -> Sequence[Labels] | str:
    x = channels.of(node.input[0])
    for place in range(1, len(node.input)):
        labels = channels.given(node, place)
        if labels is None or not labels or len(labels[0]) == 1:
            continue
        if len(labels) > 1 or attribute(node, "block_size", 0):
            return f"{said(node)} has a scale for each block"
        channels.join(x[normal_axis(attribute(node, "axis", 1), len(x))], labels[0])
    return [x]


LAYERS: Mapping[str, Rule] = {
    **dict.fromkeys(UNARY, _same),
    **dict.fromkeys(BROADCASTING, _arithmetic),
    **dict.fromkeys(
        ("MaxPool", "AveragePool", "LpPool", "GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"), _pooling
    ),
    **dict.fromkeys(("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2"), _reduction),
    **dict.fromkeys(("ReduceSumSquare", "ReduceProd", "ReduceLogSumExp", "ReduceLogSum"), _reduction),
    **dict.fromkeys(("LayerNormalization", "RMSNormalization"), _layer_norm),
    **dict.fromkeys(("Softmax", "LogSoftmax", "Hardmax"), _softmax),
    **dict.fromkeys(("QuantizeLinear", "DequantizeLinear"), _quantization),
    "Dropout": _dropout,
    "Conv": _convolution,
    "ConvTranspose": _transposed_convolution,
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Einsum": _einsum,
    "BatchNormalization": _batch_norm,
    "InstanceNormalization": _instance_norm,
    "GroupNormalization": _group_norm,
    "Gather": _embedding,
}
"""Operators that compute."""
