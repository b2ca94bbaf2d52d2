"""Quantized and half-precision variants of the small models, written by hand: the tests need no pass for them."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

WEIGHTS = (-63, 64)
"""Seven bits: on processors without VNNI, ONNX Runtime adds two products of 8 bits in 16 and saturates beyond."""

OPSET = [helper.make_opsetid("", 20)]


def qdq_conv() -> onnx.ModelProto:
    """Make x [batch, 8, 16, 16] -> Conv, Relu in QDQ form -> y: u8 activations, per-channel s8 weights."""
    random = np.random.default_rng(0)
    weight = random.integers(*WEIGHTS, (8, 8, 3, 3)).astype(np.int8)
    constants = {
        "w": weight,
        "ws": random.uniform(0.001, 0.002, 8).astype(np.float32),
        "wz": np.zeros(8, np.int8),
        "s": np.float32(0.03),
        "z": np.uint8(128),
        "s2": np.float32(0.05),
        "z2": np.uint8(0),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"], name="quantize_x"),
        helper.make_node("DequantizeLinear", ["xq", "s", "z"], ["xd"], name="dequantize_x"),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], name="dequantize_w", axis=0),
        helper.make_node("Conv", ["xd", "wd"], ["c"], name="conv", pads=[1] * 4),
        helper.make_node("Relu", ["c"], ["r"], name="relu"),
        helper.make_node("QuantizeLinear", ["r", "s2", "z2"], ["rq"], name="quantize_y"),
        helper.make_node("DequantizeLinear", ["rq", "s2", "z2"], ["y"], name="dequantize_y"),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ("batch", 8, 16, 16)) for name in "xy"]
    weights = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "qdq", ends[:1], ends[1:], weights)
    return helper.make_model(graph, opset_imports=OPSET, ir_version=10)


def halved(model: onnx.ModelProto) -> onnx.ModelProto:
    """Give the model with every float tensor in float16."""
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    return model


def single(kind: str, dtype: int, *, domain: str = "", inputs: int = 1, **attributes: object) -> onnx.ModelProto:
    """Make x [batch, 4] -> one node called "only" -> y [batch, 4]."""
    node = helper.make_node(kind, ["x"] * inputs, ["y"], name="only", domain=domain, **attributes)
    ends = [helper.make_tensor_value_info(name, dtype, ("batch", 4)) for name in "xy"]
    opsets = [*OPSET, *([helper.make_opsetid(domain, 1)] if domain else [])]
    return helper.make_model(
        helper.make_graph([node], "single", ends[:1], ends[1:]), opset_imports=opsets, ir_version=10
    )
