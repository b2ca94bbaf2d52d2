"""What the engine ``torch`` changes in a quantized graph before it runs: constants as its kernels take them."""

from __future__ import annotations

import math

import numpy as np
import onnx

from hasten.graph.constants import evaluate
from hasten.graph.model import Graph, attribute, is_standard
from hasten.graph.rewrite import Edit, remove_dead
from hasten.tensors import Array

DOMAIN = "hasten.torch"
"""The domain of the operators that only this engine knows; no file ever holds them."""

QUANTIZE, DEQUANTIZE, DEQUANTIZE_WEIGHT = "Quantize", "Dequantize", "DequantizeWeight"
"""``Quantize`` and ``Dequantize`` hold one scale and zero point as attributes; ``DequantizeWeight`` takes int8 weights
and one scale for each row of their first axis."""

BOUNDS = {"uint8": (0, 255), "int8": (-128, 127)}


def with_float_constants(model: onnx.ModelProto) -> onnx.ModelProto:
    """Give a copy in which every constant that is stored quantized is stored as the float values it stands for."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    _dequantize_constants(made)
    remove_dead(made)
    return made


def with_int8_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Give a copy in which quantization is written with the operators of ``DOMAIN``, where those can express it.

    Weights of convolutions and products lie as [out, in, ...] with one scale for each ``out`` and no zero point; the
    transposition that a MatMul needs stays in the graph, as a node. Every other constant is stored in float.
    """
    made = onnx.ModelProto()
    made.CopyFrom(model)
    graph = Graph(made)
    edit = Edit(graph)
    weights = {id(node): node for node in graph.nodes if _is_weight(node, graph)}
    for node in graph.nodes:
        if id(node) in weights:
            _write_weight(node, graph, edit)
        elif (scale := _one_scale(node, graph)) is not None:
            kind = QUANTIZE if node.op_type == "QuantizeLinear" else DEQUANTIZE
            value, zero_point, dtype = scale
            fresh = edit.make(kind, node.input[:1], node.output[0], domain=DOMAIN)
            fresh.attribute.extend(
                (
                    onnx.helper.make_attribute("scale", value),
                    onnx.helper.make_attribute("zero_point", zero_point),
                    onnx.helper.make_attribute("dtype", dtype),
                )
            )
            fresh.name = node.name or fresh.name
            edit.replace(node, fresh)
    edit.commit()
    _dequantize_constants(made)
    remove_dead(made)
    made.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))
    return made


def _dequantize_constants(model: onnx.ModelProto) -> None:
    graph = Graph(model)
    edit = Edit(graph)
    for node in graph.nodes:
        if not is_standard(node) or node.op_type != "DequantizeLinear" or node.output[0] in graph.outputs:
            continue
        values = [graph.constant(name) if name else None for name in node.input]
        if all(value is not None or not name for name, value in zip(node.input, values, strict=True)):
            edit.set_constant(node.output[0], evaluate(node, values, graph.opset)[0])
            edit.remove(node)
    edit.commit()


def _is_weight(node: onnx.NodeProto, graph: Graph) -> bool:
    """Tell whether a DequantizeLinear gives symmetric int8 weights to one product of a quantized activation."""
    if not is_standard(node) or node.op_type != "DequantizeLinear":
        return False
    weight, scale, zero_point = _constants(node, graph)
    user = graph.only_consumer(node.output[0])
    if weight is None or scale is None or weight.dtype != np.int8 or user is None or not _takes_int8(user, graph):
        return False
    if user.input[1] != node.output[0] or zero_point is None or zero_point.any() or scale.dtype != np.float32:
        return False
    return scale.size == 1 or (scale.ndim == 1 and _axis(node, weight) == _out_axis(user))


def _takes_int8(user: onnx.NodeProto, graph: Graph) -> bool:
    if not is_standard(user) or user.op_type not in ("Conv", "Gemm", "MatMul"):
        return False
    source = graph.producer(user.input[0], "DequantizeLinear")
    weight = graph.specs.get(graph.producers[user.input[1]].input[0]) if user.input[1] in graph.producers else None
    flat = user.op_type == "Conv" or (weight is not None and len(weight.shape) == 2)
    return flat and source is not None and _one_scale(source, graph) is not None


def _out_axis(user: onnx.NodeProto) -> int:
    return 0 if user.op_type == "Conv" or attribute(user, "transB", 0) else 1


def _axis(node: onnx.NodeProto, weight: Array) -> int:
    axis = int(attribute(node, "axis", 1))
    return axis + weight.ndim if axis < 0 else axis


def _write_weight(node: onnx.NodeProto, graph: Graph, edit: Edit) -> None:
    user = graph.only_consumer(node.output[0])
    weight, scale, _ = _constants(node, graph)
    if user is None or weight is None or scale is None:
        raise AssertionError(f"{node.name!r} was no weight after all")
    turned = _out_axis(user) == 1
    rows = np.ascontiguousarray(weight.T) if turned else weight
    scales = np.broadcast_to(scale.reshape(-1), (rows.shape[0],))
    inputs = [edit.constant(rows, f"{node.input[0]}/rows"), edit.constant(scales, f"{node.input[0]}/scales")]
    if not turned:
        edit.replace(node, edit.make(DEQUANTIZE_WEIGHT, inputs, node.output[0], domain=DOMAIN))
        return
    name = edit.name(f"{node.output[0]}/rows")
    real = edit.make(DEQUANTIZE_WEIGHT, inputs, name, domain=DOMAIN)
    edit.replace(node, real, edit.make("Transpose", [name], node.output[0], perm=[1, 0]))


def _one_scale(node: onnx.NodeProto, graph: Graph) -> tuple[float, int, str] | None:
    """Give scale, zero point and 8-bit dtype of a node that quantizes or dequantizes an activation with one scale."""
    if not is_standard(node) or node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
        return None
    if node.input[0] in graph.initializers:
        return None
    _, scale, zero_point = _constants(node, graph)
    if scale is None or scale.size != 1 or scale.dtype != np.float32 or zero_point is None:
        return None
    value = float(scale.reshape(-1)[0])
    dtype = zero_point.dtype.name
    if dtype not in BOUNDS or zero_point.size != 1 or not math.isfinite(1 / value):
        return None
    return value, int(zero_point.reshape(-1)[0]), dtype


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
