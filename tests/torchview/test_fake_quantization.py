from __future__ import annotations

import copy

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

torch = pytest.importorskip("torch")

from hasten.graph.model import read_model  # noqa: E402
from hasten.passes.fold import Fold  # noqa: E402
from hasten.passes.quantize_dynamic import QuantizeDynamic  # noqa: E402
from hasten.passes.quantize_static import QuantizeStatic  # noqa: E402
from hasten.store import Store  # noqa: E402
from hasten.tensors import relative_error  # noqa: E402
from hasten.testing.models import MODELS, random_samples, stored  # noqa: E402
from hasten.torchview.operators.fake_quantization import fake_quantize, fake_quantize_weight, round_straight  # noqa: E402
from hasten.torchview.view import View  # noqa: E402
from hasten.transform import Context, run_pass  # noqa: E402

KINDS = {
    "by channel": {},
    "7 bits": {"reduce_range": True},
    "one scale": {"per_channel": False},
    "through": {"through": True},
    "int8 activations": {"activations": "int8"},
}


def answers(model, x):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    # As the graph says: ONNX Runtime's int8 kernels round sums at once that the graph rounds one by one.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def quantized(name, store: Store, *, quantizer=None):
    """Fold and quantize a model; give it with samples."""
    source = stored(MODELS[name](), store)
    samples = random_samples(source, n=16)
    ctx = Context(folder=store.root, samples=samples, seed=0, progress=lambda text, share: None)
    folded = run_pass(Fold(), source, store, ctx)
    made = run_pass(quantizer or QuantizeStatic(), folded, store, ctx)
    return read_model(made), samples.inputs["x"]


def trained(view, x, *, steps=5, lr=1e-2):
    view.train()
    optimizer = torch.optim.AdamW(view.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        view(torch.from_numpy(x))[0].square().mean().backward()
        optimizer.step()
    return view.eval()


def assert_agrees(model, view, x):
    """Check that both give the same, but for a value that fell on the other side of a rounding."""
    reference = answers(model, x)
    with torch.no_grad():
        got = view(torch.from_numpy(x))[0].numpy()
    assert np.median(np.abs(got - reference)) < 1e-6 * np.abs(reference).max()
    assert relative_error(reference, got) < 0.02


def values(model):
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_a_quantized_graph_agrees_before_and_after_training(name, kind, store: Store):
    model, x = quantized(name, store, quantizer=QuantizeStatic(**KINDS[kind]))
    view = View.of(model).eval()
    assert view.model() == model
    assert_agrees(model, view, x)
    after = trained(view, x).model()
    onnx.checker.check_model(after, full_check=True)
    assert_agrees(after, view, x)
    assert_agrees(after, View.of(after).eval(), x)
    before, now = values(model), values(after)
    changed = {key for key in before if not np.array_equal(before[key], now[key])}
    assert any(before[key].dtype == np.int8 and before[key].ndim > 1 for key in changed)
    assert any(before[key].dtype == np.float32 for key in changed)
    assert all(before[key].dtype == now[key].dtype for key in before)


def test_everything_that_learns_gets_a_gradient(store: Store):
    model, x = quantized("convnet", store)
    view = View.of(model)
    view(torch.from_numpy(x))[0].square().mean().backward()
    kinds = {"weights": 0, "biases": 0, "scales": 0}
    for name, before in values(model).items():
        if name not in view.trained:
            continue
        kind = {"int8": "weights", "int32": "biases"}.get(before.dtype.name, "scales")
        kinds[kind] += 1
        assert view.tensor(name).dtype is torch.float32
        assert torch.isfinite(view.tensor(name).grad).all()
        assert view.tensor(name).grad.abs().sum() > 0, name
    assert kinds["weights"] == kinds["biases"] == 5
    assert kinds["scales"] > 8


def test_a_bias_keeps_the_scale_of_input_times_weight(store: Store):
    model, x = quantized("convnet", store)
    after = trained(View.of(model), x).model()
    now = values(after)
    made_by = {node.output[0]: node for node in after.graph.node}
    layers = [n for n in after.graph.node if n.op_type in ("Conv", "Gemm")]
    for layer in layers:
        source, weight, bias = (made_by[name] for name in layer.input)
        product = now[source.input[1]] * now[weight.input[1]]
        np.testing.assert_allclose(now[bias.input[1]], product, rtol=1e-6)
    assert len(layers) == 5


def test_seven_bits_stay_seven(store: Store):
    model, x = quantized("convnet", store, quantizer=QuantizeStatic(reduce_range=True))
    after = trained(View.of(model), x, lr=0.1).model()
    largest = [int(np.abs(v.astype(int)).max()) for v in values(after).values() if v.dtype == np.int8 and v.ndim > 1]
    assert largest
    assert max(largest) <= 63


def test_scales_around_an_operator_that_only_moves_values_stay_equal(store: Store):
    pair = [
        helper.make_node("QuantizeLinear", ["x", "s1", "z1"], ["q1"]),
        helper.make_node("DequantizeLinear", ["q1", "s1", "z1"], ["d1"]),
    ]
    pool = helper.make_node("MaxPool", ["d1"], ["p"], kernel_shape=[2, 2])
    other = [
        helper.make_node("QuantizeLinear", ["p", "s2", "z2"], ["q2"]),
        helper.make_node("DequantizeLinear", ["q2", "s2", "z2"], ["y"]),
    ]
    ends = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", [2, 1, 4, 4]), ("y", [2, 1, 3, 3]))
    ]
    constants = {"s1": np.float32(0.02), "s2": np.float32(0.02), "z1": np.uint8(10), "z2": np.uint8(10)}
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph([*pair, pool, *other], "net", ends[:1], ends[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    x = np.random.default_rng(0).standard_normal((2, 1, 4, 4)).astype(np.float32)
    view = trained(View.of(model), x)
    now = values(view.model())
    assert now["s1"] == now["s2"] != np.float32(0.02)
    assert_agrees(view.model(), view, x)


@given(
    seed=st.integers(0, 99),
    scale=st.sampled_from((0.01, 0.5, 0.3)),
    zero=st.integers(0, 255),
    channels=st.booleans(),
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_rounding_is_that_of_onnx(seed, scale, zero, channels):
    x = np.random.default_rng(seed).standard_normal((4, 3)).astype(np.float32)
    x.flat[:4] = np.float32(scale) * np.array([0.5, 1.5, 2.5, -0.5], np.float32)  # halves, to the even side
    scales = np.array([scale, 2 * scale, 3 * scale] if channels else scale, np.float32)
    zeros = np.full(scales.shape, zero, np.uint8)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    for count, wanted in ((2, TensorProto.FLOAT), (1, TensorProto.UINT8)):
        ends = [helper.make_tensor_value_info(nodes[count - 1].output[0], wanted, [4, 3])]
        tensors = [numpy_helper.from_array(scales, "s"), numpy_helper.from_array(zeros, "z")]
        graph = helper.make_graph(
            nodes[:count], "net", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 3])], ends, tensors
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        got = View.of(model).eval()(torch.from_numpy(x))[0].detach().numpy()
        reference = answers(model, x)
        assert got.dtype == reference.dtype
        np.testing.assert_array_equal(got, reference)


def test_the_gradient_of_a_step_size_is_that_of_lsq():
    x = torch.tensor([[-3.0, -0.26, 0.1, 0.24, 0.9, 5.0]], requires_grad=True)
    start = torch.tensor(0.25)
    share = torch.ones((), requires_grad=True)
    upstream = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]])
    (fake_quantize(x, share, start, settings=(0, -8, 7, None)) * upstream).sum().backward()
    ratio = x.detach() / 0.25
    inside = (ratio.round() >= -8) & (ratio.round() <= 7)
    # Esser et al. 2020, equation 3: round(v/s) - v/s inside, -Q_N or Q_P outside; and g = 1 / sqrt(N * Q_P).
    slopes = torch.where(inside, ratio.round() - ratio, torch.where(ratio > 0, 7.0, -8.0))
    factor = 1 / np.sqrt(6 * 7)
    assert torch.allclose(share.grad, (slopes * upstream).sum() * factor / 0.25)
    assert torch.equal(x.grad, torch.where(inside, upstream, 0.0))


