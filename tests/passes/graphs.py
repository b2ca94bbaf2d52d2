"""What the tests of the lossless passes share: running a graph, counting operators, graphs as exporters write them."""

from __future__ import annotations

import copy
import functools
import logging
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from hasten.graph.model import refresh_shapes
from hasten.tensors import Array, relative_error
from hasten.testing.models import Builder

EXPORTED = ("mobile-dynamic", "bert", "bert-dynamic", "bert-length", "sdpa-dynamic", "packed-dynamic")


def graph_of(build: Callable[[Builder], object], x: tuple[int | str, ...], y: tuple[int | str, ...], opset: int = 20):
    """Make a model from x to y with fresh shapes; ``build`` adds the nodes, the last one makes y."""
    net = Builder(0)
    build(net)
    net.nodes[-1].output[0] = "y"
    graph = helper.make_graph(
        net.nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, y)],
        net.weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    refresh_shapes(model)
    onnx.checker.check_model(model, full_check=True)
    return model


def kinds(model: onnx.ModelProto) -> Counter[str]:
    """Count the operators of a graph."""
    return Counter(node.op_type for node in model.graph.node)


def session(model: onnx.ModelProto, optimized: Path | None = None) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    if optimized:
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def feed_for(model: onnx.ModelProto, seed: int = 0, length: int = 3) -> dict[str, Array]:
    """Draw inputs; symbolic dimensions become ``length``. Integers are 0 or 1, and 1 at the start of each row."""
    random = np.random.default_rng(seed)
    feed: dict[str, Array] = {}
    for value in model.graph.input:
        shape = [dim.dim_value or length for dim in value.type.tensor_type.shape.dim]
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            feed[value.name] = random.standard_normal(shape).astype(np.float32)
        else:
            feed[value.name] = random.integers(0, 2, shape)
            feed[value.name][..., 0] = 1
    return feed


def run(model: onnx.ModelProto, feed: dict[str, Array]) -> list[Array]:
    return session(model).run(None, feed)


def assert_same(before: onnx.ModelProto, after: onnx.ModelProto, limit: float = 1e-5) -> None:
    """Check that the second graph is valid, has the first one's inputs and outputs, and gives the same numbers.

    Both are lossless: a few float32 roundings (6e-8) in other places, through a handful of layers.
    """
    onnx.checker.check_model(after, full_check=True)
    assert [str(v) for v in after.graph.input] == [str(v) for v in before.graph.input]
    assert [str(v) for v in after.graph.output] == [str(v) for v in before.graph.output]
    for length in (1, 3):
        feed = feed_for(before, length=length)
        for reference, got in zip(run(before, feed), run(after, feed), strict=True):
            assert relative_error(reference, got) < limit


def applied(rule: Callable[[onnx.ModelProto], int], model: onnx.ModelProto) -> onnx.ModelProto:
    """Apply a rule to a copy; check that it changed something, kept the numbers, and has nothing left to do."""
    after = copy.deepcopy(model)
    assert rule(after) > 0
    refresh_shapes(after)
    assert rule(copy.deepcopy(after)) == 0
    assert_same(model, after)
    return after


def exported(name: str) -> onnx.ModelProto:
    """Export a network with torch, unoptimized, as it comes; skips where torch is not installed."""
    return copy.deepcopy(_exported(name))


@functools.cache
def _exported(name: str) -> onnx.ModelProto:
    pytest.importorskip("torch")
    pytest.importorskip("onnxscript")
    from torch_networks import export  # beside this file

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return export(name)
