from __future__ import annotations

import copy

import numpy as np
import onnxruntime
import pytest
from onnx import helper, numpy_helper

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")

from networks import NETWORKS, graph, inputs, network, raw_graph  # noqa: E402

from hasten.errors import UnknownName, Unsupported  # noqa: E402
from hasten.graph.model import read_model  # noqa: E402
from hasten.passes.fold import fold  # noqa: E402
from hasten.passes.fuse import Fuse, fuse  # noqa: E402
from hasten.store import Store  # noqa: E402
from hasten.tensors import relative_error  # noqa: E402
from hasten.testing.models import Builder, convnet, encoder, mlp, stored  # noqa: E402
from hasten.torchview.arrays import to_numpy  # noqa: E402
from hasten.torchview.view import View  # noqa: E402

FLOAT32 = 1e-5
"""24 bits, a few dozen layers."""


def answers(model, arguments):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {i.name: to_numpy(x) for i, x in zip(session.get_inputs(), arguments, strict=True)})


def assert_agrees(model, view, arguments, limit=FLOAT32):
    view.eval()
    with torch.no_grad():
        got = view(*arguments)
    for reference, value in zip(answers(model, arguments), got, strict=True):
        assert relative_error(reference, to_numpy(value)) < limit


def one_step(view, arguments, *, lr=0.05):
    view.train()
    optimizer = torch.optim.SGD(view.parameters(), lr=lr)
    view(*arguments)[0].square().mean().backward()
    optimizer.step()


def batch(rows=3, seed=0):
    return (torch.randn(rows, 3, 16, 16, generator=torch.Generator().manual_seed(seed)),)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_gives_what_onnx_runtime_gives(name):
    model = graph(name)
    assert_agrees(model, View.of(model), inputs(name, seed=2))


@pytest.mark.parametrize("name", NETWORKS)
def test_an_untouched_view_writes_the_same_graph_back(name):
    model = graph(name)
    back = View.of(model).model()
    for before, after in zip(model.graph.initializer, back.graph.initializer, strict=True):
        assert (before.name, before.data_type, before.dims) == (after.name, after.data_type, after.dims)
        assert numpy_helper.to_array(before).tobytes() == numpy_helper.to_array(after).tobytes()
    assert back.graph.node == model.graph.node


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_are_those_of_the_torch_module(name):
    net, view, arguments = network(name), View.of(raw_graph(name)).eval(), inputs(name, seed=2)
    weight = torch.randn(net(*arguments).shape, generator=torch.Generator().manual_seed(3))
    (net(*arguments) * weight).sum().backward()
    (view(*arguments)[0] * weight).sum().backward()
    for parameter, tensor in net.named_parameters():
        theirs, ours = to_numpy(tensor.grad), to_numpy(view.tensor(parameter).grad)
        # A key's bias moves all scores of a row alike: its gradient is mere rounding, far below those of the others.
        assert np.abs(theirs - ours).max() < 1e-4 * max(float(np.abs(theirs).max()), 1e-2), parameter


@pytest.mark.parametrize("name", ["resnet", "mobilenet-v2", "efficientnet"])
def test_batch_norm_trains_as_in_torch(name):
    net, view, arguments = network(name).train(), View.of(graph(name)).train(), inputs(name, seed=2)
    for module in net.modules():
        if isinstance(module, torch.nn.Dropout):
            module.eval()  # the graph, exported in evaluation mode, has none
    assert torch.allclose(net(*arguments), view(*arguments)[0], atol=1e-5)
    written = {tensor.name: numpy_helper.to_array(tensor) for tensor in view.model().graph.initializer}
    moved = [key for key in net.state_dict() if key.endswith(("running_mean", "running_var"))]
    for key in moved:
        assert relative_error(to_numpy(net.state_dict()[key]), written[key]) < 1e-4
    before = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph(name).graph.initializer}
    assert not any(np.array_equal(before[key], written[key]) for key in moved)


