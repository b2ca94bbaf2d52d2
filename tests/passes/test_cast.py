from __future__ import annotations

import copy
import dataclasses

import numpy as np
import onnx
import pytest
from graphs import exported, feed_for, graph_of, kinds, run
from onnx import TensorProto, helper, numpy_helper

from hasten.errors import UnknownName
from hasten.graph.model import Graph, infer_shapes, read_model, refresh_shapes
from hasten.passes.cast import Cast, cast
from hasten.passes.cast_rules import why_float32
from hasten.passes.fold import fold
from hasten.passes.fuse import Fuse, fuse
from hasten.store import Store
from hasten.tensors import TOLERANCES, relative_error
from hasten.testing.contracts import check_pass
from hasten.testing.models import MODELS, Builder, convnet, encoder, mlp, stored
from hasten.transform import Context, run_pass


def dtypes(model: onnx.ModelProto) -> dict[str, str]:
    return Graph(infer_shapes(model)).dtypes


def reasons(model: onnx.ModelProto, to: str = "float16") -> dict[str, str]:
    refresh_shapes(model)
    why = why_float32(Graph(model), to)
    return {node.op_type: reason for node, reason in zip(model.graph.node, why, strict=True) if reason}


@pytest.mark.parametrize("to", ["float16", "bfloat16"])
def test_it_keeps_the_contract_of_a_pass(tmp_path, to):
    check_pass(lambda: Cast(to=to), tmp_path=tmp_path)


@pytest.mark.parametrize("name", MODELS)
def test_onnxruntime_gives_the_same_within_float16(name):
    before = MODELS[name]()
    after = copy.deepcopy(before)
    assert cast(after, "float16") > 0
    onnx.checker.check_model(after, full_check=True)
    feed = feed_for(before)
    assert relative_error(run(before, feed)[0], run(after, feed)[0]) < TOLERANCES["float16"].relative


def test_names_that_the_graph_has_already_are_not_given_twice():
    def build(net: Builder) -> None:
        net.nodes.append(helper.make_node("Neg", ["x"], ["x_float16"], name="x_float16/Cast"))
        net.add("Add", net.add("MatMul", "x", net.weight(4, 4)), "x_float16")

    model = graph_of(build, ("b", 4), ("b", 4))
    assert cast(model, "float16") > 0
    onnx.checker.check_model(model, full_check=True)


@pytest.mark.parametrize("name", ["mobile-dynamic", "bert-length"])
def test_an_exported_graph_is_cast_after_fold_and_fuse(name):
    before = exported(name)
    after = copy.deepcopy(before)
    fold(after)
    fuse(after)
    assert cast(after, "float16") > 0
    onnx.checker.check_model(after, full_check=True)
    feed = feed_for(before)
    assert relative_error(run(before, feed)[0], run(after, feed)[0]) < TOLERANCES["float16"].relative
    assert cast(after, "float16") == 0


