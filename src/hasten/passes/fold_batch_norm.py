"""Rules of ``fold`` that put a scale and a shift per channel into the layer before them.

Batch normalization at inference is y = x * f + s with f = scale / sqrt(var + epsilon) and s = shift - mean * f, per
channel; after a linear layer W, b it is the layer W * f, b * f + s (Jacob et al., "Quantization and Training of Neural
Networks for Efficient Integer-Arithmetic-Only Inference", CVPR 2018, arXiv:1712.05877, section 3.2). Only this
direction is done: before a convolution with padding the shift would have to reach into the padding, which is zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx

from hasten.graph.model import Graph, attribute, is_standard
from hasten.graph.rewrite import Edit
from hasten.tensors import Array

Wide = npt.NDArray[np.float64]

LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul")


@dataclass(frozen=True)
class Affine:
    """y = x * factor + shift along the channels; each is float64, [channels] or [1]."""

    factor: Wide
    shift: Wide


_Reader = Callable[[Graph, onnx.NodeProto], tuple[str, Affine] | None]


def fold_batch_norm(model: onnx.ModelProto) -> int:
    """Put each batch-norm into the Conv, ConvTranspose, Gemm or MatMul before it. Gives the number of changes."""
    return _fold_into_linear(model, _batch_norm)


def fold_scales(model: onnx.ModelProto) -> int:
    """Put multiplication and addition of constants per channel into the layer before. Gives the number of changes."""
    return _fold_into_linear(model, _arithmetic)


def affine_of_batch_norm(scale: Array, shift: Array, mean: Array, variance: Array, epsilon: float) -> Affine:
    """Give batch-norm's factor and shift; arguments are [channels]."""
    factor = scale.astype(np.float64) / np.sqrt(variance.astype(np.float64) + epsilon)
    return Affine(factor, shift.astype(np.float64) - mean.astype(np.float64) * factor)


def scale_weight(node: onnx.NodeProto, weight: Array, factor: Wide) -> Wide:
    """Multiply a linear layer's weight by ``factor`` [channels] or [1] along its outputs, in float64.

    Conv has [out, in / group, ...], ConvTranspose [in, out / group, ...], Gemm [in, out] or with transB [out, in],
    MatMul [..., in, out].
    """
    wide = weight.astype(np.float64)
    if node.op_type == "Conv" or (node.op_type == "Gemm" and attribute(node, "transB", 0)):
        return np.asarray(wide * factor.reshape(-1, *[1] * (wide.ndim - 1)))
    if node.op_type in ("Gemm", "MatMul"):
        return np.asarray(wide * factor)
    group: int = attribute(node, "group", 1)
    split = wide.reshape(group, -1, *wide.shape[1:])  # [group, in / group, out / group, ...]
    per_group = factor.reshape(group, 1, -1, *[1] * (wide.ndim - 2)) if factor.size > 1 else factor
    return np.asarray(split * per_group).reshape(wide.shape)


def _fold_into_linear(model: onnx.ModelProto, reader: _Reader) -> int:
    graph = Graph(model)
    edit = Edit(graph)
    touched: set[int] = set()
    for node in graph.nodes:
        found = reader(graph, node)
        if found is None:
            continue
        name, affine = found
        linear = graph.producer(name, *LINEAR)
        if linear is None or id(linear) in touched or graph.only_consumer(name) is not node:
            continue
        fused = _fused(graph, edit, linear, node.output[0], affine)
        if fused is not None:
            touched |= {id(linear), id(node)}
            edit.replace(node, fused)
            edit.remove(linear)
    return edit.commit()


def _fused(graph: Graph, edit: Edit, linear: onnx.NodeProto, output: str, affine: Affine) -> onnx.NodeProto | None:
    """Make the layer with ``affine`` in its weight and bias, or give None where that cannot be."""
    weight = graph.constant(linear.input[1])
    if weight is None or weight.dtype.kind != "f" or weight.ndim < 2:
        return None
    channels = _channels(linear, weight)
    if any(array.size not in (1, channels) for array in (affine.factor, affine.shift)):
        return None
    bias = _bias(graph, linear, channels)
    if bias is None:
        return None
    new_weight = scale_weight(linear, weight, affine.factor).astype(weight.dtype)
    new_bias = np.broadcast_to(bias * affine.factor + affine.shift, (channels,)).astype(weight.dtype)
    if not (np.isfinite(new_weight).all() and np.isfinite(new_bias).all()):
        return None
    if linear.op_type == "MatMul" and new_bias.any() and weight.ndim != 2:
        return None
    return _rebuilt(graph, edit, linear, output, (new_weight, new_bias))


