from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper

from hasten.graph.model import read_model
from hasten.isolation import Limits
from hasten.measurement import Operator
from hasten.passes.fold import Fold
from hasten.passes.quantize_static import QuantizeStatic
from hasten.plan import Inputs, Part
from hasten.search.exclusions import (
    NodeSensitivity,
    exclusion_sets,
    milliseconds_lost,
    node_operations,
    node_times,
    rank,
    sensitivity,
)
from hasten.testing.models import Builder, convnet, encoder, mlp, poison, random_samples, stored
from hasten.transform import run_pass


def measured(source, tmp_path, store, part="quantize-static", **settings):
    samples = random_samples(source)
    samples.save(tmp_path / "calibrate")
    inputs = Inputs(store=store, samples=tmp_path / "calibrate")
    return sensitivity(source, Part(part, settings), inputs, limits=Limits(seconds=120))


def agreement(source, store, ctx, **settings):
    made = run_pass(QuantizeStatic(**settings), source, store, replace(ctx, samples=random_samples(source)))
    feed = dict(random_samples(source, n=256, seed=1).inputs)
    exact, got = (onnxruntime.InferenceSession(str(a.entry)).run(None, feed)[0] for a in (source, made))
    return (exact.argmax(1) == got.argmax(1)).mean()


def operator(name, time_ns, *, sources=(), kind="Conv"):
    return Operator(name=name, kind=kind, dtype="float32", inputs=(), outputs=(), time_ns=time_ns, sources=sources)


def same_ms(found):
    return {item.node: 1.0 for item in found}


@pytest.fixture
def source(store, ctx):
    """A convnet whose classifier reads two huge channels."""
    clean = read_model(run_pass(Fold(), stored(convnet(), store), store, ctx))
    convolution = [node.name for node in clean.graph.node if node.op_type == "Conv"][-1]
    classifier = next(node.name for node in clean.graph.node if node.op_type == "Gemm")
    return stored(poison(clean, convolution, classifier), store)


def test_a_poisoned_layer_is_left_in_float(source, store, ctx, tmp_path):
    classifier = next(node.name for node in read_model(source).graph.node if node.op_type == "Gemm")
    assert agreement(source, store, ctx) < 0.8
    ranked = rank(found := measured(source, tmp_path, store), same_ms(found), by="kl")
    assert ranked[0] == classifier
    assert agreement(source, store, ctx, exclude=exclusion_sets(ranked)[0]) >= 0.95


def test_each_node_that_would_be_quantized_is_measured_once(source, store, tmp_path):
    found = measured(source, tmp_path, store)
    nodes = [node.name for node in read_model(source).graph.node if node.op_type in ("Conv", "Gemm")]
    assert [item.node for item in found] == nodes
    assert all(item.error > 0 and item.kl is not None for item in found)


def test_a_node_that_is_excluded_already_is_not_measured(source, store, tmp_path):
    classifier = next(node.name for node in read_model(source).graph.node if node.op_type == "Gemm")
    found = measured(source, tmp_path, store, exclude=[classifier])
    assert classifier not in [item.node for item in found]


def test_nodes_quantized_at_run_time_are_measured_too(store, tmp_path):
    source = stored(poison(mlp(), "gemm_0", "gemm_2"), store)
    found = measured(source, tmp_path, store, part="quantize-dynamic")
    assert max(found, key=lambda item: item.error).node == "gemm_2"


def test_errors_of_single_nodes_about_add_up_to_that_of_all(store, ctx, tmp_path):
    source = run_pass(Fold(), stored(encoder(), store), store, ctx)
    found = measured(source, tmp_path, store, bias_correction=False)
    step = QuantizeStatic(bias_correction=False)
    samples = random_samples(source)
    made = run_pass(step, source, store, replace(ctx, samples=samples))
    feed = dict(samples.inputs)
    exact, got = (onnxruntime.InferenceSession(str(a.entry)).run(None, feed)[0] for a in (source, made))
    whole = float(((exact - got) ** 2).sum() / (exact**2).sum())
    assert 0.5 * whole < sum(item.error for item in found) < 2 * whole


