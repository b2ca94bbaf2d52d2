"""Small real networks, seeded, as ONNX models: what the contract suites and the tests run on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from hasten.artifact import Artifact, Step
from hasten.graph.model import write_model
from hasten.samples import Samples
from hasten.store import Store
from hasten.tensors import Array

OPSET = 20


class Builder:
    """Collects nodes and weights. ``add`` gives the name of the node's first output."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def weight(self, *shape: int, scale: float | None = None) -> str:
        """Add random weights [*shape], scaled by 1/sqrt(fan-in) unless told otherwise."""
        fan_in = int(np.prod(shape[1:])) or 1
        factor = scale if scale is not None else float(np.sqrt(2.0 / fan_in))
        return self.constant(self.random.standard_normal(shape).astype(np.float32) * np.float32(factor))

    def constant(self, value: Array | np.floating[Any]) -> str:
        """Add a constant."""
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def add(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Add a node of one output."""
        name = f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name + "_out"], name=name, **attributes))
        return name + "_out"

    def batch_norm(self, x: str, channels: int) -> str:
        """Add a BatchNormalization with statistics of its own."""
        scale, shift, mean = (
            self.random.uniform(low, high, channels) for low, high in ((0.7, 1.3), (-0.2, 0.2), (-0.2, 0.2))
        )
        variance = self.random.uniform(0.5, 1.5, channels)
        names = [self.constant(v.astype(np.float32)) for v in (scale, shift, mean, variance)]
        return self.add("BatchNormalization", x, *names, epsilon=1e-5)

    def model(self, x: tuple[str, Sequence[int | str]], y: tuple[str, Sequence[int | str]]) -> onnx.ModelProto:
        """Close the graph. The last node's output becomes ``y``."""
        self.nodes[-1].output[0] = y[0]
        graph = helper.make_graph(
            self.nodes,
            "net",
            [helper.make_tensor_value_info(x[0], TensorProto.FLOAT, x[1])],
            [helper.make_tensor_value_info(y[0], TensorProto.FLOAT, y[1])],
            self.weights,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
        onnx.checker.check_model(model, full_check=True)
        return model


def mlp(*, features: int = 16, hidden: int = 32, classes: int = 4, seed: int = 0) -> onnx.ModelProto:
    """Make x [batch, features] -> Gemm, Relu, Gemm, Relu, Gemm -> y [batch, classes]."""
    net = Builder(seed)
    h = net.add("Relu", net.add("Gemm", "x", net.weight(hidden, features), net.weight(hidden, scale=0.1), transB=1))
    h = net.add("Relu", net.add("Gemm", h, net.weight(hidden, hidden), net.weight(hidden, scale=0.1), transB=1))
    net.add("Gemm", h, net.weight(classes, hidden), net.weight(classes, scale=0.1), transB=1)
    return net.model(("x", ("batch", features)), ("y", ("batch", classes)))


def convnet(*, size: int = 16, width: int = 8, classes: int = 4, seed: int = 0) -> onnx.ModelProto:
    """Make x [batch, 3, size, size] -> convolutions with batch-norm, a residual -> y [batch, classes]."""
    net = Builder(seed)
    h = net.add("Conv", "x", net.weight(width, 3, 3, 3), pads=[1] * 4)
    h = stem = net.add("Relu", net.batch_norm(h, width))
    h = net.add("Conv", h, net.weight(width, 1, 3, 3), group=width, pads=[1] * 4)
    h = net.add("Clip", net.batch_norm(h, width), net.constant(np.float32(0)), net.constant(np.float32(6)))
    h = net.add("Conv", h, net.weight(width, width, 1, 1), net.weight(width, scale=0.1))
    h = net.add("Add", net.batch_norm(h, width), stem)
    h = net.add("Conv", h, net.weight(2 * width, width, 3, 3), pads=[1] * 4, strides=[2, 2])
    h = net.add("Relu", net.batch_norm(h, 2 * width))
    h = net.add("Flatten", net.add("GlobalAveragePool", h))
    net.add("Gemm", h, net.weight(classes, 2 * width), net.weight(classes, scale=0.1), transB=1)
    return net.model(("x", ("batch", 3, size, size)), ("y", ("batch", classes)))


def encoder(*, length: int = 8, width: int = 16, heads: int = 2, classes: int = 4, seed: int = 0) -> onnx.ModelProto:
    """Make x [batch, length, width] -> attention, layer-norm, GELU as exporters write them -> y [batch, classes]."""
    net = Builder(seed)
    depth = width // heads
    split = net.constant(np.array([0, length, heads, depth], np.int64))
    q, k, v = (net.add("MatMul", "x", net.weight(width, width)) for _ in range(3))
    q, v = (net.add("Transpose", net.add("Reshape", t, split), perm=[0, 2, 1, 3]) for t in (q, v))
    k = net.add("Transpose", net.add("Reshape", k, split), perm=[0, 2, 3, 1])
    scores = net.add("Div", net.add("MatMul", q, k), net.constant(np.float32(np.sqrt(depth))))
    h = net.add("Transpose", net.add("MatMul", net.add("Softmax", scores, axis=-1), v), perm=[0, 2, 1, 3])
    h = net.add("Reshape", h, net.constant(np.array([0, length, width], np.int64)))
    h = _layer_norm(net, net.add("Add", net.add("MatMul", h, net.weight(width, width)), "x"), width)
    f = net.add("Add", net.add("MatMul", h, net.weight(width, 4 * width)), net.weight(4 * width, scale=0.1))
    erf = net.add("Erf", net.add("Div", f, net.constant(np.float32(np.sqrt(2)))))
    f = net.add(
        "Mul", net.add("Mul", f, net.add("Add", erf, net.constant(np.float32(1)))), net.constant(np.float32(0.5))
    )
    h = _layer_norm(net, net.add("Add", net.add("MatMul", f, net.weight(4 * width, width)), h), width)
    h = net.add("ReduceMean", h, net.constant(np.array([1], np.int64)), keepdims=0)
    net.add("Gemm", h, net.weight(classes, width), net.weight(classes, scale=0.1), transB=1)
    return net.model(("x", ("batch", length, width)), ("y", ("batch", classes)))


def poison(model: onnx.ModelProto, first: str, second: str) -> onnx.ModelProto:
    """Make two channels between two nodes a thousand times larger, and the weights that read them smaller.

    The model computes what it did, but one scale for all channels loses the others: int8 ruins what ``second`` reads.
    """
    for node in model.graph.node:
        for tensor in model.graph.initializer:
            value = numpy_helper.to_array(tensor).copy()
            if node.name == first and tensor.name in node.input[1:]:
                value[:2] *= 1000
            elif node.name == second and tensor.name == node.input[1]:
                value[:, :2] /= 1000
            else:
                continue
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    return model


MODELS: dict[str, Callable[[], onnx.ModelProto]] = {"mlp": mlp, "convnet": convnet, "encoder": encoder}
"""The networks that every contract suite runs over."""


def strange() -> onnx.ModelProto:
    """Make x [batch, 16] -> Gemm, an operator that nobody knows, Gemm -> y [batch, 4]."""
    net = Builder(0)
    h = net.add("Gemm", "x", net.weight(32, 16), net.weight(32, scale=0.1), transB=1)
    h = net.add("Strange", h, domain="com.example")
    net.add("Gemm", h, net.weight(4, 32), net.weight(4, scale=0.1), transB=1)
    net.nodes[-1].output[0] = "y"
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ("batch", n)) for name, n in (("x", 16), ("y", 4))]
    graph = helper.make_graph(net.nodes, "net", ends[:1], ends[1:], net.weights)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.example", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def stored(model: onnx.ModelProto, store: Store) -> Artifact:
    """Put a model into a store, as if it had been imported."""
    with store.scratch() as folder:
        made = write_model(model, folder)
        return store.put(made.after(Step(name="import"), source=None))


