"""Cutting channels: the smaller model computes what the model with zeros computes, and is a valid graph."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from channel_graphs import Middle, between, closed, integers, keeps, number, outputs  # beside this file
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from hasten.errors import InvalidSetting, UnknownName
from hasten.graph.cut import cut, masked
from hasten.graph.groups import channel_groups
from hasten.graph.model import infer_shapes
from hasten.testing.models import MODELS, Builder, mlp

CLOSE = 1e-4
"""Float32 sums of a few dozen terms of size 1, in another order."""


def weight(model: onnx.ModelProto, name: str):
    return next(numpy_helper.to_array(t) for t in model.graph.initializer if t.name == name)


def check(model: onnx.ModelProto, keep) -> onnx.ModelProto:
    """Check a cut against zeros, in two batches; give the cut model."""
    smaller, zeroed = cut(model, keep), masked(model, keep)
    onnx.checker.check_model(smaller, full_check=True)
    assert list(smaller.graph.input) == list(model.graph.input)
    assert list(smaller.graph.output) == list(model.graph.output)
    for batch in (1, 3):
        np.testing.assert_allclose(outputs(smaller, batch=batch), outputs(zeroed, batch=batch), atol=CLOSE)
    return smaller


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_cutting_is_zeroing_in_every_small_network(name, data):
    model = MODELS[name]()
    exact = [group for group in channel_groups(model) if group.exact]
    check(model, data.draw(keeps(exact)))


def _grouped(net: Builder, h: str) -> str:
    return net.add("Conv", h, net.weight(12, 2, 3, 3), net.weight(12), group=4, pads=[1] * 4)


def _grouped_transposed(net: Builder, h: str) -> str:
    return net.add("ConvTranspose", h, net.weight(8, 3, 1, 1), net.weight(12), group=4)


def _transposed(net: Builder, h: str) -> str:
    return net.add("ConvTranspose", h, net.weight(8, 6, 2, 2), net.weight(6), strides=[2, 2])


def _sliced(net: Builder, h: str) -> str:
    middle = net.add("Slice", h, integers(net, 2, -8), integers(net, 2**31 - 1, 8), integers(net, 1, 2))
    return net.add("Concat", net.add("Slice", h, integers(net, 0), integers(net, 2), integers(net, 1)), middle, axis=1)


def _split_by_sizes(net: Builder, h: str) -> str:
    net.nodes.append(helper.make_node("Split", [h, integers(net, 3, 5)], ["a", "b"], name="split", axis=1))
    return net.add("Concat", "b", "a", axis=1)


def _group_norm(net: Builder, h: str) -> str:
    rows = net.add(
        "InstanceNormalization", net.add("Reshape", h, integers(net, 0, 4, -1)), net.weight(4), net.weight(4)
    )
    return net.add("Mul", net.add("Reshape", rows, integers(net, -1, 8, 8, 8)), net.weight(8, 1, 1, scale=1))


def _group_norm_21(net: Builder, h: str) -> str:
    return net.add("GroupNormalization", h, net.weight(8), net.weight(8), num_groups=2)


def _folded(net: Builder, h: str) -> str:
    rows = net.add("Transpose", net.add("Reshape", h, integers(net, 0, 8, 64)), perm=[0, 2, 1])
    rows = net.add("MatMul", net.add("Add", rows, net.weight(8)), net.weight(8, 6))
    return net.add("Reshape", net.add("Transpose", rows, perm=[0, 2, 1]), integers(net, 0, 6, 8, 8))


def _repeated(net: Builder, h: str) -> str:
    batch = net.add("Shape", h, start=0, end=1)
    ones = net.add("Expand", number(net, 0.5), net.add("Concat", batch, integers(net, 8, 8, 8), axis=0))
    rows = net.add("Expand", net.weight(1, 8, 1, 1), integers(net, 1, 8, 8, 1))
    return net.add("Add", net.add("Mul", h, ones), rows)


def _resized_by_sizes(net: Builder, h: str) -> str:
    small = net.add("AveragePool", h, kernel_shape=[2, 2], strides=[2, 2])
    up = net.add("Resize", small, "", net.constant(np.array([1, 1, 2, 2], np.float32)), mode="linear")
    return net.add("Resize", up, "", "", integers(net, 8, 8), axes=[2, 3])


def _shuffled(mode: str) -> Middle:
    def middle(net: Builder, h: str) -> str:
        up = net.add("DepthToSpace", h, blocksize=2, mode=mode)
        return net.add("SpaceToDepth", net.add("Mul", up, net.weight(2, 1, 1, scale=1)), blocksize=2)

    return middle


def _excited(net: Builder, h: str) -> str:
    gate = net.add("Conv", net.add("GlobalAveragePool", h), net.weight(3, 8, 1, 1), net.weight(3))
    gate = net.add("HardSigmoid", net.add("Conv", net.add("Relu", gate), net.weight(8, 3, 1, 1), net.weight(8)))
    return net.add("Mul", net.add("HardSwish", h), gate)


def _by_channel(net: Builder, h: str) -> str:
    h = net.add("PRelu", net.batch_norm(h, 8), net.weight(8, 1, 1, scale=0.3))
    h = net.add("Where", net.add("Greater", h, number(net, 0)), h, net.weight(8, 1, 1, scale=0.1))
    h = net.add("InstanceNormalization", net.add("Div", h, net.weight(1, 1, 1, scale=1)), net.weight(8), net.weight(8))
    return net.add("Pad", net.add("MaxPool", h, kernel_shape=[3, 3]), integers(net, 0, 0, 1, 1, 0, 0, 1, 1))


def _summed(net: Builder, h: str) -> str:
    return net.add("Einsum", h, net.weight(6, 8), equation="bchw,oc->bohw")


def _tiled(net: Builder, h: str) -> str:
    return net.add("Slice", net.add("Tile", h, integers(net, 1, 1, 2, 1)), *(integers(net, n) for n in (0, 8, 2)))


def _halved(net: Builder, h: str) -> str:
    """As ``x[:, : x.shape[1] // 2]`` and the rest are written."""
    whole = net.add("Gather", net.add("Shape", h), integers(net, 1), axis=0)
    half, axis = net.add("Div", whole, integers(net, 2)), integers(net, 1)
    low = net.add("Slice", h, integers(net, 0), half, axis)
    return net.add("Concat", net.add("Slice", h, half, whole, axis), low, axis=1)


def _as_large_as(net: Builder, h: str) -> str:
    """As ``interpolate(small, size=like.shape)`` is written by channels too."""
    small = net.add("Conv", h, net.weight(8, 8, 3, 3), pads=[1] * 4, strides=[2, 2])
    up = net.add("Resize", small, "", "", net.add("Shape", h), mode="nearest")
    return net.add("Concat", h, up, axis=1)


@pytest.mark.parametrize("first", [1, 2, 8])
@pytest.mark.parametrize("small", [1, 7, 8])
def test_what_is_made_as_large_as_another_keeps_its_own_channels(first: int, small: int) -> None:
    model = between(_as_large_as, reads=16, sides=8)
    check(model, {"first": [*range(first)], "conv_1": [*range(small)]})


MIDDLES: dict[str, tuple[Middle, int, int]] = {
    "halved": (_halved, 8, 8),
    "as large as another": (_as_large_as, 16, 8),
    "grouped": (_grouped, 12, 8),
    "grouped transposed": (_grouped_transposed, 12, 8),
    "transposed": (_transposed, 6, 16),
    "sliced": (_sliced, 8, 8),
    "split": (_split_by_sizes, 8, 8),
    "group-norm by reshapes": (_group_norm, 8, 8),
    "folded": (_folded, 6, 8),
    "repeated": (_repeated, 8, 8),
    "resized": (_resized_by_sizes, 8, 8),
    "depth first": (_shuffled("CRD"), 8, 8),
    "blocks first": (_shuffled("DCR"), 8, 8),
    "excited": (_excited, 8, 8),
    "by channel": (_by_channel, 8, 8),
    "summed": (_summed, 6, 8),
    "tiled": (_tiled, 8, 8),
}
"""What stands between two convolutions, the channels that the second one reads, and the sides of its result."""


@pytest.mark.parametrize("name", MIDDLES)
@settings(max_examples=4, deadline=None)
@given(data=st.data())
def test_cutting_is_zeroing_through_every_kind_of_operator(name, data):
    middle, reads, sides = MIDDLES[name]
    model = between(middle, reads=reads, sides=sides)
    groups = channel_groups(model)
    assert groups, "nothing to cut: the test would be empty"
    assert all(group.exact for group in groups)
    check(model, data.draw(keeps(groups)))


def test_a_group_norm_of_its_own_operator_loses_whole_groups():
    model = between(_group_norm_21, opset=21)
    (group,) = channel_groups(model)
    assert group.size == 2
    smaller = check(model, {"first": [1]})
    assert [a.i for node in smaller.graph.node for a in node.attribute if a.name == "num_groups"] == [1]


def test_sizes_that_speak_of_channels_are_given_anew():
    net = Builder(0)
    h = net.add("Conv", "x", net.weight(8, 3, 1, 1))
    h = net.add("Resize", h, "", "", integers(net, 2, 8, 16, 16))
    net.add("Conv", h, net.weight(4, 8, 1, 1))
    model = closed(net, (2, 3, 8, 8), (2, 4, 16, 16))
    smaller = cut(model, {"conv_0": [1, 6]})
    np.testing.assert_allclose(outputs(smaller), outputs(masked(model, {"conv_0": [1, 6]})), atol=CLOSE)


@pytest.mark.parametrize("opset", [9, 11])
def test_older_spellings_of_split_and_slice_are_put_right(opset):
    def middle(net: Builder, h: str) -> str:
        net.nodes.append(helper.make_node("Split", [h], ["a", "b"], name="split", axis=1, split=[3, 5]))
        if opset < 10:
            return net.add("Concat", net.add("Slice", "b", axes=[1], starts=[1], ends=[5]), "a", axis=1)
        return net.add("Concat", net.add("Slice", "b", *(integers(net, n) for n in (1, 5, 1))), "a", axis=1)

    check(between(middle, reads=7, opset=opset), {"first": [0, 2], "first/2": [1, 2]})


def test_channels_beside_zeros_of_their_number_are_left_alone():
    """As ``cat([x, zeros_like(x)], 1)``: the zeros stay as many as they were."""

    def middle(net: Builder, h: str) -> str:
        return net.add("Concat", h, net.add("ConstantOfShape", net.add("Shape", h)), axis=1)

    assert channel_groups(between(middle, reads=16)) == ()


def test_channels_whose_places_of_maxima_are_an_output_are_left_alone():
    def middle(net: Builder, h: str) -> str:
        net.nodes.append(helper.make_node("MaxPool", [h], ["m", "places"], name="pool", kernel_shape=[1, 1]))
        return "m"

    model = between(middle)
    assert channel_groups(model)
    model.graph.output.append(helper.make_tensor_value_info("places", TensorProto.INT64, ("batch", 8, 8, 8)))
    assert channel_groups(model) == ()


def test_one_channel_that_is_left_is_not_squeezed_away():
    def middle(net: Builder, h: str) -> str:
        return net.add("Unsqueeze", net.add("Squeeze", net.add("GlobalAveragePool", h)), integers(net, 2, 3))

    model = between(middle, sides=1)
    check_batches = (2, 3)  # a batch of one would be squeezed away in the original
    smaller, zeroed = cut(model, {"first": [3]}), masked(model, {"first": [3]})
    for batch in check_batches:
        np.testing.assert_allclose(outputs(smaller, batch=batch), outputs(zeroed, batch=batch), atol=CLOSE)


def test_quantized_weights_are_cut_with_their_scales():
    net = Builder(0)

    def quantized(shape: tuple[int, ...], zero: int) -> str:
        values = net.constant(net.random.integers(-100, 100, shape).astype(np.int8))
        scales = net.constant(net.random.uniform(0.005, 0.02, shape[0]).astype(np.float32))
        zeros = net.constant(np.full(shape[0], zero, np.int8))
        return net.add("DequantizeLinear", values, scales, zeros, axis=0)

    def through(x: str) -> str:
        scale, zero = net.constant(np.float32(0.05)), net.constant(np.uint8(100))
        return net.add("DequantizeLinear", net.add("QuantizeLinear", x, scale, zero), scale, zero)

    h = net.add("Conv", through("x"), quantized((8, 3, 3, 3), 5), pads=[1] * 4)
    net.add("Conv", through(net.add("Relu", h)), quantized((4, 8, 1, 1), 7))
    model = closed(net, ("batch", 3, 8, 8), ("batch", 4, 8, 8))
    smaller = check(model, {"conv_3": [0, 3, 7]})
    assert weight(smaller, "w3").shape == (3,)  # the scales of the first weight


def test_the_kept_units_are_those_that_were_asked_for_in_their_order():
    model = mlp()
    smaller = cut(model, {"gemm_0": [9, 2]})
    assert np.array_equal(weight(smaller, "w0"), weight(model, "w0")[[2, 9]])
    assert np.array_equal(weight(smaller, "w2"), weight(model, "w2")[:, [2, 9]])


def test_the_shapes_inside_are_those_of_the_smaller_model():
    smaller = cut(MODELS["convnet"](), {"conv_9": [0, 1, 2]})
    assert smaller == infer_shapes(smaller)
    inner = {value.name: [d.dim_value for d in value.type.tensor_type.shape.dim] for value in smaller.graph.value_info}
    assert inner["conv_9_out"][1] == 3


def test_a_model_is_left_as_it_was():
    model = MODELS["convnet"]()
    before = model.SerializeToString(deterministic=True)
    cut(model, {"conv_0": [0]})
    masked(model, {"conv_0": [0]})
    assert model.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("change", [cut, masked])
def test_to_keep_everything_changes_nothing(change):
    model = MODELS["encoder"]()
    every = {group.name: range(group.size) for group in channel_groups(model)}
    assert change(model, {}) == model == change(model, every)


@pytest.mark.parametrize("change", [cut, masked])
def test_what_cannot_be_kept_is_refused(change):
    model = mlp()
    with pytest.raises(UnknownName, match="did you mean 'gemm_0'"):
        change(model, {"gemm_00": [0]})
    with pytest.raises(InvalidSetting, match="at least one of its 32"):
        change(model, {"gemm_0": []})
    with pytest.raises(InvalidSetting, match="no unit 32; it has 0 to 31"):
        change(model, {"gemm_0": [3, 32]})
    with pytest.raises(InvalidSetting, match="no unit -1"):
        change(model, {"gemm_0": [-1]})
    with pytest.raises(InvalidSetting, match="unit 4 twice"):
        change(model, {"gemm_0": [4, 4]})


def test_a_group_cut_twice_is_a_group_still():
    model = MODELS["convnet"]()
    once = cut(model, {"conv_0": [0, 2, 5, 7], "conv_9": range(8)})
    sizes = {group.name: group.size for group in channel_groups(once)}
    assert sizes == {"conv_0": 4, "conv_9": 8}
    twice = cut(once, {"conv_0": [1, 2], "conv_9": [0]})
    at_once = cut(model, {"conv_0": [2, 5], "conv_9": [0]})
    np.testing.assert_allclose(outputs(twice), outputs(at_once), atol=CLOSE)


@pytest.mark.parametrize("opset", [13, 20])
def test_a_split_along_an_axis_that_is_not_cut_stays_open(opset: int) -> None:
    """Two pictures side by side in the batch: how many there are is nothing that a cut of channels may settle."""
    net = Builder(0)
    h = net.add("Conv", "x", net.weight(8, 3, 3, 3), net.weight(8), pads=[1] * 4)
    h = net.add("Concat", h, h, axis=0)
    told = {"num_outputs": 2} if opset >= 18 else {}
    net.nodes.append(helper.make_node("Split", [h], ["a", "b"], name="split", axis=0, **told))
    net.add("Conv", net.add("Add", "a", "b"), net.weight(4, 8, 1, 1))
    model = closed(net, ("batch", 3, 8, 8), ("batch", 4, 8, 8), opset=opset)
    (group,) = [group for group in channel_groups(model) if group.exact]
    check(model, {group.name: [0, 2, 5]})