def test_error_removed_for_each_millisecond_decides_the_order():
    found = [NodeSensitivity(node=n, error=e, kl=k) for n, e, k in (("a", 4.0, 1.0), ("b", 3.0, 9.0), ("c", 1.0, 2.0))]
    lost = {"a": 4.0, "b": 1.0, "c": 0.5}
    assert rank(found, lost) == ("b", "c", "a")
    assert rank(found, lost, by="kl") == ("b", "c", "a")
    assert rank(found, {"a": 1.0, "b": 1.0, "c": 1.0}) == ("a", "b", "c")


def test_a_harmless_node_that_costs_no_time_does_not_come_first():
    found = [NodeSensitivity(node="ruined", error=0.9, kl=None), NodeSensitivity(node="fine", error=1e-6, kl=None)]
    assert rank(found, {"ruined": 1.0, "fine": -0.001}) == ("ruined", "fine")


def test_no_time_lost_anywhere_leaves_the_order_to_the_errors():
    found = [NodeSensitivity(node="a", error=0.1, kl=None), NodeSensitivity(node="b", error=0.2, kl=None)]
    assert rank(found, {"a": 0.0, "b": -1.0}) == ("b", "a")


def test_sets_double_and_stop_short_of_all():
    assert exclusion_sets("abcde") == (("a",), ("a", "b"), ("a", "b", "c", "d"))
    assert exclusion_sets("a") == ()


def test_an_operator_shares_its_time_among_the_nodes_it_stands_for():
    profile = [operator("fused", 100.0, sources=("a", "relu")), operator("joined", 60.0, sources=("b", "c"))]
    assert node_times(profile, ("a", "b", "c", "d")) == {"a": 100.0, "b": 30.0, "c": 30.0}


def test_an_operator_without_sources_is_known_by_its_name():
    profile = [operator("conv_1_quant", 10.0), operator("conv_11", 7.0), operator("conv_1", None)]
    assert node_times(profile, ("conv_1", "conv_11")) == {"conv_1": 10.0, "conv_11": 7.0}
    assert node_times([operator("other", 10.0)], ("conv_1", "conv_11")) == {}


def test_a_node_without_a_time_gets_its_share_of_the_difference():
    slow = [operator("a", 3e6), operator("rest", 7e6)]
    fast = [operator("a", 1e6), operator("rest", 5e6)]
    lost = milliseconds_lost(("a", "b", "c"), slow, fast, {"a": 1.0, "b": 2.0, "c": 1.0})
    assert lost == pytest.approx({"a": 2.0, "b": 2.0, "c": 1.0})


def test_operations_are_known_for_every_quantizable_node(source):
    nodes = [node.name for node in read_model(source).graph.node if node.op_type in ("Conv", "Gemm")]
    operations = node_operations(source, nodes)
    assert operations.keys() == set(nodes)
    assert np.min(list(operations.values())) > 0


def test_an_output_that_other_nodes_read_too_does_not_keep_nodes_from_being_measured(store, ctx, tmp_path):
    """A segmentation's logits are an output, and its probabilities another."""
    net = Builder(0)
    h = net.add("Relu", net.add("Conv", "x", net.weight(8, 3, 3, 3), net.weight(8), pads=[1] * 4))
    net.nodes.append(helper.make_node("Conv", [h, net.weight(4, 8, 1, 1), net.weight(4)], ["logits"]))
    net.nodes.append(helper.make_node("Sigmoid", ["logits"], ["probabilities"]))
    names = (("x", 3), ("logits", 4), ("probabilities", 4))
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ("b", n, 8, 8)) for name, n in names]
    graph = helper.make_graph(net.nodes, "net", ends[:1], ends[1:], net.weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=8)
    source = run_pass(Fold(), stored(model, store), store, ctx)
    found = measured(source, tmp_path, store)
    assert len(found) == 2
    assert all(item.error > 0 for item in found)
