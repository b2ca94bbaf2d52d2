from __future__ import annotations

import copy
import math

import numpy as np
import onnx
import pytest
from graphs import applied, assert_same, exported, feed_for, graph_of, kinds, session
from onnx import TensorProto, helper

from hasten.graph.model import refresh_shapes
from hasten.graph.opset import raise_opset
from hasten.passes.fold import fold
from hasten.passes.fuse import Fuse, fuse
from hasten.passes.fuse_activations import fuse_gelu, fuse_hard_swish
from hasten.passes.fuse_attention import fuse_attention, merge_projections
from hasten.passes.fuse_layer_norm import fuse_layer_norm
from hasten.store import Store
from hasten.tensors import relative_error
from hasten.testing.contracts import check_pass
from hasten.testing.models import MODELS, Builder, encoder, stored
from hasten.transform import Context, run_pass


def number(net: Builder, value: float) -> str:
    return net.constant(np.float32(value))


@pytest.mark.parametrize("settings", [{}, {"target": "onnxruntime"}, {"projections": True}, {"attention": False}])
def test_it_keeps_the_contract_of_a_pass(tmp_path, settings):
    check_pass(lambda: Fuse(**settings), tmp_path=tmp_path)


def test_a_model_without_a_pattern_stays_the_very_artifact(store: Store, ctx: Context):
    source = stored(MODELS["convnet"](), store)
    assert run_pass(Fuse(), source, store, ctx) == source


def test_an_encoder_becomes_a_few_operators():
    after = applied(fuse, encoder())
    found = kinds(after)
    assert (found["LayerNormalization"], found["Gelu"], found["Attention"]) == (2, 1, 1)
    assert not [kind for kind in ("Erf", "Softmax", "Sqrt", "Pow", "Transpose", "Reshape") if found[kind]]


@pytest.mark.parametrize("name", ["bert", "bert-dynamic", "bert-length", "sdpa-dynamic"])
@pytest.mark.parametrize("target", ["standard", "onnxruntime"])
def test_an_exported_encoder_is_fused_after_fold(name, target):
    before = exported(name)
    after = copy.deepcopy(before)
    fold(after)
    assert fuse(after, Fuse(target=target)) > 0
    assert fuse(after, Fuse(target=target)) == 0
    refresh_shapes(after)
    assert_same(before, after)
    assert kinds(after)["Attention" if target == "standard" else "MultiHeadAttention"] == 2
    assert kinds(after)["Softmax"] == kinds(after)["Transpose"] == 0


def test_onnxruntime_really_runs_the_fused_operators(tmp_path):
    model = encoder()
    fold(model)
    plain, fused = tmp_path / "plain.onnx", tmp_path / "fused.onnx"
    session(model, plain)
    fuse(model)
    session(model, fused)
    left = kinds(onnx.load(fused))
    assert kinds(onnx.load(plain))["Softmax"] == 1  # by itself it leaves attention in pieces
    assert (left["Softmax"], left["Attention"]) == (0, 1)
    assert left["SkipLayerNormalization"] == 2  # it still joins the residual with the norm
    assert left["BiasGelu"] == 1


@pytest.mark.parametrize("target", ["standard", "onnxruntime"])
def test_openvino_agrees_with_the_original(target):
    openvino = pytest.importorskip("openvino")
    before, after = encoder(), encoder()
    fuse(after, Fuse(target=target))
    feed = feed_for(before)
    core = openvino.Core()
    compiled = core.compile_model(
        core.read_model(after.SerializeToString()),
        "CPU",
        {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1},
    )
    got = compiled.create_infer_request().infer(feed)
    assert relative_error(session(before).run(None, feed)[0], got[0]) < 1e-4


# GELU


def erf_part(net: Builder, divide: bool) -> str:
    inner = (
        net.add("Div", "x", number(net, math.sqrt(2))) if divide else net.add("Mul", number(net, math.sqrt(0.5)), "x")
    )
    return net.add("Add", net.add("Erf", inner), number(net, 1))


def tanh_part(net: Builder, power: bool) -> str:
    if power:
        cube = net.add("Mul", net.add("Pow", "x", number(net, 3)), number(net, 0.044715))
        inner = net.add("Mul", net.add("Add", "x", cube), number(net, math.sqrt(2 / math.pi)))
    else:  # x * 0.7979 * (1 + 0.044715 * x * x), as TensorFlow's models have it
        square = net.add("Mul", net.add("Mul", number(net, 0.044715), "x"), "x")
        scaled = net.add("Mul", "x", number(net, 0.7978845608))
        inner = net.add("Mul", scaled, net.add("Add", number(net, 1), square))
    return net.add("Add", number(net, 1), net.add("Tanh", inner))