def test_pads_that_an_exporter_turns_round_as_a_matrix_are_followed():
    """Lengths become pads as torch's older exporter writes them: two columns, turned upside down, then flattened."""
    net = Builder(0)

    def c(*values):
        return net.constant(np.array(values, np.int64))

    height = net.add("Gather", net.add("Shape", "x"), c(2), axis=0)
    odd = net.add("Sub", c(17), height)  # one, for pictures of 16
    pairs = net.add("Reshape", net.add("Concat", odd, c(0, 2, 1, 0, 0, 0, 0), axis=0), c(-1, 2))
    turned = net.add("Slice", pairs, c(-1), c(-(2**63) + 1), c(0), c(-1))
    pads = net.add("Reshape", net.add("Transpose", turned, perm=[1, 0]), c(-1))
    h = net.add("Pad", "x", net.add("Cast", pads, to=7))
    net.add("Conv", h, net.weight(4, 3, 3, 3))
    model = net.model(("x", ("batch", 3, 16, 16)), ("y", ("batch", 4, "height", "width")))
    for rows in (1, 3):
        assert_agrees(model, View.of(model), batch(rows))


@pytest.mark.parametrize("factor", [0.5, 0.7])
def test_a_length_that_is_computed_through_floats_is_a_whole_number_again(factor):
    """As an older exporter writes ``x[:, :, : int(x.shape[2] * factor)]``."""
    net = Builder(0)
    height = net.add("Gather", net.add("Shape", "x"), net.constant(np.array([2], np.int64)), axis=0)
    scaled = net.add("Mul", net.add("Cast", height, to=1), net.constant(np.array([factor], np.float32)))
    first, axis = (net.constant(np.array([value], np.int64)) for value in (0, 2))
    net.add("Conv", net.add("Slice", "x", first, net.add("Cast", scaled, to=7), axis), net.weight(4, 3, 1, 1))
    model = net.model(("x", ("batch", 3, 30, 16)), ("y", ("batch", 4, "height", 16)))
    assert_agrees(model, View.of(model), (torch.randn(2, 3, 30, 16, generator=torch.Generator().manual_seed(0)),))


@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
@pytest.mark.parametrize(
    ("length", "scale"), [(10, 0.7), (10, 0.9), (10, 1.4), (3, 5 / 3), (10, 2.05), (2, 2.4), (7, 3.0)]
)
def test_pictures_are_resized_by_scales_as_onnx_has_it(mode, length, scale):
    """Multiplied in float32, and sampled by the scale itself, which need not be the ratio of the lengths."""
    net = Builder(0)
    scales = net.constant(np.array([1, 1, scale, scale], np.float32))
    asymmetric = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"} if mode == "nearest" else {}
    net.add("Resize", "x", "", scales, mode=mode, **asymmetric)
    model = net.model(("x", ("batch", 2, length, length)), ("y", ("batch", 2, "height", "width")))
    x = torch.randn(2, 2, length, length, generator=torch.Generator().manual_seed(0))
    assert_agrees(model, View.of(model), (x,))


def test_the_power_of_a_lone_number_keeps_its_fraction():
    net = Builder(0)
    net.add("Pow", net.constant(np.float32(0.5)), net.add("Cast", "x", to=7))
    model = net.model(("x", ("batch", 3)), ("y", ("batch", 3)))
    assert_agrees(model, View.of(model), (torch.tensor([[0.0, 1.0, 3.0]]),))


def test_in_evaluation_statistics_stay():
    model = convnet()
    view = View.of(model).eval()
    view(*batch())
    assert view.model().graph.initializer == model.graph.initializer


def test_statistics_that_two_batch_norms_share_move_apart():
    net = Builder(0)
    ones = net.constant(np.ones(4, np.float32))
    zeros = net.constant(np.zeros(4, np.float32))
    h = net.add("BatchNormalization", "x", ones, zeros, zeros, ones)
    net.add("BatchNormalization", net.add("Mul", h, net.constant(np.float32(3))), ones, zeros, zeros, ones)
    model = net.model(("x", ("batch", 4)), ("y", ("batch", 4)))
    view = View.of(model).train()
    arguments = (torch.randn(16, 4, generator=torch.Generator().manual_seed(0)) * 2,)
    view(*arguments)
    trained = view.model()
    variances = [node.input[4] for node in trained.graph.node if node.op_type == "BatchNormalization"]
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in trained.graph.initializer}
    assert not np.allclose(values[variances[0]], values[variances[1]])
    assert_agrees(trained, view, arguments)