def random_samples(artifact: Artifact, *, n: int = 64, seed: int = 0) -> Samples:
    """Draw ``n`` standard normal samples that fit a model's inputs; symbolic dimensions become 8."""
    random = np.random.default_rng(seed)
    inputs: dict[str, Array] = {}
    for spec in artifact.signature.inputs:
        shape = (n, *(d if isinstance(d, int) else 8 for d in spec.shape[1:]))
        values = (
            random.standard_normal(shape) if spec.dtype.startswith(("float", "bf")) else random.integers(0, 8, shape)
        )
        inputs[spec.name] = values.astype(spec.dtype)
    return Samples(inputs)


def write(model: onnx.ModelProto, path: Path) -> Path:
    """Write a model file and give its path."""
    onnx.save_model(model, path)
    return path


def _layer_norm(net: Builder, x: str, width: int) -> str:
    axes = net.constant(np.array([-1], np.int64))
    centred = net.add("Sub", x, net.add("ReduceMean", x, axes))
    variance = net.add("ReduceMean", net.add("Pow", centred, net.constant(np.float32(2))), axes)
    root = net.add("Sqrt", net.add("Add", variance, net.constant(np.float32(1e-5))))
    normal = net.add("Div", centred, root)
    scale = net.constant(net.random.uniform(0.8, 1.2, width).astype(np.float32))
    return net.add("Add", net.add("Mul", normal, scale), net.weight(width, scale=0.1))
