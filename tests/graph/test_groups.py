"""Which channels are found to belong together, and which are not let go."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from channel_graphs import between, closed, integers, number, outputs  # beside this file
from onnx import TensorProto, helper

from hasten.graph.cut import cut, masked
from hasten.graph.groups import Slot, channel_groups, refusals
from hasten.testing.models import Builder, convnet, encoder, mlp, strange


def the_group(model: onnx.ModelProto):
    (group,) = channel_groups(model)
    return group


def test_a_hidden_layer_is_made_by_rows_and_bias_and_read_by_columns():
    first, _ = channel_groups(mlp(hidden=4))
    units = (0, 1, 2, 3)
    assert (first.name, first.size, first.makers, first.exact) == ("gemm_0", 4, ("gemm_0",), True)
    assert first.slots == (Slot("w0", 0, units, "makes"), Slot("w1", 0, units, "makes"), Slot("w2", 1, units, "reads"))


def test_the_last_layer_and_what_is_joined_with_the_input_stay():
    assert refusals(mlp()) == {"gemm_4": "its channels reach the graph's output 'y'"}
    assert refusals(encoder())["matmul_15"] == "its channels are joined with the graph's input 'x'"


def test_a_residual_stream_and_the_depthwise_convolution_in_it_are_one_group():
    stream, wide = channel_groups(convnet())
    assert stream.makers == ("conv_0", "conv_3", "conv_6")
    assert wide.makers == ("conv_9",)
    carried = [slot for slot in stream.slots if slot.role == "carries"]
    assert len(carried) == 3 * 4  # three batch-norms


def test_heads_are_units_across_queries_keys_and_values():
    heads, hidden = channel_groups(encoder(width=16, heads=2))
    assert (heads.makers, heads.size) == (("matmul_0", "matmul_1", "matmul_2"), 2)
    made = [slot for slot in heads.slots if slot.role == "makes"]
    assert [slot.units for slot in made] == [(0,) * 8 + (1,) * 8] * 3
    assert hidden.size == 64


@pytest.mark.parametrize(("kind", "axis"), [("Softmax", 1), ("LogSoftmax", -3)])
def test_a_softmax_over_the_channels_holds_them(kind, axis):
    model = between(lambda net, h: net.add(kind, h, axis=axis))
    assert channel_groups(model) == ()
    assert refusals(model)["first"] == f"node '{kind.lower()}_1' ({kind}) goes over the channels"


def test_an_operator_that_nobody_knows_holds_the_channels_before_it_and_is_named():
    assert refusals(strange())["gemm_0"] == "node 'strange_1' (Strange) is not known to keep channels apart"
    model = between(lambda net, h: net.add("Mystery", h, domain="com.example"), custom=True)
    assert channel_groups(model) == ()
    assert refusals(model)["first"] == "node 'mystery_1' (Mystery) is not known to keep channels apart"


def test_channels_into_a_recurrent_layer_stay():
    net = Builder(0)
    h = net.add("Gemm", "x", net.weight(6, 3), transB=1)
    h = net.add("Unsqueeze", h, integers(net, 0))
    net.add("LSTM", h, net.weight(1, 16, 6), net.weight(1, 16, 4), hidden_size=4)
    model = closed(net, ("batch", 3), ("steps", 1, "batch", 4))
    assert channel_groups(model) == ()
    assert refusals(model)["gemm_0"] == "node 'lstm_2' (LSTM) is not known to keep channels apart"


def test_channels_that_a_graph_inside_a_node_takes_stay():
    def middle(net: Builder, h: str) -> str:
        body = [helper.make_node("Relu", [h], ["inner"])]
        value = helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)
        branch = helper.make_graph(body, "branch", [], [value])
        return net.add("If", net.constant(np.array(True)), then_branch=branch, else_branch=branch)

    assert refusals(between(middle))["first"] == "node 'if_1' (If) is not known to keep channels apart"


def test_an_average_over_the_channels_makes_a_group_inexact():
    def middle(net: Builder, h: str) -> str:
        return net.add("Sub", h, net.add("ReduceMean", h, integers(net, 1)))

    assert not the_group(between(middle)).exact
    assert the_group(between(lambda net, h: net.add("Relu", h))).exact


def test_a_layer_norm_makes_a_group_inexact():
    net = Builder(0)
    h = net.add("MatMul", "x", net.weight(3, 8))
    h = net.add("LayerNormalization", h, net.weight(8), net.weight(8))
    net.add("MatMul", h, net.weight(8, 2))
    group = the_group(closed(net, ("batch", 3), ("batch", 2)))
    assert not group.exact
    assert [slot.role for slot in group.slots] == ["makes", "carries", "carries", "reads"]


@pytest.mark.parametrize("kind", ["ReduceSum", "ReduceMax"])
def test_any_other_reduction_over_the_channels_holds_them(kind):
    model = between(lambda net, h: net.add("Add", h, net.add(kind, h, integers(net, 1))))
    assert "goes over the channels" in refusals(model)["first"]


def test_a_weight_that_two_layers_share_is_cut_for_both():
    net = Builder(0)
    weight = net.weight(6, 6)
    h = net.add("Relu", net.add("MatMul", net.add("MatMul", "x", net.weight(3, 6)), weight))
    net.add("MatMul", net.add("MatMul", h, weight), net.weight(6, 2))
    group = the_group(closed(net, ("batch", 3), ("batch", 2)))
    assert group.makers == ("matmul_0", "matmul_1", "matmul_3")


def test_a_weight_that_a_held_layer_shares_is_held():
    net = Builder(0)
    weight = net.weight(3, 3)
    h = net.add("Relu", net.add("MatMul", net.add("MatMul", "x", weight), net.weight(3, 3)))
    net.add("MatMul", h, weight)
    model = closed(net, ("batch", 3), ("batch", 3))
    assert channel_groups(model) == ()


def test_a_transposed_weight_is_followed_to_where_it_is_stored():
    net = Builder(0)
    h = net.add("MatMul", "x", net.add("Transpose", net.weight(8, 3), perm=[1, 0]))
    net.add("Gemm", h, net.weight(2, 8), transB=1)
    group = the_group(closed(net, ("batch", 3), ("batch", 2)))
    assert [(slot.tensor, slot.axis, slot.role) for slot in group.slots] == [("w0", 0, "makes"), ("w1", 1, "reads")]


def test_a_length_that_is_computed_with_stays():
    def middle(net: Builder, h: str) -> str:
        length = net.add("Gather", net.add("Shape", h), net.constant(np.int64(1)))
        return net.add("Div", h, net.add("Cast", length, to=TensorProto.FLOAT))

    assert refusals(between(middle))["first"] == "node 'shape_1' (Shape) computes with its length"


def test_a_length_that_goes_into_a_shape_does_not_stay():
    def middle(net: Builder, h: str) -> str:
        batch = net.add("Shape", h, start=0, end=1)
        return net.add("Reshape", h, net.add("Concat", batch, integers(net, 8, 8, 8), axis=0))

    assert the_group(between(middle)).size == 8


def test_a_bias_of_zeros_that_exporters_compute_from_the_weights_shape_does_not_hold_it():
    net = Builder(0)
    weight = net.weight(8, 3, 1, 1)
    length = net.add("Expand", net.add("Shape", weight, start=0, end=1), integers(net, 1))
    h = net.add("Conv", "x", weight, net.add("Expand", number(net, 0), length))
    net.add("Conv", h, net.weight(4, 8, 1, 1))
    model = closed(net, ("batch", 3, 8, 8), ("batch", 4, 8, 8))
    assert the_group(model).size == 8
    assert np.allclose(outputs(cut(model, {"conv_3": [2, 5]})), outputs(masked(model, {"conv_3": [2, 5]})), atol=1e-4)


def test_halves_that_go_different_ways_are_groups_of_their_own():
    def middle(net: Builder, h: str) -> str:
        net.nodes.append(helper.make_node("Split", [h], ["a", "b"], name="split", axis=1, num_outputs=2))
        return net.add("Concat", "a", net.add("Relu", "b"), axis=1)

    groups = channel_groups(between(middle))
    assert [(group.name, group.size) for group in groups] == [("first", 4), ("first/2", 4)]


def test_halves_that_are_multiplied_are_one_group():
    def middle(net: Builder, h: str) -> str:
        net.nodes.append(helper.make_node("Split", [h], ["a", "b"], name="split", axis=1, num_outputs=2))
        return net.add("Mul", "a", net.add("Sigmoid", "b"))

    group = the_group(between(middle, reads=4))
    assert group.slots[0].units == (0, 1, 2, 3) * 2


def test_each_part_of_a_concatenation_is_a_group():
    def middle(net: Builder, h: str) -> str:
        other = net.add("Conv", h, net.weight(5, 8, 1, 1))
        return net.add("Concat", h, net.add("Relu", other), axis=1)

    first, other = channel_groups(between(middle, reads=13))
    assert first.slots[-1].units == (*range(8), -1, -1, -1, -1, -1)
    assert other.slots[-1].units == (-1,) * 8 + tuple(range(5))


def test_weights_in_constant_nodes_are_not_cut():
    def middle(net: Builder, h: str) -> str:
        shift = helper.make_tensor("shift", TensorProto.FLOAT, [8, 1, 1], list(range(8)))
        net.nodes.append(helper.make_node("Constant", [], ["shift"], value=shift))
        return net.add("Add", h, "shift")

    assert refusals(between(middle))["first"] == "the weight 'shift' is a Constant node; make it an initializer"


def test_a_convolution_that_slides_is_held_where_its_channels_become_places():
    model = between(lambda net, h: net.add("Transpose", h, perm=[0, 2, 1, 3]))
    assert channel_groups(model) == ()
    assert refusals(model)["first"] == "node 'second' (Conv) slides over it"


def test_scalars_and_gates_do_not_hold_channels():
    def middle(net: Builder, h: str) -> str:
        gate = net.add("Sigmoid", net.add("Conv", h, net.weight(1, 8, 1, 1)))
        return net.add("Mul", net.add("Mul", h, gate), number(net, 2.0))

    assert the_group(between(middle)).size == 8
