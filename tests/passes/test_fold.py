from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
from graphs import EXPORTED, applied, assert_same, exported, feed_for, graph_of, kinds, run
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from hasten.graph.model import Graph, refresh_shapes
from hasten.graph.rewrite import remove_dead
from hasten.passes import fold_noops
from hasten.passes.fold import Fold, fold
from hasten.passes.fold_batch_norm import fold_batch_norm, fold_scales, scale_weight
from hasten.passes.fold_constants import choose_branches, fold_constants, name_constants, settle_reshapes
from hasten.passes.fold_duplicates import merge_constants, merge_duplicates
from hasten.store import Store
from hasten.testing.contracts import check_pass
from hasten.testing.models import MODELS, Builder, convnet, stored
from hasten.transform import Context, run_pass

CLUTTER = ("Shape", "Expand", "CastLike", "Constant", "Identity", "BatchNormalization", "Dropout")


def whole(array):
    return np.asarray(array, np.int64)


def test_it_keeps_the_contract_of_a_pass(tmp_path):
    check_pass(Fold, tmp_path=tmp_path)


@pytest.mark.parametrize("name", EXPORTED)
def test_an_exported_graph_gives_the_same_and_loses_its_clutter(name):
    before = exported(name)
    after = copy.deepcopy(before)
    fold(after)
    refresh_shapes(after)
    assert_same(before, after)
    left = kinds(after)
    allowed = {"packed-dynamic": {"Expand", "Shape"}, "bert-length": {"Shape"}}.get(name, set())
    assert not [kind for kind in CLUTTER if left[kind] and kind not in allowed]
    assert len(after.graph.node) < 0.6 * len(before.graph.node)
    assert fold(after) == 0


@pytest.mark.parametrize("name", MODELS)
def test_a_second_time_changes_nothing(name):
    model = MODELS[name]()
    fold(model)
    assert fold(model) == 0


def test_a_model_with_nothing_to_fold_stays_the_very_artifact(store: Store, ctx: Context):
    source = stored(MODELS["mlp"](), store)
    assert run_pass(Fold(), source, store, ctx) == source


def test_batch_norm_leaves_a_convnet():
    after = applied(fold_batch_norm, MODELS["convnet"]())
    assert kinds(after)["BatchNormalization"] == 0