PARTS = {
    "erf-div": lambda net: erf_part(net, divide=True),
    "erf-mul": lambda net: erf_part(net, divide=False),
    "tanh-pow": lambda net: tanh_part(net, power=True),
    "tanh-mul": lambda net: tanh_part(net, power=False),
}
GROUPINGS = {
    "(x p) / 2": lambda net, p: net.add("Div", net.add("Mul", "x", p), number(net, 2)),
    "(x p) 0.5": lambda net, p: net.add("Mul", net.add("Mul", "x", p), number(net, 0.5)),
    "x (p 0.5)": lambda net, p: net.add("Mul", "x", net.add("Mul", p, number(net, 0.5))),
    "(0.5 x) p": lambda net, p: net.add("Mul", net.add("Mul", number(net, 0.5), "x"), p),
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("grouping", GROUPINGS)
def test_gelu_is_found_however_it_is_written(part, grouping):
    model = graph_of(lambda net: GROUPINGS[grouping](net, PARTS[part](net)), ("b", 8), ("b", 8), opset=17)
    after = applied(lambda m: fuse(m), model)
    assert kinds(after) == {"Gelu": 1}
    wanted = b"tanh" if part.startswith("tanh") else b"none"
    assert [item.s for item in after.graph.node[0].attribute] == [wanted]
    assert after.opset_import[0].version == 20


@pytest.mark.parametrize(("root", "one", "half"), [(1.4, 1, 0.5), (math.sqrt(2), 1.1, 0.5), (math.sqrt(2), 1, 0.51)])
def test_what_only_looks_like_gelu_stays(root, one, half):
    def build(net: Builder) -> None:
        erf = net.add("Erf", net.add("Div", "x", number(net, root)))
        net.add("Mul", net.add("Mul", "x", net.add("Add", erf, number(net, one))), number(net, half))

    assert fuse_gelu(graph_of(build, ("b", 8), ("b", 8))) == 0


def test_a_gelu_whose_constants_have_more_axes_keeps_them():
    def build(net: Builder) -> None:
        def wide(value: float) -> str:
            return net.constant(np.full((1, 1, 1), value, np.float32))

        inner = net.add("Add", net.add("Erf", net.add("Mul", "x", wide(math.sqrt(0.5)))), wide(1.0))
        net.add("Mul", net.add("Mul", "x", wide(0.5)), inner)

    before = graph_of(build, ("b", 4), (1, "b", 4))
    after = copy.deepcopy(before)
    fuse(after)
    assert_same(before, after)


@pytest.mark.parametrize("target", ["standard", "onnxruntime"])
def test_a_query_for_all_samples_is_left_as_it_is(target):
    """The fused operators repeat no batch."""

    def build(net: Builder) -> None:
        def heads(x: str, length: int, perm: list[int]) -> str:
            shape = net.constant(np.array([0, length, 2, 4]))
            return net.add("Transpose", net.add("Reshape", net.add("MatMul", x, net.weight(8, 8)), shape), perm=perm)

        query = heads(net.weight(1, 3, 8), 3, [0, 2, 1, 3])
        scores = net.add("MatMul", query, heads("x", 5, [0, 2, 3, 1]))
        mixed = net.add("MatMul", net.add("Softmax", scores, axis=-1), heads("x", 5, [0, 2, 1, 3]))
        net.add("Reshape", net.add("Transpose", mixed, perm=[0, 2, 1, 3]), net.constant(np.array([0, 3, 8])))

    before = graph_of(build, (4, 5, 8), (4, 3, 8))
    after = copy.deepcopy(before)
    fuse(after, Fuse(target=target))
    assert_same(before, after)


def test_a_gelu_of_arithmetic_takes_the_right_tensor():
    def build(net: Builder) -> None:
        shifted = net.add("Add", "x", number(net, 1))
        erf = net.add("Erf", net.add("Mul", shifted, number(net, math.sqrt(0.5))))
        net.add("Mul", net.add("Mul", shifted, net.add("Add", erf, number(net, 1))), number(net, 0.5))

    assert kinds(applied(fuse, graph_of(build, ("b", 8), ("b", 8)))) == {"Add": 1, "Gelu": 1}


def test_hard_swish_is_found():
    def build(net: Builder) -> None:
        clipped = net.add("Clip", net.add("Add", number(net, 3), "x"), number(net, 0), number(net, 6))
        net.add("Div", net.add("Mul", "x", clipped), number(net, 6))

    assert kinds(applied(fuse, graph_of(build, ("b", 8), ("b", 8), opset=13))) == {"HardSwish": 1}


def test_a_clip_to_another_bound_is_no_hard_swish():
    def build(net: Builder) -> None:
        clipped = net.add("Clip", net.add("Add", number(net, 3), "x"), number(net, 0), number(net, 5))
        net.add("Div", net.add("Mul", "x", clipped), number(net, 6))

    assert fuse_hard_swish(graph_of(build, ("b", 8), ("b", 8))) == 0


# Layer normalization


def norm(net: Builder, *, opset: int, square: str = "Pow", axes: tuple[int, ...] = (-1,), epsilon: float = 1e-5) -> str:
    def mean(x: str) -> str:
        if opset < 18:
            return net.add("ReduceMean", x, axes=list(axes))
        return net.add("ReduceMean", x, net.constant(np.array(axes, np.int64)))

    centred = net.add("Sub", "x", mean("x"))
    squared = net.add("Pow", centred, number(net, 2)) if square == "Pow" else net.add("Mul", centred, centred)
    root = net.add("Sqrt", net.add("Add", mean(squared), number(net, epsilon)))
    if square == "Pow":
        return net.add("Div", centred, root)
    return net.add("Mul", centred, net.add("Reciprocal", root))


@pytest.mark.parametrize("opset", [13, 17, 20])
@pytest.mark.parametrize("square", ["Pow", "Mul"])
def test_a_layer_norm_is_one_operator(opset, square):
    def build(net: Builder) -> None:
        h = net.add("Mul", norm(net, opset=opset, square=square), net.weight(8))
        net.add("Add", net.weight(8), h)

    after = applied(fuse, graph_of(build, ("b", 3, 8), ("b", 3, 8), opset=opset))
    assert kinds(after) == {"LayerNormalization": 1}
    assert [round(item.f, 7) for item in after.graph.node[0].attribute if item.name == "epsilon"] == [1e-5]


def test_a_layer_norm_without_scale_and_over_two_axes():
    model = graph_of(lambda net: norm(net, opset=20, axes=(1, 2)), ("b", 3, 8), ("b", 3, 8))
    assert kinds(applied(fuse, model)) == {"LayerNormalization": 1}


def test_a_norm_over_another_axis_stays():
    model = graph_of(lambda net: norm(net, opset=20, axes=(1,)), ("b", 3, 8), ("b", 3, 8))
    assert fuse_layer_norm(model) == 0


def test_another_power_than_the_second_is_no_variance():
    def build(net: Builder) -> None:
        norm(net, opset=20)
        power = next(node for node in net.nodes if node.op_type == "Pow")
        power.input[1] = number(net, 4)

    assert fuse_layer_norm(graph_of(build, ("b", 3, 8), ("b", 3, 8))) == 0


def test_a_scale_for_each_row_is_not_taken_into_the_norm():
    def build(net: Builder) -> None:
        net.add("Mul", norm(net, opset=20), net.constant(np.arange(24, dtype=np.float32).reshape(3, 8)))

    after = applied(fuse, graph_of(build, ("b", 3, 8), ("b", 3, 8)))
    assert kinds(after) == {"LayerNormalization": 1, "Mul": 1}


# Attention


def attention(net: Builder, *, mask: tuple[int, ...] | None = None, axis: int = -1, source: str = "x") -> None:
    """x [b, 5, 8], two heads of four."""
    split = net.constant(np.array([0, 5, 2, 4], np.int64))
    q, k, v = (net.add("Reshape", net.add("MatMul", source, net.weight(8, 8)), split) for _ in range(3))
    q, v = (net.add("Transpose", t, perm=[0, 2, 1, 3]) for t in (q, v))
    k = net.add("Div", net.add("Transpose", k, perm=[0, 2, 3, 1]), number(net, 0.8))
    scores = net.add("Mul", net.add("MatMul", net.add("Mul", q, number(net, 0.5)), k), number(net, 0.6))
    if mask:
        scores = net.add("Add", net.weight(*mask), scores)
    h = net.add("Transpose", net.add("MatMul", net.add("Softmax", scores, axis=axis), v), perm=[0, 2, 1, 3])
    net.add("Reshape", h, net.constant(np.array([0, 5, 8], np.int64)))


@pytest.mark.parametrize("mask", [None, (1, 1, 5, 5), (1, 2, 5, 5), (1, 1, 1, 5)])
@pytest.mark.parametrize("microsoft", [False, True])
def test_attention_is_one_operator(mask, microsoft):
    model = graph_of(lambda net: attention(net, mask=mask), ("b", 5, 8), ("b", 5, 8))
    after = applied(lambda m: fuse(m, Fuse(target="onnxruntime" if microsoft else "standard")), model)
    assert kinds(after)["MultiHeadAttention" if microsoft else "Attention"] == 1
    assert kinds(after)["Softmax"] == 0


@pytest.mark.parametrize("target", ["standard", "onnxruntime"])
def test_queries_of_two_lengths_may_read_one_mask(target):
    """As a decoder's own attention and that over its encoder do, once equal masks are one."""

    def build(net: Builder) -> None:
        mask = net.weight(1, 1, 1, 5)
        whole = net.constant(np.array([0, 5, 2, 4], np.int64))
        few = net.constant(np.array([0, 3, 2, 4], np.int64))

        def attend(query: str, split: str, length: int) -> str:
            q = net.add("Reshape", net.add("MatMul", query, net.weight(8, 8)), split)
            k, v = (net.add("Reshape", net.add("MatMul", "x", net.weight(8, 8)), whole) for _ in range(2))
            q, v = (net.add("Transpose", t, perm=[0, 2, 1, 3]) for t in (q, v))
            k = net.add("Transpose", k, perm=[0, 2, 3, 1])
            scores = net.add("Add", mask, net.add("Mul", net.add("MatMul", q, k), number(net, 0.5)))
            h = net.add("Transpose", net.add("MatMul", net.add("Softmax", scores, axis=-1), v), perm=[0, 2, 1, 3])
            return net.add("Reshape", h, net.constant(np.array([0, length, 8], np.int64)))

        bounds = (net.constant(np.array([n], np.int64)) for n in (0, 3, 1))
        attend(net.add("Slice", attend("x", whole, 5), *bounds), few, 3)

    model = graph_of(build, ("b", 5, 8), ("b", 3, 8))
    after = applied(lambda m: fuse(m, Fuse(target=target)), model)
    assert kinds(after)["Attention"] + kinds(after)["MultiHeadAttention"] == 2


def test_a_softmax_over_the_queries_is_no_attention():
    model = graph_of(lambda net: attention(net, axis=2), ("b", 5, 8), ("b", 5, 8))
    assert fuse_attention(model) == 0


def test_a_mask_with_a_column_for_each_head_only_is_left_alone():
    model = graph_of(lambda net: attention(net, mask=(1, 2, 5, 1)), ("b", 5, 8), ("b", 5, 8))
    assert fuse_attention(model) == 0


def test_probabilities_that_are_also_an_output_keep_attention_in_pieces():
    model = graph_of(lambda net: attention(net), ("b", 5, 8), ("b", 5, 8))
    softmax = next(node for node in model.graph.node if node.op_type == "Softmax")
    model.graph.output.append(helper.make_tensor_value_info(softmax.output[0], TensorProto.FLOAT, ("b", 2, 5, 5)))
    refresh_shapes(model)
    assert fuse_attention(model) == 0


@pytest.mark.parametrize("biased", [False, True])
def test_products_that_share_an_input_become_one(biased):
    def build(net: Builder) -> None:
        parts = [net.add("MatMul", "x", net.weight(8, width)) for width in (4, 2)]
        if biased:
            parts = [net.add("Add", part, net.weight(width)) for part, width in zip(parts, (4, 2), strict=True)]
        net.add("Concat", *(net.add("Relu", part) for part in parts), axis=-1)

    after = applied(merge_projections, graph_of(build, ("b", 3, 8), ("b", 3, 6)))
    assert (kinds(after)["MatMul"], kinds(after)["Split"], kinds(after)["Add"]) == (1, 1, int(biased))


# Versions of the operator set


def test_an_old_softmax_is_rewritten_when_the_version_rises():
    model = graph_of(lambda net: net.add("Softmax", "x", axis=1), (2, 3, 4), (2, 3, 4), opset=11)
    before = copy.deepcopy(model)
    assert raise_opset(model, 17)
    refresh_shapes(model)
    assert_same(before, model)


def test_a_version_that_is_there_already_changes_nothing():
    model = graph_of(lambda net: net.add("Relu", "x"), ("b", 3), ("b", 3))
    before = model.SerializeToString()
    assert raise_opset(model, 17)
    assert model.SerializeToString() == before


def test_a_model_that_cannot_be_raised_keeps_its_pieces():
    def build(net: Builder) -> None:
        net.add("ReduceMean", norm(net, opset=13), axes=[1])

    model = graph_of(build, ("b", 3, 8), ("b", 1, 8), opset=13)
    model.graph.node.add(op_type="Strange", domain="com.example", input=["x"], output=["z"])
    model.opset_import.append(helper.make_opsetid("com.example", 1))
    before = model.SerializeToString()
    assert not raise_opset(model, 20)
    assert model.SerializeToString() == before
