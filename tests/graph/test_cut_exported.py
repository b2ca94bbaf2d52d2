"""Channel groups and cuts in networks of every family, as torch's exporter writes them."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")

from channel_graphs import keeps, outputs  # noqa: E402 - beside this file
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from torch_prunable import exported  # noqa: E402 - beside this file

from hasten.graph.cut import cut, masked  # noqa: E402
from hasten.graph.groups import channel_groups, refusals  # noqa: E402

NAMES = ("resnet-batch", "mobile-batch", "excite-batch", "dense-batch", "unet-batch", "vit-batch", "gated-batch")
TEXTS = ("bert-batch", "bert-open")


@pytest.mark.parametrize("name", [*NAMES, *TEXTS])
@settings(max_examples=3, deadline=None)
@given(data=st.data())
def test_cutting_is_zeroing_in_every_family(name, data):
    model = exported(name)
    exact = [group for group in channel_groups(model) if group.exact]
    keep = data.draw(keeps(exact))
    smaller, zeroed = cut(model, keep), masked(model, keep)
    onnx.checker.check_model(smaller, full_check=True)
    length = 9 if name == "bert-open" else 6
    both = [outputs(item, batch=3, length=length) for item in (smaller, zeroed)]
    np.testing.assert_allclose(*both, atol=1e-4)  # float32 sums of a few dozen terms, in another order


@pytest.mark.parametrize("name", ["vit-batch", *TEXTS])
def test_a_stream_with_layer_norms_is_cut_to_a_valid_smaller_model(name):
    model = exported(name)
    (stream,) = (group for group in channel_groups(model) if not group.exact)
    smaller = cut(model, {stream.name: range(0, 16, 2)})
    onnx.checker.check_model(smaller, full_check=True)
    assert outputs(smaller).shape == outputs(model).shape
    dims = {tensor.name: tensor.dims for tensor in smaller.graph.initializer}
    assert {dims[slot.tensor][slot.axis] for slot in stream.slots} == {8}


@pytest.mark.parametrize("name", ["resnet-batch", "mobile-batch", "excite-batch", "dense-batch", "unet-batch"])
def test_every_convolution_that_does_not_make_the_output_is_in_a_group(name):
    model = exported(name)
    grouped = {maker for group in channel_groups(model) for maker in group.makers}
    convolutions = {node.name for node in model.graph.node if node.op_type in ("Conv", "ConvTranspose")}
    held = {node for node, why in refusals(model).items() if why.startswith("its channels reach the graph's output")}
    assert convolutions - held <= grouped
    assert grouped.isdisjoint(held)
    assert len(held) == 1


def test_a_residual_stream_with_a_projection_is_one_group():
    sizes = {len(group.makers): group.size for group in channel_groups(exported("resnet-batch"))}
    assert sizes == {1: 12, 2: 8, 3: 12}  # inside of blocks; stem and first block; projection and two blocks


def test_heads_and_hidden_widths_of_a_vision_transformer_are_groups():
    groups = [group for group in channel_groups(exported("vit-batch")) if group.exact]
    assert [group.size for group in groups] == [4, 24, 4, 24]
    heads = groups[0]
    (made,) = (slot for slot in heads.slots if slot.role == "makes")
    assert made.units == tuple(head for _ in range(3) for head in range(4) for _ in range(4))  # q, k, v in one weight


def test_heads_of_torchs_own_encoder_are_units():
    heads, hidden = (group for group in channel_groups(exported("bert-open")) if group.exact)
    assert (heads.size, hidden.size) == (4, 24)


def test_shuffled_channels_are_not_cut_apart():
    model = exported("shuffle-batch")
    assert channel_groups(model) == ()
    assert "it makes a single unit" in refusals(model).values()
