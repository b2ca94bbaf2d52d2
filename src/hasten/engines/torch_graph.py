"""What the engine ``torch`` changes in a quantized graph before it runs: constants as its kernels take them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx

from hasten.graph.constants import evaluate
from hasten.graph.model import Graph, attribute, is_standard
from hasten.graph.rewrite import Edit, remove_dead
from hasten.tensors import Array

BOUNDS = {"uint8": (0, 255), "int8": (-128, 127)}
"""Smallest and largest value of the 8-bit dtypes."""

PRODUCTS = ("Conv", "Gemm", "MatMul")
"""The operators that have int8 kernels."""


def with_float_constants(model: onnx.ModelProto) -> onnx.ModelProto:
    """Give a copy in which every constant that is stored quantized is stored as the float values it stands for."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    graph = Graph(made)
    edit = Edit(graph)
    for node in graph.nodes:
        _dequantize(node, graph, edit)
    edit.commit()
    remove_dead(made)
    return made


def with_int8_weights(model: onnx.ModelProto) -> tuple[onnx.ModelProto, int]:
    """Give a copy with the weights of quantized products as PyTorch's int8 kernels take them, and how many those are.

    They lie as [out, in, ...], with a vector of one scale for each ``out``; the transposition that a MatMul needs
    stays in the graph, as a node. Every other constant is stored in float.
    """
    made = onnx.ModelProto()
    made.CopyFrom(model)
    graph = Graph(made)
    edit = Edit(graph)
    count = 0
    for node in graph.nodes:
        if (found := _int8_weight(node, graph)) is None:
            _dequantize(node, graph, edit)
        else:
            _write_weight(node, found, edit)
            count += 1
    edit.commit()
    remove_dead(made)
    return made, count


def one_scale(node: onnx.NodeProto, graph: Graph) -> tuple[float, int, str] | None:
    """Give scale, zero point and 8-bit dtype of a node that quantizes or dequantizes an activation with one scale."""
    if not is_standard(node) or node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
        return None
    value, scale, zero_point = _constants(node, graph)
    if value is not None or scale is None or scale.size != 1 or scale.dtype != np.float32 or zero_point is None:
        return None
    number, dtype = float(scale.reshape(-1)[0]), zero_point.dtype.name
    if dtype not in BOUNDS or zero_point.size != 1 or not (number > 0 and math.isfinite(1 / number)):
        return None
    return number, int(zero_point.reshape(-1)[0]), dtype


def _dequantize(node: onnx.NodeProto, graph: Graph, edit: Edit) -> None:
    """Store what a DequantizeLinear makes of constants; leave any other node alone."""
    if not is_standard(node) or node.op_type != "DequantizeLinear" or node.output[0] in graph.outputs:
        return
    values = [graph.constant(name) for name in node.input if name]
    if all(value is not None for value in values):
        edit.set_constant(node.output[0], evaluate(node, values, graph.opset)[0])
        edit.remove(node)


@dataclass(frozen=True)
class _Weight:
    """Symmetric int8 weights beside a quantized activation; the outputs lie along the second axis if ``turned``."""

    values: Array
    scale: Array
    turned: bool


def _int8_weight(node: onnx.NodeProto, graph: Graph) -> _Weight | None:
    """Give what a DequantizeLinear makes real, if those are the weights of one product that has an int8 kernel."""
    if not is_standard(node) or node.op_type != "DequantizeLinear":
        return None
    values, scale, zero_point = _constants(node, graph)
    user = graph.only_consumer(node.output[0])
    if values is None or scale is None or zero_point is None or user is None or not _takes_int8(user, node, graph):
        return None
    if values.dtype != np.int8 or scale.dtype != np.float32 or zero_point.any():
        return None
    turned = user.op_type != "Conv" and not attribute(user, "transB", 0)
    along = scale.ndim == 1 and int(attribute(node, "axis", 1)) % values.ndim == int(turned)
    flat = user.op_type == "Conv" or values.ndim == 2
    return _Weight(values, scale, turned) if flat and (scale.size == 1 or along) else None


def _takes_int8(user: onnx.NodeProto, weight: onnx.NodeProto, graph: Graph) -> bool:
    if not is_standard(user) or user.op_type not in PRODUCTS or user.input[1] != weight.output[0]:
        return False
    source = graph.producer(user.input[0], "DequantizeLinear")
    return source is not None and one_scale(source, graph) is not None


def _write_weight(node: onnx.NodeProto, weight: _Weight, edit: Edit) -> None:
    rows = weight.values.T if weight.turned else weight.values
    scales = np.broadcast_to(weight.scale.reshape(-1), (rows.shape[0],))
    parts = {"rows": rows, "scales": scales, "zeros": np.zeros(len(scales), np.int8)}
    inputs = [edit.constant(value, f"{node.input[0]}/{part}") for part, value in parts.items()]
    name = edit.name(f"{node.output[0]}/rows") if weight.turned else node.output[0]
    real = edit.make("DequantizeLinear", inputs, name, axis=0)
    turn = [edit.make("Transpose", [name], node.output[0], perm=[1, 0])] if weight.turned else []
    edit.replace(node, real, *turn)


def _constants(node: onnx.NodeProto, graph: Graph) -> tuple[Array | None, Array | None, Array | None]:
    """Give what is quantized, its scale and its zero point, each where it is constant.

    A zero point that is left out is zero, of the dtype that is dequantized, or uint8.
    """
    value, scale = (graph.constant(name) for name in node.input[:2])
    if len(node.input) > 2 and node.input[2]:
        return value, scale, graph.constant(node.input[2])
    if node.op_type == "DequantizeLinear":
        dtype = value.dtype if value is not None else np.dtype(graph.dtypes.get(node.input[0], "float32"))
    elif attribute(node, "output_dtype", 0):
        dtype = onnx.helper.tensor_dtype_to_np_dtype(attribute(node, "output_dtype"))
    else:
        dtype = np.dtype(np.uint8)
    return value, scale, np.zeros((), dtype)
