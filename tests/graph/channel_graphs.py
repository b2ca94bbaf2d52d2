"""What the tests of channel groups share: graphs with one operator between two layers, and running them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx
import onnxruntime
from hypothesis import strategies as st
from onnx import TensorProto, helper

from hasten.graph.groups import Group
from hasten.tensors import Array
from hasten.testing.models import Builder

Middle = Callable[[Builder, str], str]
"""Adds nodes behind a tensor of eight channels and gives the last one's output."""


def between(
    middle: Middle, *, channels: int = 8, reads: int = 8, sides: int = 8, opset: int = 20, custom: bool = False
) -> onnx.ModelProto:
    """Make x [batch, 3, 8, 8] -> Conv "first" (8 channels), ``middle``, Conv "second" -> y [batch, 4, sides, sides]."""
    net = Builder(0)
    h = net.add("Conv", "x", net.weight(channels, 3, 3, 3), net.weight(channels), pads=[1] * 4)
    net.nodes[-1].name = "first"
    net.add("Conv", middle(net, h), net.weight(4, reads, 1, 1))
    net.nodes[-1].name = "second"
    return closed(net, ("batch", 3, 8, 8), ("batch", 4, sides, sides), opset=opset, custom=custom)


def closed(
    net: Builder, x: Sequence[int | str], y: Sequence[int | str], *, opset: int = 20, custom: bool = False
) -> onnx.ModelProto:
    """Close a graph from x to y; the last node makes y."""
    net.nodes[-1].output[0] = "y"
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, dims) for name, dims in (("x", x), ("y", y))]
    graph = helper.make_graph(net.nodes, "net", ends[:1], ends[1:], net.weights)
    opsets = [helper.make_opsetid("", opset), *([helper.make_opsetid("com.example", 1)] if custom else [])]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    onnx.checker.check_model(model, full_check=not custom)
    return model


def integers(net: Builder, *values: int) -> str:
    return net.constant(np.array(values, np.int64))


def number(net: Builder, value: float) -> str:
    return net.constant(np.float32(value))


def outputs(model: onnx.ModelProto, *, batch: int = 2, length: int = 6, seed: int = 0) -> Array:
    """Run a model on random inputs; unnamed and symbolic dimensions are ``batch`` at first and ``length`` behind."""
    random = np.random.default_rng(seed)
    feed: dict[str, Array] = {}
    for value in model.graph.input:
        dims = value.type.tensor_type.shape.dim
        shape = [dim.dim_value or (length if axis else batch) for axis, dim in enumerate(dims)]
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            feed[value.name] = random.standard_normal(shape).astype(np.float32)
        else:
            feed[value.name] = random.integers(0, 20, shape)
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, feed)[0])


@st.composite
def keeps(draw: st.DrawFn, groups: Sequence[Group]) -> Mapping[str, list[int]]:
    """Draw for each group the units that it keeps: any of them, but one at least."""
    kept = {}
    for group in groups:
        chosen = draw(st.sets(st.integers(0, group.size - 1), min_size=1))
        kept[group.name] = sorted(chosen)
    return kept
