from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from graphs import graph_of
from onnx import numpy_helper

from hasten.graph.model import Graph, read_model
from hasten.passes import recalibrate
from hasten.passes.recalibrate import recalibrated
from hasten.samples import Samples
from hasten.store import Store
from hasten.testing.models import Builder, convnet, mlp, random_samples, stored
from hasten.transform import Context


def two_norms(opset: int) -> onnx.ModelProto:
    def build(net: Builder) -> None:
        h = net.add("Relu", net.batch_norm(net.add("Conv", "x", net.weight(6, 3, 3, 3)), 6))
        net.batch_norm(net.add("Conv", h, net.weight(4, 6, 1, 1)), 4)

    return graph_of(build, ("b", 3, 6, 6), ("b", 4, 4, 4), opset=opset)


def samples_of(n: int, *shape: int) -> Samples:
    random = np.random.default_rng(1)
    return Samples({"x": (random.standard_normal((n, *shape)) * 2 + 1).astype(np.float32)})


@pytest.fixture
def inside(ctx: Context, tmp_path) -> Context:
    (tmp_path / "pass").mkdir()
    return replace(ctx, folder=tmp_path / "pass")


@pytest.mark.parametrize("opset", [15, 20])
def test_every_batch_norm_gets_the_moments_of_what_it_receives(opset: int, inside: Context) -> None:
    torch = pytest.importorskip("torch")
    samples = samples_of(32, 3, 6, 6)  # one batch: then the moments are exact
    before = two_norms(opset)
    graph = Graph(recalibrated(before, samples, inside))
    weight = [torch.tensor(graph.constant(node.input[1])) for node in graph.nodes if node.op_type == "Conv"]
    first, second = (node for node in graph.nodes if node.op_type == "BatchNormalization")
    h = torch.nn.functional.conv2d(torch.tensor(samples.inputs["x"]), weight[0])
    for node, value in ((first, h), (second, None)):
        if value is None:
            scale, shift = (torch.tensor(graph.constant(name)) for name in first.input[1:3])
            normal = torch.nn.functional.batch_norm(h, None, None, scale, shift, training=True)
            value = torch.nn.functional.conv2d(normal.relu(), weight[1])
        mean, variance = (graph.constant(name) for name in node.input[3:5])
        np.testing.assert_allclose(mean, value.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(variance, value.var((0, 2, 3), correction=0), rtol=1e-4)


def test_moments_of_several_batches_are_those_of_all_samples(inside: Context) -> None:
    samples = samples_of(96, 3, 6, 6)
    graph = Graph(recalibrated(two_norms(20), samples, inside))
    first = next(node for node in graph.nodes if node.op_type == "BatchNormalization")
    torch = pytest.importorskip("torch")
    weight = torch.tensor(graph.constant(next(n for n in graph.nodes if n.op_type == "Conv").input[1]))
    value = torch.nn.functional.conv2d(torch.tensor(samples.inputs["x"]), weight)
    np.testing.assert_allclose(graph.constant(first.input[4]), value.var((0, 2, 3), correction=0), rtol=1e-3)


def test_nothing_but_statistics_changes(inside: Context, store: Store) -> None:
    source = stored(convnet(), store)
    model = read_model(source)
    after = recalibrated(model, random_samples(source), inside)
    statistics = {name for n in model.graph.node if n.op_type == "BatchNormalization" for name in n.input[3:5]}
    assert list(after.graph.node) == list(model.graph.node)
    for old, new in zip(model.graph.initializer, after.graph.initializer, strict=True):
        same = np.array_equal(numpy_helper.to_array(old), numpy_helper.to_array(new))
        assert same == (old.name not in statistics)
    assert not list(inside.folder.iterdir())


def test_a_model_without_batch_norm_stays_as_it_is(inside: Context, store: Store) -> None:
    source = stored(mlp(), store)
    assert recalibrated(read_model(source), random_samples(source), inside) == read_model(source)


@pytest.mark.parametrize("rows", [1, 4])
def test_a_model_whose_batch_is_fixed_to_few_rows_gets_the_statistics_of_all(rows: int, inside: Context) -> None:
    """One row has no variance: normalised by itself, the second batch-norm would receive a constant."""

    def build(net: Builder) -> None:
        h = net.add("Relu", net.batch_norm(net.add("Gemm", "x", net.weight(6, 5), transB=1), 6))
        net.batch_norm(net.add("Gemm", h, net.weight(4, 6), transB=1), 4)

    samples = samples_of(64, 5)
    fixed = Graph(recalibrated(graph_of(build, (rows, 5), (rows, 4)), samples, inside))
    free = Graph(recalibrated(graph_of(build, ("b", 5), ("b", 4)), samples, inside))
    for one, other in zip(fixed.nodes, free.nodes, strict=True):
        if one.op_type == "BatchNormalization":
            for at in (3, 4):
                np.testing.assert_allclose(fixed.constant(one.input[at]), free.constant(other.input[at]), rtol=0.05)


@pytest.mark.parametrize("convolutions", [1, 3])
def test_only_batch_norms_with_too_few_values_take_a_pass_of_their_own(
    convolutions: int, inside: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(net: Builder) -> None:
        h, channels = "x", 3
        for _ in range(convolutions):
            h = net.add("Relu", net.batch_norm(net.add("Conv", h, net.weight(6, channels, 1, 1)), 6))
            channels = 6
        h = net.add("Flatten", net.add("GlobalAveragePool", h))
        h = net.batch_norm(net.add("Gemm", h, net.weight(5, 6), transB=1), 5)
        net.batch_norm(net.add("Gemm", h, net.weight(4, 5), transB=1), 4)

    passes: list[int] = []
    settle = recalibrate._settle

    def counted(model: onnx.ModelProto, norms: list[onnx.NodeProto], *rest: object) -> None:
        passes.append(len(norms))
        settle(model, norms, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(recalibrate, "_settle", counted)
    samples = samples_of(64, 3, 6, 6)
    fixed = Graph(recalibrated(graph_of(build, (1, 3, 6, 6), (1, 4)), samples, inside))
    assert passes == [convolutions, 1, 1]
    free = Graph(recalibrated(graph_of(build, ("b", 3, 6, 6), ("b", 4)), samples, inside))
    assert passes == [convolutions, 1, 1, convolutions + 2]
    last, other = ([n for n in g.nodes if n.op_type == "BatchNormalization"][-1] for g in (fixed, free))
    if convolutions == 1:  # else the second one saw pictures that were each normalised by itself
        np.testing.assert_allclose(fixed.constant(last.input[4]), free.constant(other.input[4]), rtol=0.05)