@pytest.mark.parametrize("name", ["mlp", "resnet", "unet", "vit", "bert", "lstm", "gru"])
def test_after_a_step_the_saved_model_agrees_with_the_view(name, store: Store):
    artifact = stored(graph(name), store)
    view = View.of(read_model(artifact))
    one_step(view, inputs(name))
    with store.scratch() as folder:
        saved = view.save(folder, artifact, add={"finetuned"})
        assert saved.traits == {"finetuned"}
        assert saved.signature == artifact.signature
        trained = read_model(saved)
    arguments = inputs(name, seed=5)
    assert_agrees(trained, view, arguments)
    assert_agrees(trained, View.of(trained), arguments)
    before = answers(graph(name), arguments)[0]
    assert relative_error(before, answers(trained, arguments)[0]) > 1e-3


def test_a_deep_copy_trains_by_itself():
    view = View.of(convnet())
    twin = copy.deepcopy(view)
    one_step(twin, batch())
    view.eval()
    twin.eval()
    assert not torch.equal(view(*batch())[0], twin(*batch())[0])
    assert view.model() == View.of(convnet()).model()
    assert_agrees(twin.model(), twin, batch())


def test_a_state_dict_brings_all_that_was_learned():
    view, other = View.of(convnet()), View.of(convnet())
    one_step(view, batch())
    other.load_state_dict(view.state_dict())
    assert other.model() == view.model()


def test_lone_numbers_masks_and_bounds_are_not_trained():
    net = Builder(0)
    h = net.add("MatMul", "x", net.weight(4, 4))  # w0
    h = net.add("Div", h, net.constant(np.float32(2)))
    h = net.add("Clip", h, net.constant(np.float32(-1)), net.constant(np.float32(1)))
    h = net.add("Add", h, net.constant(np.array([[0, 0, -1e9, 0]], np.float32)))
    net.add("Softmax", h)
    view = View.of(net.model(("x", ("batch", 4)), ("y", ("batch", 4))))
    assert view.trained == ("w0",)


def test_a_single_value_is_trained_where_it_is_a_weight():
    net = Builder(0)
    h = net.add("Relu", net.add("Add", net.add("MatMul", "x", net.weight(4, 1)), net.weight(1, scale=0.1)))  # w0, w1
    net.add("Mul", h, net.constant(np.array([0.25], np.float32)))
    view = View.of(net.model(("x", ("batch", 4)), ("y", ("batch", 1))))
    assert view.trained == ("w0", "w1")


def test_a_large_bias_is_trained_and_is_no_mask():
    net = Builder(0)
    net.add("Add", net.add("MatMul", "x", net.weight(4, 2)), net.constant(np.array([-2e5, 3e5], np.float32)))
    assert View.of(net.model(("x", ("batch", 4)), ("y", ("batch", 2)))).trained == ("w0", "w1")


def test_weights_that_a_converter_wrote_as_nodes_are_trained():
    model = mlp()
    tensor = model.graph.initializer[0]
    node = helper.make_node("Constant", [], [tensor.name], value=tensor)
    model.graph.node.insert(0, node)
    del model.graph.initializer[0]
    view = View.of(model)
    assert set(view.trained) == set(View.of(mlp()).trained)
    arguments = (torch.randn(4, 16),)
    one_step(view, arguments)
    assert_agrees(view.model(), view, arguments)


def test_statistics_that_are_computed_are_refused():
    net = Builder(0)
    ones = net.constant(np.ones(4, np.float32))
    net.add("BatchNormalization", "x", ones, ones, ones, net.add("Abs", ones))
    with pytest.raises(Unsupported, match=r"'batchnormalization_1'.*running statistics"):
        View.of(net.model(("x", ("batch", 4)), ("y", ("batch", 4))))


