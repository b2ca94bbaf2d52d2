"""Blocks: every node that takes time is in one, and each is a graph that runs."""

from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest

from hasten.errors import Unsupported
from hasten.graph.blocks import block_feed, block_model, blocks_of
from hasten.graph.costs import FREE
from hasten.graph.model import read_model
from hasten.passes.fold import Fold
from hasten.passes.quantize_static import QuantizeStatic
from hasten.testing.models import MODELS, Builder, convnet, encoder, mlp, random_samples, stored
from hasten.transform import run_pass

DIMS = {"batch": 2}


def run(block):
    model = block_model(block)
    onnx.checker.check_model(model, full_check=True)
    return onnxruntime.InferenceSession(model.SerializeToString()).run(None, block_feed(block))


def quantized(model, store, ctx):
    folded = run_pass(Fold(), stored(model, store), store, ctx)
    return read_model(run_pass(QuantizeStatic(), folded, store, replace(ctx, samples=random_samples(folded))))


@pytest.mark.parametrize("name", MODELS)
def test_every_node_that_takes_time_is_in_one_block(name) -> None:
    model = MODELS[name]()
    covered = [node for block in blocks_of(model, DIMS) for node in block.covers]
    assert sorted(covered) == sorted(n.name for n in model.graph.node if n.op_type.lower() not in FREE)


@pytest.mark.parametrize("name", MODELS)
def test_every_block_runs_and_gives_the_shapes_that_it_says(name) -> None:
    for block in blocks_of(MODELS[name](), DIMS):
        values = dict(block.values)
        assert [made.shape for made in run(block)] == [values[output].shape for output in block.outputs]


@pytest.mark.parametrize("name", MODELS)
def test_blocks_of_quantized_graphs_run_in_int8(name, store, ctx) -> None:
    blocks = blocks_of(quantized(MODELS[name](), store, ctx), DIMS)
    products = [block for block in blocks if block.kind.endswith(" int8")]
    assert products
    for block in blocks:
        run(block)
    first = dict(products[0].values)
    assert first[products[0].inputs[0]].dtype in ("uint8", "int8")


def test_a_convolution_takes_its_norm_activation_and_residual_with_it() -> None:
    blocks = {block.name: block for block in blocks_of(convnet(), DIMS)}
    kinds = {name: [op.kind for op in block.ops] for name, block in blocks.items()}
    assert kinds["conv_0"] == ["Conv", "BatchNormalization", "Relu"]
    assert kinds["conv_6"] == ["Conv", "BatchNormalization", "Add"]
    assert blocks["conv_3"].kind == "Conv depthwise"


def test_gelu_written_out_is_one_region_behind_its_product() -> None:
    kinds = [[op.kind for op in block.ops] for block in blocks_of(encoder(), DIMS)]
    assert ["MatMul", "Add", "Div", "Erf", "Add", "Mul", "Mul"] in kinds


def test_layers_of_equal_shapes_are_equal_blocks_whatever_their_names_and_weights() -> None:
    first, second = (blocks_of(mlp(hidden=16, seed=seed), DIMS) for seed in (0, 1))
    assert [block.key for block in first] == [block.key for block in second]
    assert first[0].key == first[1].key
    assert first[0].key != first[2].key
    assert blocks_of(mlp(hidden=16), {"batch": 3})[0].key != first[0].key


def test_a_block_at_other_numbers_is_the_block_of_that_size() -> None:
    small, large = (blocks_of(convnet(width=width), DIMS) for width in (8, 16))
    for before, after in zip(small, large, strict=True):
        assert before.with_numbers(after.numbers).key == after.key
        assert before.with_numbers(before.numbers) == before


def test_a_block_keeps_the_constants_that_decide_what_is_computed() -> None:
    block = next(block for block in blocks_of(convnet(), DIMS) if block.name == "conv_3")
    (made,) = run(block)
    assert made.min() >= 0
    assert made.max() <= 6


def test_a_graph_inside_a_node_is_refused_by_name() -> None:
    net = Builder(0)
    branch = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["x"], ["same"])],
        "branch",
        [],
        [onnx.helper.make_tensor_value_info("same", onnx.TensorProto.FLOAT, None)],
    )
    net.add("If", net.constant(np.array(True)), then_branch=branch, else_branch=branch)
    net.add("Relu", net.nodes[-1].output[0])
    with pytest.raises(Unsupported, match=r"'if_0' \(If\) holds a graph"):
        blocks_of(net.model(("x", (2, 4)), ("y", (2, 4))), {})


def labelled(hidden: int, *, product: bool = False) -> onnx.ModelProto:
    """Give a network with labels behind it as scikit-learn's converter writes them."""
    net = Builder(0)
    h = net.add("Relu", net.add("MatMul", "x", net.weight(8, hidden)))
    net.add("MatMul", h, net.weight(hidden, 4))
    model = net.model(("x", ("batch", 8)), ("y", ("batch", 4)))
    nodes = [
        onnx.helper.make_node("ArgMax", ["y"], ["place"], name="argmax", axis=1),
        onnx.helper.make_node(
            "ArrayFeatureExtractor", ["kinds", "place"], ["found"], name="extract", domain="ai.onnx.ml"
        ),
        onnx.helper.make_node("Cast", ["found"], ["label"], name="label", to=onnx.TensorProto.FLOAT),
    ]
    if product:
        nodes.append(onnx.helper.make_node("MatMul", ["label", "kinds"], ["z"], name="product"))
    model.graph.node.extend(nodes)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.arange(4, dtype=np.float32), "kinds"))
    model.graph.output.append(onnx.helper.make_tensor_value_info(nodes[-1].output[0], onnx.TensorProto.FLOAT, None))
    model.opset_import.append(onnx.helper.make_opsetid("ai.onnx.ml", 1))
    return model


def test_labels_whose_shapes_nobody_infers_are_left_out_and_the_network_before_them_is_not() -> None:
    assert [block.name for block in blocks_of(labelled(16), DIMS)] == ["matmul_0", "matmul_2", "argmax"]


def test_a_product_of_unknown_shape_is_refused_by_name() -> None:
    with pytest.raises(Unsupported, match="'label' cannot be inferred"):
        blocks_of(labelled(16, product=True), DIMS)
