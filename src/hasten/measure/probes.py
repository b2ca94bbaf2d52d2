"""Small ONNX models that keep an engine's multipliers busy: what its peak is measured with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from hasten.tensors import Array


@dataclass(frozen=True)
class Probe:
    """A model of one product, an input for it, and how many operations a run makes (two a multiplication)."""

    model: onnx.ModelProto
    feed: dict[str, Array]
    operations: float


MATRICES = ((384, 384, 384), (1024, 1024, 1024), (512, 2048, 2048))
"""Rows, inner length and columns: from what fits into a second-level cache to what does not."""

IMAGE = (1, 64, 56, 56)
"""Input of the 3x3 convolution with as many maps out, unpadded: a middle layer of a residual network."""


def probes(dtype: str) -> Iterator[Probe]:
    """Make the probes of a dtype: "float32" (an engine may compute it in bfloat16 if told), or "int8".

    In int8, activations are unsigned and weights signed with a scale for each column or map, between
    QuantizeLinear and DequantizeLinear: the form that engines turn into their dot-product instructions.
    """
    for rows, inner, columns in MATRICES:
        shape, weight = (rows, inner), (inner, columns)
        yield _probe("MatMul", dtype, shape, weight, 2.0 * rows * inner * columns)
    maps, height, width = IMAGE[1:]
    operations = 2.0 * maps * maps * 9 * (height - 2) * (width - 2)
    yield _probe("Conv", dtype, IMAGE, (maps, maps, 3, 3), operations)


def _probe(kind: str, dtype: str, shape: tuple[int, ...], weight: tuple[int, ...], operations: float) -> Probe:
    random = np.random.default_rng(0)
    make = _quantized if dtype == "int8" else _float
    x_type = TensorProto.UINT8 if dtype == "int8" else TensorProto.FLOAT
    nodes, weights = make(kind, weight, random)
    graph = helper.make_graph(
        nodes,
        "probe",
        [helper.make_tensor_value_info("x", x_type, shape)],
        [helper.make_tensor_value_info("y", x_type, [f"d{axis}" for axis in range(len(shape))])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    x: Array = random.integers(0, 255, shape).astype(np.uint8) if dtype == "int8" else _normal(random, shape)
    return Probe(model, {"x": x}, operations)


def _float(
    kind: str, weight: tuple[int, ...], random: np.random.Generator
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    return [helper.make_node(kind, ["x", "w"], ["y"])], [numpy_helper.from_array(_normal(random, weight), "w")]


def _quantized(
    kind: str, weight: tuple[int, ...], random: np.random.Generator
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    axis = 0 if kind == "Conv" else 1
    constants: dict[str, Array] = {
        "x_scale": np.array(0.02, np.float32),
        "x_zero": np.array(128, np.uint8),
        "w": random.integers(-127, 128, weight).astype(np.int8),
        "w_scale": np.full(weight[axis], 0.01, np.float32),
        "w_zero": np.zeros(weight[axis], np.int8),
        "y_scale": np.array(0.5, np.float32),
        "y_zero": np.array(128, np.uint8),
    }
    nodes = [
        helper.make_node("DequantizeLinear", ["x", "x_scale", "x_zero"], ["x_float"]),
        helper.make_node("DequantizeLinear", ["w", "w_scale", "w_zero"], ["w_float"], axis=axis),
        helper.make_node(kind, ["x_float", "w_float"], ["y_float"]),
        helper.make_node("QuantizeLinear", ["y_float", "y_scale", "y_zero"], ["y"]),
    ]
    return nodes, [numpy_helper.from_array(value, name) for name, value in constants.items()]


def _normal(random: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return random.standard_normal(shape).astype(np.float32)
