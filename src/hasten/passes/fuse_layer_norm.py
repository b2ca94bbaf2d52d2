"""The rule of ``fuse`` for layer normalization that an exporter spelled out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx

from hasten.graph.model import Graph
from hasten.graph.opset import raise_opset
from hasten.graph.patterns import reduced_axes, scalar, split_constant
from hasten.graph.rewrite import Edit
from hasten.tensors import DTYPES, Array


@dataclass(frozen=True)
class Norm:
    """One layer-norm: ``root`` makes its result from ``source``, over the axes from ``axis`` (negative) on."""

    root: onnx.NodeProto
    source: str
    axis: int
    epsilon: float
    scale: Array
    bias: Array | None


def fuse_layer_norm(model: onnx.ModelProto) -> int:
    """Write (x - mean) / sqrt(var + epsilon) * scale + bias as LayerNormalization (version 17). Gives the changes.

    Ba, Kiros and Hinton, "Layer Normalization", arXiv:1607.06450. Scale and bias may be missing; mean and variance
    are ReduceMean over the last axes.
    """
    if not any(_norms(Graph(model))) or not raise_opset(model, 17):
        return 0
    edit = Edit(Graph(model))
    for norm in list(_norms(edit.graph)):
        output = norm.root.output[0]
        inputs = [norm.source, edit.constant(norm.scale, f"{output}_scale")]
        if norm.bias is not None:
            inputs.append(edit.constant(norm.bias, f"{output}_bias"))
        node = edit.make("LayerNormalization", inputs, output, axis=norm.axis, epsilon=norm.epsilon)
        edit.replace(norm.root, node)
    return edit.commit()


def _norms(graph: Graph) -> Iterator[Norm]:
    for node in graph.nodes:
        if node.op_type in ("Div", "Mul") and (norm := _norm(graph, node)) is not None:
            yield norm


def _norm(graph: Graph, node: onnx.NodeProto) -> Norm | None:
    """Match ``node`` as the division of the centred tensor by the standard deviation."""
    parts = _quotient(graph, node)
    if parts is None:
        return None
    centred, deviation = parts
    subtract = graph.producer(centred, "Sub")
    mean = graph.producer(subtract.input[1], "ReduceMean") if subtract is not None else None
    root = graph.producer(deviation, "Sqrt")
    shifted = graph.producer(root.input[0], "Add") if root is not None else None
    if subtract is None or mean is None or shifted is None or mean.input[0] != subtract.input[0]:
        return None
    split = split_constant(graph, shifted)
    epsilon = scalar(graph, split[1]) if split else None
    variance = graph.producer(split[0], "ReduceMean") if split else None
    if epsilon is None or variance is None or not _is_square(graph, variance.input[0], centred):
        return None
    axes = _last_axes(graph, mean, subtract.input[0])
    if axes is None or axes != _last_axes(graph, variance, centred):
        return None
    return _with_scale(graph, node, subtract.input[0], axes, epsilon)


def _quotient(graph: Graph, node: onnx.NodeProto) -> tuple[str, str] | None:
    """Read a / b, or a * Reciprocal(b)."""
    if node.op_type == "Div":
        return node.input[0], node.input[1]
    for a, b in (tuple(node.input), tuple(reversed(node.input))):
        if (inverse := graph.producer(b, "Reciprocal")) is not None:
            return a, inverse.input[0]
    return None


def _is_square(graph: Graph, name: str, centred: str) -> bool:
    node = graph.producer(name, "Pow", "Mul")
    if node is None or node.input[0] != centred:
        return False
    return node.input[1] == centred if node.op_type == "Mul" else scalar(graph, node.input[1]) == 2.0


def _last_axes(graph: Graph, node: onnx.NodeProto, source: str) -> tuple[int, ...] | None:
    """Give a Reduce's axes as negative numbers if they are the last ones, else None."""
    axes, spec = reduced_axes(graph, node), graph.specs.get(source)
    if not axes or spec is None:
        return None
    rank = len(spec.shape)
    negative = tuple(sorted(axis - rank if axis >= 0 else axis for axis in axes))
    lengths = spec.shape[negative[0] :]
    ordered = negative == tuple(range(-len(axes), 0)) and all(isinstance(dim, int) for dim in lengths)
    return negative if ordered else None


def _with_scale(graph: Graph, node: onnx.NodeProto, source: str, axes: tuple[int, ...], epsilon: float) -> Norm:
    """Take the multiplication and addition behind a plain norm with it, where they are per normalized element."""
    lengths = tuple(int(dim) for dim in graph.specs[source].shape[axes[0] :])
    dtype = DTYPES[graph.specs[source].dtype]
    scale, bias = np.ones(lengths, dtype), None
    last = node
    if (found := _per_element(graph, last, "Mul", lengths)) is not None:
        last, scale = found
    if (found := _per_element(graph, last, "Add", lengths)) is not None:
        last, bias = found
    return Norm(last, source, axes[0], epsilon, scale, bias)


def _per_element(
    graph: Graph, node: onnx.NodeProto, kind: str, lengths: tuple[int, ...]
) -> tuple[onnx.NodeProto, Array] | None:
    user = graph.only_consumer(node.output[0])
    split = split_constant(graph, user) if user is not None and user.op_type == kind else None
    if user is None or split is None:
        return None
    tensor = graph.initializers[split[1]]
    dims = tuple(tensor.dims)
    leading, own = dims[: -len(lengths)], dims[-len(lengths) :]
    if any(dim != 1 for dim in leading) or len(dims) > len(graph.specs[node.output[0]].shape):
        return None
    if len(own) != len(lengths) or any(dim not in (1, length) for dim, length in zip(own, lengths, strict=True)):
        return None
    value = np.asarray(graph.constant(split[1]))
    return user, np.array(np.broadcast_to(value.reshape(own), lengths))