@pytest.mark.parametrize("to", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_openvino_takes_both_dtypes(name, to):
    openvino = pytest.importorskip("openvino")
    before = MODELS[name]()
    after = copy.deepcopy(before)
    cast(after, to)
    feed = feed_for(before)
    core = openvino.Core()
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = core.compile_model(core.read_model(after.SerializeToString()), "CPU", options)
    got = compiled.create_infer_request().infer(feed)[0]
    assert relative_error(run(before, feed)[0], got) < TOLERANCES[to].relative


def test_the_file_is_half_as_large_and_has_the_trait(store: Store, ctx: Context):
    source = stored(mlp(hidden=256), store)
    made = run_pass(Cast(), source, store, ctx)
    assert made.size_bytes < 0.55 * source.size_bytes
    assert made.traits == {"float16"}
    assert made.signature == source.signature


def test_a_convnet_computes_every_node_in_bfloat16_under_a_newer_version():
    model = convnet()
    fold(model)
    cast(model, "bfloat16")
    assert model.opset_import[0].version == 22
    found = dtypes(model)
    assert all(found[node.output[0]] == "bfloat16" for node in model.graph.node if node.op_type in ("Conv", "Gemm"))
    assert kinds(model)["Cast"] == 2


def test_inputs_and_outputs_change_only_when_asked_for(store: Store, ctx: Context):
    source = stored(convnet(), store)
    made = run_pass(Cast(keep_io=False), source, store, ctx)
    assert [spec.dtype for spec in (*made.signature.inputs, *made.signature.outputs)] == ["float16", "float16"]
    assert kinds(read_model(made))["Cast"] == 0
    feed = {name: value.astype(np.float16) for name, value in feed_for(convnet()).items()}
    assert run(read_model(made), feed)[0].dtype == np.float16


def test_an_output_of_a_node_that_stays_in_float32_is_low_where_inputs_and_outputs_are_to_change(store, ctx):
    def build(net: Builder) -> None:
        h = net.add("Relu", net.add("Gemm", "x", net.weight(4, 5), transB=1))
        net.nodes.append(helper.make_node("Exp", [h], ["e"], name="kept"))
        net.add("Add", "e", net.add("Sqrt", "e"))

    model = graph_of(build, ("b", 5), ("b", 4))
    model.graph.output.append(helper.make_tensor_value_info("e", TensorProto.FLOAT, ("b", 4)))
    made = read_model(run_pass(Cast(keep_io=False, exclude=("kept",)), stored(model, store), store, ctx))
    onnx.checker.check_model(made, full_check=True)
    feed = {name: value.astype(np.float16) for name, value in feed_for(model).items()}
    got, wanted = run(made, feed), run(model, feed_for(model))
    for one, other in zip(got, wanted, strict=True):
        assert one.dtype == np.float16
        assert relative_error(other, one.astype(np.float32)) < TOLERANCES["float16"].relative


def test_excluded_nodes_and_operators_stay_in_float32():
    model = encoder()
    fuse(model)
    cast(model, "float16", exclude=("LayerNormalization", "gemm_45"))
    found = dtypes(model)
    for node in model.graph.node:
        if node.op_type in ("LayerNormalization", "Gemm"):
            assert found[node.output[0]] == "float32"
        if node.op_type == "MatMul":
            assert found[node.output[0]] == "float16"


def test_an_excluded_name_that_is_nowhere_offers_the_nearest(store: Store, ctx: Context):
    with pytest.raises(UnknownName, match="did you mean 'Gemm'"):
        run_pass(Cast(exclude=("Gem",)), stored(mlp(), store), store, ctx)


def test_a_weight_beyond_half_keeps_its_node_in_float32():
    def build(net: Builder) -> None:
        weight = net.random.standard_normal((4, 4)).astype(np.float32)
        weight[1, 2] = 1e5
        net.add("MatMul", net.add("MatMul", "x", net.constant(weight)), net.weight(4, 4))

    model = graph_of(build, ("b", 4), ("b", 4))
    refresh_shapes(model)
    why = why_float32(Graph(model), "float16")
    assert why[0] is not None
    assert "1e+05" in why[0]
    assert why[1] is None
    assert why_float32(Graph(model), "bfloat16") == [None, None]
    cast(model, "float16")
    found = dtypes(model)
    assert [found[n.output[0]] for n in model.graph.node if n.op_type == "MatMul"] == ["float32", "float16"]


def test_an_epsilon_that_half_cannot_hold_keeps_its_node_in_float32():
    model = graph_of(lambda net: net.add("Add", "x", net.constant(np.float32(1e-12))), ("b", 4), ("b", 4))
    assert "would become zero" in reasons(model)["Add"]


def test_minus_infinity_is_no_overflow():
    model = graph_of(lambda net: net.add("Max", "x", net.constant(np.float32(-np.inf))), ("b", 4), ("b", 4))
    assert reasons(model) == {}


def test_a_spelled_out_norm_squares_in_float32():
    assert "overflow" in reasons(encoder())["Pow"]


def test_scales_of_a_resize_stay_in_float32():
    model = graph_of(
        lambda net: net.add("Resize", "x", "", net.constant(np.array([1, 1, 2, 2], np.float32))),
        ("b", 2, 3, 3),
        ("b", 2, 6, 6),
    )
    expected = run(model, feed_for(model))
    assert cast(model, "float16") == 1
    onnx.checker.check_model(model, full_check=True)
    found = dtypes(model)
    resize = next(node for node in model.graph.node if node.op_type == "Resize")
    assert [found[name] for name in (resize.input[0], resize.input[2], resize.output[0])] == [
        "float16",
        "float32",
        "float16",
    ]
    assert relative_error(expected[0], run(model, feed_for(model))[0]) < 1e-3


def test_what_a_branch_takes_from_outside_stays_in_float32():
    branch = [
        onnx.helper.make_graph(
            [onnx.helper.make_node(kind, ["h"], ["a"])], kind, [], [onnx.helper.make_tensor_value_info("a", 1, None)]
        )
        for kind in ("Neg", "Abs")
    ]

    def build(net: Builder) -> None:
        h = net.add("MatMul", "x", net.weight(4, 4))
        for graph in branch:
            graph.node[0].input[0] = h
        condition = net.add("Greater", net.add("ReduceSum", "x", keepdims=0), net.constant(np.float32(0)))
        net.add("If", condition, then_branch=branch[0], else_branch=branch[1])

    model = graph_of(build, ("b", 4), ("b", 4))
    expected = run(model, feed_for(model))
    assert cast(model, "float16") > 0
    assert relative_error(expected[0], run(model, feed_for(model))[0]) < 1e-2


def test_integers_are_left_alone():
    def build(net: Builder) -> None:
        ids = net.add("Cast", "x", to=TensorProto.INT64)
        net.add("Gather", net.weight(8, 4), ids)

    model = graph_of(build, (3,), (3, 4))
    cast(model, "float16")
    found = dtypes(model)
    assert sorted(found[node.output[0]] for node in model.graph.node) == ["float16", "float32", "int64"]
    assert {t.data_type for t in model.graph.initializer} == {TensorProto.FLOAT16}


def test_weights_are_rounded_to_the_nearest():
    model = graph_of(lambda net: net.add("MatMul", "x", net.weight(4, 4)), ("b", 4), ("b", 4))
    weight = numpy_helper.to_array(model.graph.initializer[0])
    cast(model, "float16")
    np.testing.assert_array_equal(numpy_helper.to_array(model.graph.initializer[0]), weight.astype(np.float16))


def test_attention_outside_of_onnx_stays_in_float32_and_what_follows_is_cast():
    model = encoder()
    fuse(model, Fuse(target="onnxruntime"))
    expected = run(encoder(), feed_for(encoder()))
    cast(model, "float16")
    attention = next(node for node in model.graph.node if node.op_type == "MultiHeadAttention")
    found = dtypes(model)
    assert [found[name] for name in attention.input[:3]] == ["float32"] * 3
    assert [found[n.output[0]] for n in model.graph.node if n.op_type == "LayerNormalization"] == ["float16"] * 2
    assert relative_error(expected[0], run(model, feed_for(model))[0]) < TOLERANCES["float16"].relative


def test_it_declines_what_is_quantized_or_in_another_half(store: Store):
    source = stored(mlp(), store)
    assert Cast().why_not(source) is None
    assert "int8" in str(Cast().why_not(dataclasses.replace(source, traits=frozenset({"int8"}))))
    assert "bfloat16" in str(Cast().why_not(dataclasses.replace(source, traits=frozenset({"bfloat16"}))))
    assert "openvino" in str(Cast().why_not(dataclasses.replace(source, format="openvino")))