@pytest.mark.parametrize("target", ["standard", "onnxruntime"])
def test_a_folded_and_fused_network_trains_too(target):
    model = encoder()
    fold(model)
    fuse(model, Fuse(target=target, projections=True))
    assert {"Attention", "MultiHeadAttention"} & {node.op_type for node in model.graph.node}
    arguments = (torch.randn(3, 8, 16, generator=torch.Generator().manual_seed(0)),)
    view = View.of(model)
    assert_agrees(model, view, arguments)
    one_step(view, arguments)
    assert_agrees(view.model(), view, arguments)


def test_taps_give_inner_tensors_with_gradients():
    model = convnet()
    view = View.of(model).eval()
    name = next(node.output[0] for node in model.graph.node if node.op_type == "Conv")
    outputs, taps = view.with_taps(batch(), [name])
    assert torch.equal(outputs[0], view(*batch())[0])
    (slope,) = torch.autograd.grad(outputs[0].sum(), taps[name])
    assert slope.shape == taps[name].shape == (3, 8, 16, 16)
    assert slope.abs().sum() > 0


def test_an_unknown_tap_or_tensor_is_named_with_the_nearest():
    view = View.of(mlp())
    with pytest.raises(UnknownName, match="did you mean 'relu_1_out'"):
        view.with_taps((torch.zeros(1, 16),), ["relu_1_ou"])
    with pytest.raises(UnknownName, match="did you mean"):
        view.tensor("w")


def test_the_view_of_a_model_is_apart_from_it():
    model = mlp()
    before = model.SerializeToString(deterministic=True)
    one_step(View.of(model), (torch.randn(4, 16),))
    assert model.SerializeToString(deterministic=True) == before


def test_dropout_drops_only_while_training():
    net = Builder(0)
    net.add("Dropout", net.add("Relu", "x"), net.constant(np.float32(0.5)))
    view = View.of(net.model(("x", ("batch", 64)), ("y", ("batch", 64))))
    x = torch.ones(4, 64)
    torch.manual_seed(0)
    dropped = view.train()(x)[0]
    assert set(dropped.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(view.eval()(x)[0], x)


@pytest.mark.parametrize("name", ["mlp", "mobilenet-v2", "vit", "lstm"])
def test_autocast_computes_in_bfloat16(name):
    view = View.of(graph(name))
    with torch.autocast("cpu", torch.bfloat16):
        loss = view(*inputs(name))[0].float().square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype is torch.float32 for p in view.parameters())
    exact = View.of(graph(name))(*inputs(name))[0].square().mean()
    assert loss.item() == pytest.approx(exact.item(), rel=0.1)


@pytest.mark.parametrize("name", ["mlp", "resnet", "bert"])
def test_it_compiles_to_one_graph(name):
    view = View.of(graph(name)).eval()
    arguments = inputs(name)
    compiled = torch.compile(view, fullgraph=True, backend="aot_eager", dynamic=False)
    assert torch.allclose(compiled(*arguments)[0], view(*arguments)[0], atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU and PyTorch with CUDA")
@pytest.mark.parametrize("name", ["mlp", "resnet", "bert"])
def test_its_training_step_compiles_for_a_gpu(name):
    view = View.of(graph(name)).to("cuda")
    arguments = tuple(value.to("cuda") for value in inputs(name))
    parameters = [p for p in view.parameters() if p.requires_grad]
    losses, slopes = [], []
    for run in (view, torch.compile(view, fullgraph=True, dynamic=False)):
        losses.append(run(*arguments)[0].square().mean())
        slopes.append(torch.autograd.grad(losses[-1], parameters))
    assert torch.allclose(*losses, rtol=1e-3)
    for eager, fused in zip(*slopes, strict=True):
        assert float((eager - fused).norm()) <= 1e-2 * float(eager.norm()) + 1e-6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU and PyTorch with CUDA")
@pytest.mark.filterwarnings("ignore:RNN module weights")
@pytest.mark.parametrize("name", NETWORKS)
def test_it_trains_on_a_gpu(name):
    view, arguments = View.of(graph(name)), inputs(name)
    view.to("cuda")
    there = tuple(value.to("cuda") for value in arguments)
    one_step(view, there)
    with torch.autocast("cuda", torch.bfloat16):
        view(*there)[0].float().square().mean().backward()
    model = view.model()
    assert_agrees(model, view.to("cpu"), arguments)