def _rebuilt(
    graph: Graph, edit: Edit, linear: onnx.NodeProto, output: str, values: tuple[Array, Array]
) -> onnx.NodeProto | None:
    weight, bias = values
    kind = linear.op_type
    attributes = {item.name: onnx.helper.get_attribute_value(item) for item in linear.attribute}
    if kind == "MatMul" and bias.any():
        spec = graph.specs.get(linear.input[0])
        if spec is None or len(spec.shape) != 2:
            return None  # only a product of two matrices is a Gemm; MatMul has no bias
        kind = "Gemm"
    attributes.pop("beta", None)
    inputs = [linear.input[0], edit.constant(weight, f"{linear.input[1]}_folded")]
    if kind != "MatMul":
        inputs.append(edit.constant(bias, f"{output}_bias"))
    node = edit.make(kind, inputs, output, **attributes)
    node.name = linear.name or node.name
    return node


def _channels(linear: onnx.NodeProto, weight: Array) -> int:
    if linear.op_type == "ConvTranspose":
        group: int = attribute(linear, "group", 1)
        return int(weight.shape[1]) * group
    if linear.op_type == "Conv" or (linear.op_type == "Gemm" and attribute(linear, "transB", 0)):
        return int(weight.shape[0])
    return int(weight.shape[-1])


def _bias(graph: Graph, linear: onnx.NodeProto, channels: int) -> Wide | None:
    """Give the bias in float64, [channels] or [1]; None where it is no constant, or differs between rows."""
    if len(linear.input) < 3 or not linear.input[2]:
        return np.zeros(1)
    bias = graph.constant(linear.input[2])
    if bias is None or bias.size not in (1, channels) or (bias.ndim > 1 and bias.shape[-1] != bias.size):
        return None
    beta: float = attribute(linear, "beta", 1.0) if linear.op_type == "Gemm" else 1.0
    return np.asarray(bias.reshape(-1).astype(np.float64) * beta)


def _batch_norm(graph: Graph, node: onnx.NodeProto) -> tuple[str, Affine] | None:
    if not is_standard(node) or node.op_type != "BatchNormalization" or attribute(node, "training_mode", 0):
        return None
    if any(node.output[1:]) or attribute(node, "spatial", 1) != 1 or graph.opset < 7:
        return None  # before version 7, training was an attribute of another name
    values = [graph.constant(name) for name in node.input[1:]]
    epsilon: float = attribute(node, "epsilon", 1e-5)
    scale, shift, mean, variance = values
    if scale is None or shift is None or mean is None or variance is None:
        return None
    linear = graph.producer(node.input[0], *LINEAR)
    if linear is not None and linear.op_type == "MatMul" and not _is_matrix(graph, node.input[0]):
        return None  # the channels of batch-norm are axis 1, which is a MatMul's last only in a matrix
    if not (variance.astype(np.float64) + epsilon > 0).all():
        return None
    return node.input[0], affine_of_batch_norm(scale, shift, mean, variance, epsilon)


def _is_matrix(graph: Graph, name: str) -> bool:
    spec = graph.specs.get(name)
    return spec is not None and len(spec.shape) == 2


def _arithmetic(graph: Graph, node: onnx.NodeProto) -> tuple[str, Affine] | None:
    if not is_standard(node) or node.op_type not in ("Mul", "Div", "Add", "Sub"):
        return None
    for place in (0, 1):
        linear = graph.producer(node.input[place], *LINEAR)
        constant = graph.constant(node.input[1 - place])
        if linear is None or constant is None or constant.dtype.kind != "f":
            continue
        weight = graph.initializers.get(linear.input[1])
        if weight is None or (value := _per_channel(graph, linear, constant, node.input[place])) is None:
            return None
        affine = _affine(node.op_type, value, constant_first=place == 1)
        return None if affine is None else (node.input[place], affine)
    return None


def _per_channel(graph: Graph, linear: onnx.NodeProto, constant: Array, result: str) -> Wide | None:
    """Give ``constant`` as [channels] or [1] in float64, where it is one number per channel of ``result``."""
    spec = graph.specs.get(result)
    if spec is None or constant.ndim > len(spec.shape):
        return None
    if constant.size == 1:
        return constant.reshape(1).astype(np.float64)
    axis = 1 if linear.op_type.startswith("Conv") else len(spec.shape) - 1
    place = axis - (len(spec.shape) - constant.ndim)
    if place < 0 or constant.shape[place] != constant.size or spec.shape[axis] != constant.size:
        return None
    return constant.reshape(-1).astype(np.float64)


def _affine(kind: str, value: Wide, *, constant_first: bool) -> Affine | None:
    one, zero = np.ones(1), np.zeros(1)
    if kind == "Mul":
        return Affine(value, zero)
    if kind == "Div":
        return None if constant_first or (value == 0).any() else Affine(one / value, zero)
    if kind == "Add":
        return Affine(one, value)
    return Affine(-one, value) if constant_first else Affine(one, -value)