def test_a_step_of_sgd_moves_the_scale_as_if_it_were_the_parameter():
    weight, start = torch.randn(4, 10, generator=torch.Generator().manual_seed(0)), torch.full((4,), 0.1)
    share = torch.ones(4, requires_grad=True)
    fake_quantize_weight(weight, share, start, settings=(0, -127, 127, 0)).square().sum().backward()
    ratio = (weight / 0.1).round() - weight / 0.1
    slopes = (2 * (weight / 0.1).round() * 0.1 * ratio).sum(1) / np.sqrt(10 * 127)
    assert torch.allclose((share - 0.01 * share.grad) * start - start, -0.01 * slopes, rtol=1e-3, atol=1e-8)


def test_rounding_straight_through_has_the_gradient_of_doing_nothing():
    x = torch.tensor([0.4, 1.5, -2.5], requires_grad=True)
    y = round_straight(x)
    y.sum().backward()
    assert y.tolist() == [0.0, 2.0, -2.0]
    assert x.grad.tolist() == [1.0, 1.0, 1.0]


def test_a_scale_never_leaves_the_positive_numbers(store: Store):
    model, _ = quantized("mlp", store)
    view = View.of(model)
    with torch.no_grad():
        for name, before in values(model).items():
            if name in view.trained and before.dtype == np.float32:
                view.tensor(name).fill_(-1.0)
    after = view.model()
    assert all((v > 0).all() for n, v in values(after).items() if n.endswith("_scale"))


# PyTorch's own tracer makes an instance of every autograd function, which PyTorch itself deprecates.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_quantized_view_copies_compiles_and_takes_autocast(store: Store):
    model, x = quantized("convnet", store)
    view = View.of(model).eval()
    rows = torch.from_numpy(x)
    reference = view(rows)[0]
    assert torch.equal(copy.deepcopy(view)(rows)[0], reference)
    compiled = torch.compile(view, fullgraph=True, backend="aot_eager", dynamic=False)
    assert torch.allclose(compiled(rows)[0], reference, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        loss = view(rows)[0].float().square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype is torch.float32 for p in view.parameters())


@pytest.mark.parametrize("name", ["mlp", "encoder"])
def test_a_dynamically_quantized_graph_runs_and_lets_gradients_through(name, store: Store):
    model, x = quantized(name, store, quantizer=QuantizeDynamic())
    view = View.of(model).eval()
    rows = torch.from_numpy(x).requires_grad_()
    got = view(rows)[0]
    assert relative_error(answers(model, x), got.detach().numpy()) < 0.02
    got.square().sum().backward()
    assert rows.grad.abs().sum() > 0