@given(
    transposed=st.booleans(),
    group=st.sampled_from((1, 2, 4)),
    width=st.sampled_from((4, 8)),
    size=st.sampled_from((1, 2, 3)),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_batch_norm_folds_into_any_convolution(transposed, group, width, size, bias, seed):
    def build(net: Builder) -> None:
        net.random = np.random.default_rng(seed)
        shape = (4, width // group) if transposed else (width, 4 // group)
        inputs = ["x", net.weight(*shape, size, size), *([net.weight(width, scale=0.5)] if bias else [])]
        h = net.add("ConvTranspose" if transposed else "Conv", *inputs, group=group, pads=[size // 2] * 4)
        net.batch_norm(h, width)

    model = graph_of(build, ("b", 4, 6, 6), ("b", width, "h", "w"))
    after = applied(fold_batch_norm, model)
    assert kinds(after) == {"ConvTranspose" if transposed else "Conv": 1}


@given(
    transposed=st.booleans(),
    alpha=st.sampled_from((1.0, 0.5)),
    beta=st.sampled_from((1.0, 2.0)),
    seed=st.integers(0, 99),
)
@settings(max_examples=20, deadline=None)
def test_batch_norm_folds_into_gemm(transposed, alpha, beta, seed):
    def build(net: Builder) -> None:
        net.random = np.random.default_rng(seed)
        weight = net.weight(6, 4) if transposed else net.weight(4, 6)
        h = net.add("Gemm", "x", weight, net.weight(6), transB=int(transposed), alpha=alpha, beta=beta)
        net.batch_norm(h, 6)

    assert kinds(applied(fold_batch_norm, graph_of(build, ("b", 4), ("b", 6)))) == {"Gemm": 1}


def test_batch_norm_after_a_product_of_matrices_makes_a_gemm():
    model = graph_of(lambda net: net.batch_norm(net.add("MatMul", "x", net.weight(4, 6)), 6), ("b", 4), ("b", 6))
    assert kinds(applied(fold_batch_norm, model)) == {"Gemm": 1}


def test_batch_norm_on_the_length_axis_of_a_sequence_stays():
    model = graph_of(lambda net: net.batch_norm(net.add("MatMul", "x", net.weight(4, 6)), 6), ("b", 6, 4), ("b", 6, 6))
    assert fold_batch_norm(model) == 0


def test_batch_norm_before_a_padded_convolution_stays():
    model = graph_of(
        lambda net: net.add("Conv", net.batch_norm("x", 4), net.weight(6, 4, 3, 3), pads=[1] * 4),
        ("b", 4, 5, 5),
        ("b", 6, 5, 5),
    )
    assert fold(model) == 0


def test_a_convolution_that_somebody_else_uses_too_keeps_its_weight():
    def build(net: Builder) -> None:
        h = net.add("Conv", "x", net.weight(4, 4, 1, 1))
        net.add("Add", h, net.batch_norm(h, 4))

    assert fold_batch_norm(graph_of(build, ("b", 4, 5, 5), ("b", 4, 5, 5))) == 0


def test_scaling_by_zero_channels_says_which_axis_is_the_output():
    conv = helper.make_node("Conv", ["x", "w"], ["y"])
    scaled = scale_weight(conv, np.ones((2, 3, 1, 1)), np.array([1.0, 0.0]))
    assert scaled.sum(axis=(1, 2, 3)).tolist() == [3.0, 0.0]


@pytest.mark.parametrize("kind", ["Mul", "Div", "Add", "Sub"])
@pytest.mark.parametrize("first", [False, True])
def test_arithmetic_per_channel_goes_into_the_convolution(kind, first):
    def build(net: Builder) -> None:
        h = net.add("Conv", "x", net.weight(4, 3, 3, 3), net.weight(4))
        constant = net.constant(np.array([1, 2, -3, 4], np.float32).reshape(4, 1, 1))
        net.add(kind, *((constant, h) if first else (h, constant)))

    model = graph_of(build, ("b", 3, 5, 5), ("b", 4, 3, 3))
    if kind == "Div" and first:
        assert fold_scales(model) == 0
    else:
        assert kinds(applied(fold_scales, model)) == {"Conv": 1}


def test_a_constant_along_another_axis_stays():
    def build(net: Builder) -> None:
        net.add("Mul", net.add("Conv", "x", net.weight(4, 4, 1, 1)), net.constant(np.arange(4, dtype=np.float32)))

    assert fold_scales(graph_of(build, ("b", 4, 4, 4), ("b", 4, 4, 4))) == 0


def test_constant_nodes_become_initializers():
    model = graph_of(lambda net: net.add("Add", "x", net.add("Constant", value_float=2.0)), ("b", 4), ("b", 4))
    assert kinds(applied(name_constants, model)) == {"Add": 1}


def test_nodes_of_constants_are_computed():
    def build(net: Builder) -> None:
        net.add(
            "MatMul", "x", net.add("Transpose", net.add("Sqrt", net.constant(np.ones((6, 4), np.float32))), perm=[1, 0])
        )

    assert kinds(applied(fold_constants, graph_of(build, ("b", 4), ("b", 6)))) == {"MatMul": 1}


def test_a_result_much_larger_than_its_inputs_is_not_stored():
    def build(net: Builder) -> None:
        net.add("Add", "x", net.add("ConstantOfShape", net.constant(whole([512, 512]))))

    assert fold_constants(graph_of(build, (512, 512), (512, 512))) == 0


def test_nothing_above_the_limit_is_computed():
    model = graph_of(lambda net: net.add("Add", "x", net.add("Sqrt", net.weight(9))), ("b", 9), ("b", 9))
    assert fold_constants(copy.deepcopy(model), max_bytes=35) == 0
    assert fold_constants(model, max_bytes=36) == 2


def test_random_numbers_are_not_frozen():
    def build(net: Builder) -> None:
        net.add("Add", "x", net.add("RandomNormalLike", net.constant(np.ones(4, np.float32))))

    assert fold(graph_of(build, ("b", 4), ("b", 4))) == 0


def test_quantized_weights_stay_quantized():
    def build(net: Builder) -> None:
        weight = net.constant(net.random.integers(-9, 9, (4, 4)).astype(np.int8))
        scale, zero = net.constant(np.float32(0.1)), net.constant(np.int8(0))
        net.add("MatMul", "x", net.add("DequantizeLinear", weight, scale, zero))

    model = graph_of(build, ("b", 4), ("b", 4))
    fold(model)
    assert kinds(model) == {"DequantizeLinear": 1, "MatMul": 1}


def test_a_node_inside_a_branch_is_left_alone_and_what_it_takes_from_outside_is_kept():
    then = helper.make_graph(
        [helper.make_node("Mul", ["x", "outer"], ["a"])], "t", [], [helper.make_tensor_value_info("a", 1, None)]
    )
    other = helper.make_graph(
        [helper.make_node("Neg", ["x"], ["a"])], "e", [], [helper.make_tensor_value_info("a", 1, None)]
    )

    def build(net: Builder) -> None:
        condition = net.add("Greater", net.add("ReduceSum", "x", keepdims=0), net.constant(np.float32(0)))
        outer = net.add("Identity", net.weight(4))
        then.node[0].input[1] = outer
        net.add("If", condition, then_branch=then, else_branch=other)

    model = graph_of(build, ("b", 4), ("b", 4))
    after = applied(fold, model)
    assert kinds(after) == {"ReduceSum": 1, "Greater": 1, "If": 1}


def test_a_branch_that_is_always_taken_takes_the_place_of_its_if():
    weight = numpy_helper.from_array(np.full(4, 3, np.float32), "inner")
    branches = [
        helper.make_graph(
            [helper.make_node(kind, ["x", "inner"], ["a"])],
            kind,
            [],
            [helper.make_tensor_value_info("a", 1, None)],
            [weight],
        )
        for kind in ("Mul", "Sub")
    ]

    def build(net: Builder) -> None:
        net.add("If", net.constant(np.array(False)), then_branch=branches[0], else_branch=branches[1])

    model = graph_of(build, ("b", 4), ("b", 4))
    assert choose_branches(model) > 0
    assert fold(model) > 0
    assert kinds(model) == {"Sub": 1}
    assert run(model, {"x": np.ones((1, 4), np.float32)})[0].tolist() == [[-2.0] * 4]


def test_nodes_of_a_branch_that_is_taken_get_names_of_their_own():
    """Names of nodes are unique within each graph alone, and ONNX Runtime wants them unique in the whole."""
    inner = helper.make_graph(
        [helper.make_node("Neg", ["x"], ["a"], name="first")],
        "inner",
        [],
        [helper.make_tensor_value_info("a", 1, None)],
    )

    def build(net: Builder) -> None:
        net.add("Abs", "x")
        net.nodes[-1].name = "first"
        taken = net.add("If", net.constant(np.array(True)), then_branch=inner, else_branch=inner)
        net.add("Add", net.nodes[0].output[0], taken)

    model = graph_of(build, ("b", 4), ("b", 4))
    assert fold(model) > 0
    names = [node.name for node in model.graph.node if node.name]
    assert len(names) == len(set(names))
    assert run(model, {"x": np.full((1, 4), -2.0, np.float32)})[0].tolist() == [[4.0] * 4]


def test_numbers_beyond_their_dtype_are_left_to_the_runtime():
    def build(net: Builder) -> None:
        length = net.add("Gather", net.add("Shape", "x"), net.constant(np.array([1])), axis=0)
        far = net.add("Cast", net.add("Mul", length, net.constant(np.array([2**40]))), to=TensorProto.INT32)
        net.add("Add", "x", net.add("Cast", far, to=TensorProto.FLOAT))

    before = graph_of(build, ("b", 4), ("b", 4))
    assert_same(before, applied(fold, before))


def test_a_length_with_two_axes_before_it_keeps_them():
    def build(net: Builder) -> None:
        size = net.add("Unsqueeze", net.add("Size", "x"), net.constant(np.array([0, 1])))
        net.add("Mul", "x", net.add("Cast", size, to=TensorProto.FLOAT))

    before = graph_of(build, (4,), (1, 4))
    assert_same(before, applied(fold, before))


@pytest.mark.parametrize("mode", ["linear", "cubic", "nearest"])
def test_a_constant_that_is_resized_to_aligned_corners_by_odd_scales_is_what_the_runtime_makes(mode):
    def build(net: Builder) -> None:
        scales = net.constant(np.array([1, 1, 1.26, 1.635], np.float32))
        grown = net.add(
            "Resize", net.weight(1, 4, 8, 8), "", scales, mode=mode, coordinate_transformation_mode="align_corners"
        )
        net.add("Add", "x", grown)

    before = graph_of(build, ("b", 4, 10, 13), ("b", 4, 10, 13))
    after = copy.deepcopy(before)
    fold(after)
    assert_same(before, after)


def test_arithmetic_on_known_dimensions_becomes_a_number():
    def build(net: Builder) -> None:
        shape = net.add("Shape", "x", start=1)
        two = net.add("Gather", shape, net.constant(whole(0)))
        wide = net.add("Mul", two, net.add("Gather", shape, net.constant(whole(1))))
        joined = net.add(
            "Concat", net.constant(whole([-1])), net.add("Unsqueeze", wide, net.constant(whole([0]))), axis=0
        )
        net.add("Reshape", "x", joined)

    after = applied(fold, graph_of(build, ("b", 2, 3), ("b", 6)))
    assert kinds(after) == {"Reshape": 1}


def test_a_dimension_that_stays_is_copied_and_one_that_is_not_known_is_left_over():
    def build(net: Builder) -> None:
        batch = net.add("Shape", "x", end=1)
        net.add("Reshape", "x", net.add("Concat", batch, net.constant(whole([6])), axis=0))

    model = graph_of(build, ("b", 2, 3), ("b", 6))
    settle_reshapes(model)
    assert Graph(model).constant(model.graph.node[-1].input[1]).tolist() == [0, 6]


def test_a_leftover_dimension_that_must_be_the_batch_keeps_its_name():
    model = graph_of(lambda net: net.add("Reshape", "x", net.constant(whole([-1, 3, 2]))), ("b", 2, 3), ("b", 3, 2))
    after = applied(settle_reshapes, model)
    assert Graph(after).constant(after.graph.node[0].input[1]).tolist() == [0, 3, 2]


def test_a_leftover_dimension_that_mixes_the_batch_with_another_stays_left_over():
    model = graph_of(lambda net: net.add("Reshape", "x", net.constant(whole([-1, 3]))), ("b", 2, 3), ("n", 3))
    assert settle_reshapes(model) == 0


def dropout(net: Builder, *, training: bool) -> str:
    return net.add("Dropout", "x", net.constant(np.float32(0.5)), net.constant(np.array(training)))


NOOPS = {
    "Identity": lambda net: net.add("Identity", "x"),
    "Dropout": lambda net: dropout(net, training=False),
    "Cast": lambda net: net.add("Cast", "x", to=TensorProto.FLOAT),
    "Reshape": lambda net: net.add("Reshape", "x", net.constant(whole([0, 0, -1]))),
    "Expand": lambda net: net.add("Expand", "x", net.constant(whole([1, 4, 5]))),
    "Transpose": lambda net: net.add("Transpose", "x", perm=[0, 1, 2]),
    "Pad": lambda net: net.add("Pad", "x", net.constant(whole([0] * 6))),
    "Slice": lambda net: net.add(
        "Slice", "x", net.constant(whole([0])), net.constant(whole([2**40])), net.constant(whole([0]))
    ),
    "Concat": lambda net: net.add("Concat", "x", axis=1),
    "Clip": lambda net: net.add("Clip", "x"),
    "Add": lambda net: net.add("Add", "x", net.constant(np.zeros(5, np.float32))),
    "Div": lambda net: net.add("Div", "x", net.constant(np.float32(1))),
}


@pytest.mark.parametrize("kind", NOOPS)
def test_a_node_that_changes_nothing_is_dropped(kind):
    model = graph_of(lambda net: net.add("Neg", NOOPS[kind](net)), ("b", 4, 5), ("b", 4, 5))
    assert kinds(applied(fold_noops.drop_noops, model)) == {"Neg": 1}


@pytest.mark.parametrize("kind", NOOPS)
def test_dropping_the_last_node_keeps_the_name_of_the_output(kind):
    model = graph_of(lambda net: NOOPS[kind](net) if net.add("Neg", "x") else None, ("b", 4, 5), ("b", 4, 5))
    model.graph.node[1].input[0] = model.graph.node[0].output[0]
    assert kinds(applied(fold_noops.drop_noops, model)) == {"Neg": 1}


CHANGES = {
    "a dropout in training": lambda net: dropout(net, training=True),
    "a cast and back that rounds": lambda net: net.add("Cast", net.add("Cast", "x", to=TensorProto.FLOAT16), to=1),
    "another order of equal lengths": lambda net: net.add("Transpose", "x", perm=[0, 2, 1]),
    "a slice backwards": lambda net: net.add(
        "Slice", "x", *(net.constant(whole([v])) for v in (-1, -(2**40), 1, -1))
    ),
    "every second row": lambda net: net.add(
        "Slice", net.add("Concat", "x", "x", axis=1), *(net.constant(whole([v])) for v in (0, 2**40, 1, 2))
    ),
    "a sum with nonzero": lambda net: net.add("Add", "x", net.constant(np.float32(1e-3))),
    "padding": lambda net: net.add("Slice", net.add("Pad", "x", net.constant(whole([0, 0, 1, 0, 0, 0]))),
                                   *(net.constant(whole([v])) for v in (0, 4, 2))),
}  # fmt: skip


@pytest.mark.parametrize("what", CHANGES)
def test_what_changes_something_stays(what):
    model = graph_of(CHANGES[what], ("b", 4, 4), ("b", 4, 4))
    before = kinds(model)
    fold(model)
    assert kinds(model) == before


def test_a_sum_with_zeros_that_widens_stays():
    model = graph_of(lambda net: net.add("Add", "x", net.constant(np.zeros((3, 4), np.float32))), (1, 4), (3, 4))
    assert fold(model) == 0


def test_two_transposes_become_one_and_opposite_ones_none():
    turn = {"perm": [1, 2, 0]}
    model = graph_of(lambda net: net.add("Transpose", net.add("Transpose", "x", **turn), **turn), (2, 3, 4), (4, 2, 3))
    after = applied(fold, model)
    assert [list(node.attribute[0].ints) for node in after.graph.node] == [[2, 0, 1]]


def test_a_cast_of_a_widening_cast_is_one():
    def build(net: Builder) -> None:
        net.add("Cast", net.add("Cast", "x", to=TensorProto.DOUBLE), to=TensorProto.FLOAT)
        net.add("Neg", f"{net.nodes[-1].output[0]}")

    assert kinds(applied(fold, graph_of(build, ("b", 4), ("b", 4)))) == {"Neg": 1}


def test_equal_constants_and_equal_nodes_are_kept_once():
    def build(net: Builder) -> None:
        first, second = (net.constant(np.ones((4, 4), np.float32)) for _ in range(2))
        net.add("Add", net.add("MatMul", "x", first), net.add("MatMul", "x", second))

    model = graph_of(build, ("b", 4), ("b", 4))
    after = applied(lambda m: merge_constants(m) + merge_duplicates(m), model)
    remove_dead(after)
    assert kinds(after) == {"MatMul": 1, "Add": 1}
    assert len(after.graph.initializer) == 1


def test_constants_that_differ_in_their_last_byte_are_both_kept():
    def build(net: Builder) -> None:
        first, second = (net.constant(np.array([1, 2, 3, last], np.float32)) for last in (4, 5))
        net.add("Add", net.add("Mul", "x", first), net.add("Mul", "x", second))

    assert merge_constants(graph_of(build, ("b", 4), ("b", 4))) == 0


def test_what_no_output_needs_is_gone_and_an_output_stays():
    def build(net: Builder) -> None:
        net.add("Exp", net.add("Mul", "x", net.weight(4)))
        net.add("Neg", "x")

    after = applied(remove_dead, graph_of(build, ("b", 4), ("b", 4)))
    assert kinds(after) == {"Neg": 1}
    assert not after.graph.initializer


def test_an_initializer_that_is_listed_as_an_input_counts_as_a_constant():
    model = convnet()
    expected = run(model, feed_for(model))
    for tensor in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    fold(model)
    assert [value.name for value in model.graph.input] == ["x"]
    assert kinds(model)["BatchNormalization"] == 0
    np.testing.assert_allclose(run(model, feed_for(model))[0], expected[0], rtol=1e-4, atol=1e-5)


def test_it_declines_what_is_not_onnx(store: Store):
    source = stored(MODELS["mlp"](), store)
    assert Fold().why_not(source) is None
    assert "openvino" in str(Fold().why_not(dataclasses.replace(source, format="openvino")))
