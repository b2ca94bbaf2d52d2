"""Bias correction: what int8 adds to the mean of each output channel is taken off the bias.

M. Nagel et al., "Data-free quantization through weight equalization and bias correction" (arXiv 1906.04721), the
empirical form. The expected error of a layer is measured on the *float* model's inputs to it: once every earlier
layer is corrected, that is the mean its int8 inputs have too. So one pass over the samples corrects all layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from hasten.graph.model import Graph
from hasten.passes.activations import observe
from hasten.passes.placement import CONVOLUTIONS
from hasten.passes.qdq import Scale, Weight
from hasten.samples import Samples
from hasten.transform import Context

Vector = npt.NDArray[np.float32]


def mean_errors(
    model: onnx.ModelProto,
    scales: Mapping[str, Scale],
    weights: Mapping[str, Weight],
    samples: Samples,
    ctx: Context,
) -> dict[str, Vector]:
    """Give for each node of ``weights`` the mean over samples and positions of int8 output - float output, by channel.

    Args:
        model: The float model, its nodes ``named``.
        scales: Of the nodes' inputs, by tensor.
        weights: By node.
        samples: To take the mean over.
        ctx: For the scratch file and the progress.
    """
    if not weights:
        return {}
    scratch, outputs = _beside(model, scales, weights)
    sums = {name: np.zeros(0) for name in weights}
    batches = 0
    for values, done in observe(scratch, list(outputs.values()), samples, ctx):
        batches += 1
        ctx.progress("measuring the mean error of each layer", done)
        for name, output in outputs.items():
            if output in values:
                sums[name] = values[output].astype(np.float64) + (sums[name] if sums[name].size else 0.0)
    runs = max(1, batches)
    return {name: (total / runs).astype(np.float32) for name, total in sums.items()}


def corrected(
    model: onnx.ModelProto, errors: Mapping[str, Vector]
) -> tuple[onnx.ModelProto, dict[str, Vector], tuple[str, ...]]:
    """Take ``errors`` off the biases.

    A MatMul has no bias; where the one node that reads it is an Add of a constant vector, that is corrected.

    Returns:
        A copy of the model with new constants in such Adds, the new biases of all other nodes by name, and the
        names of the MatMuls that have no bias to correct.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = Graph(copy)
    biases: dict[str, Vector] = {}
    left: list[str] = []
    for node in copy.graph.node:
        if node.name not in errors:
            continue
        error = errors[node.name]
        if node.op_type != "MatMul":
            old = graph.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else np.float32(0)
            biases[node.name] = (np.asarray(old) - error).astype(np.float32)
        elif not _correct_add(graph, node, error):
            left.append(node.name)
    return copy, biases, tuple(left)


def _correct_add(graph: Graph, matmul: onnx.NodeProto, error: Vector) -> bool:
    add = graph.only_consumer(matmul.output[0])
    if add is None or add.op_type != "Add":
        return False
    at = 1 if add.input[0] == matmul.output[0] else 0
    old = graph.constant(add.input[at])
    if old is None or old.shape != error.shape:
        return False
    name = f"{add.input[at]}_corrected_{matmul.name}"
    graph.model.graph.initializer.append(numpy_helper.from_array(np.asarray(old, np.float32) - error, name))
    add.input[at] = name
    return True


def _beside(
    model: onnx.ModelProto, scales: Mapping[str, Scale], weights: Mapping[str, Weight]
) -> tuple[onnx.ModelProto, dict[str, str]]:
    """Give the float model with an int8 twin beside each node, and the outputs that hold their mean differences."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    scratch = _Scratch(copy)
    outputs = {}
    for node in list(copy.graph.node):
        if node.name in weights:
            quantized = scratch.rounded(node.input[0], scales[node.input[0]])
            twin = onnx.NodeProto()
            twin.CopyFrom(node)
            twin.name = f"{node.name}/twin"
            twin.input[0] = quantized
            twin.input[1] = scratch.constant(f"{node.name}/weight", weights[node.name].real)
            twin.output[0] = f"{node.name}/twin"
            scratch.nodes.append(twin)
            difference = scratch.add("Sub", node, twin.output[0], node.output[0])
            outputs[node.name] = scratch.mean(node, difference)
    copy.graph.node.extend(scratch.nodes)
    return copy, outputs


class _Scratch:
    """Nodes and constants on their way into a scratch copy."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.opset = next(item.version for item in model.opset_import if item.domain in ("", "ai.onnx"))
        self.nodes: list[onnx.NodeProto] = []
        self._rounded: dict[str, str] = {}

    def constant(self, name: str, value: npt.NDArray[Any] | np.floating[Any]) -> str:
        self.model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def add(self, kind: str, node: onnx.NodeProto, *inputs: str, **attributes: Any) -> str:
        name = f"{node.name}/{kind}"
        self.nodes.append(helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name

    def rounded(self, name: str, scale: Scale) -> str:
        """Give the tensor after quantization and back."""
        if name not in self._rounded:
            parameters = [
                self.constant(f"{name}/scale", np.float32(scale.scale)),
                self.constant(f"{name}/zero", np.array(scale.zero_point, scale.dtype)),
            ]
            self.nodes += [
                helper.make_node("QuantizeLinear", [name, *parameters], [f"{name}/8bit"], name=f"{name}/8bit"),
                helper.make_node("DequantizeLinear", [f"{name}/8bit", *parameters], [f"{name}/back"]),
            ]
            self._rounded[name] = f"{name}/back"
        return self._rounded[name]

    def mean(self, node: onnx.NodeProto, name: str) -> str:
        """Add the mean over everything but the output channels."""
        convolution = node.op_type in CONVOLUTIONS
        shape = [0, 0, -1] if convolution else [-1, self._channels(node)]
        axes = [0, 2] if convolution else [0]
        flat = self.add("Reshape", node, name, self.constant(f"{node.name}/shape", np.array(shape, np.int64)))
        if self.opset < 18:  # the axes became an input
            return self.add("ReduceMean", node, flat, axes=axes, keepdims=0)
        return self.add("ReduceMean", node, flat, self.constant(f"{node.name}/axes", np.array(axes)), keepdims=0)

    def _channels(self, node: onnx.NodeProto) -> int:
        weight = next(t for t in self.model.graph.initializer if t.name == f"{node.name}/weight")
        return int(weight.dims[0] if weight.dims[0] != 0 and _transposed(node) else weight.dims[1])


def _transposed(node: onnx.NodeProto) -> bool:
    return any(item.name == "transB" and item.i for item in node.attribute)
