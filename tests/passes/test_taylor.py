from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from hasten.errors import Unsupported
from hasten.graph.cut import cut, masked
from hasten.graph.groups import channel_groups
from hasten.graph.importance import largest
from hasten.graph.model import read_model
from hasten.passes.prune_channels import PruneChannels
from hasten.passes.recalibrate import recalibrated
from hasten.samples import Samples
from hasten.store import Store
from hasten.tensors import Array
from hasten.testing.models import Builder, encoder, mlp, random_samples, stored
from hasten.transform import Context, run_pass

torch = pytest.importorskip("torch")

from hasten.passes.importance import taylor_scores  # noqa: E402 - needs torch
from hasten.torchview.training import Training, train  # noqa: E402
from hasten.torchview.view import View  # noqa: E402


def outputs(model: onnx.ModelProto, samples: Samples) -> Array:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options).run(None, dict(samples.inputs))[0]


def scores_of(model: onnx.ModelProto, samples: Samples, seed: int = 0) -> dict[str, Array]:
    return taylor_scores(
        model, channel_groups(model), samples, seed=seed, device="cpu", progress=lambda text, share: None
    )


def samples_of(n: int, *shape: int, labels: int | None = None, seed: int = 0) -> Samples:
    random = np.random.default_rng(seed)
    inputs = {"x": random.standard_normal((n, *shape)).astype(np.float32)}
    return Samples(inputs, None if labels is None else random.integers(0, labels, n))


def digits() -> tuple[Samples, Samples]:
    """Handwritten digits [n, 1, 8, 8] to train on, and others."""
    sklearn = pytest.importorskip("sklearn.datasets")
    data = sklearn.load_digits()
    images = (data.images[:, None] / 16).astype(np.float32)
    whole = Samples({"x": images}, data.target.astype(np.int64))
    order = np.random.default_rng(0).permutation(len(whole))
    return whole.take(order[:1200]), whole.take(order[1200:])


def network() -> onnx.ModelProto:
    net = Builder(0)
    h = net.add("Relu", net.batch_norm(net.add("Conv", "x", net.weight(16, 1, 3, 3), pads=[1] * 4), 16))
    h = short = net.add("Relu", net.batch_norm(net.add("Conv", h, net.weight(24, 16, 3, 3), strides=[2, 2]), 24))
    h = net.batch_norm(net.add("Conv", h, net.weight(24, 24, 3, 3), pads=[1] * 4), 24)
    h = net.add("Flatten", net.add("Relu", net.add("Add", h, short)))
    net.add("Gemm", h, net.weight(10, 24 * 9), net.weight(10, scale=0.1), transB=1)
    return net.model(("x", ("batch", 1, 8, 8)), ("y", ("batch", 10)))


@pytest.fixture(scope="module")
def trained() -> onnx.ModelProto:
    view = View.of(network())
    train(view, digits()[0], Training(epochs=5, batch=64, lr=1e-2))
    return view.model()


def test_fewer_samples_than_the_models_batch_weigh_nothing_and_are_refused() -> None:
    net = Builder(0)
    net.add("MatMul", net.add("Relu", net.add("MatMul", "x", net.weight(6, 8))), net.weight(8, 4))
    with pytest.raises(Unsupported, match="takes batches of 8, and there are only 6 samples"):
        scores_of(net.model(("x", (8, 6)), ("y", (8, 4))), samples_of(6, 6, labels=4))


def test_it_is_the_squared_sum_of_activation_times_gradient_behind_the_activation() -> None:
    model, samples = mlp(), samples_of(16, 16, labels=4)
    graph = {tensor.name: torch.tensor(numpy_helper.to_array(tensor)) for tensor in model.graph.initializer}
    weights = [[graph[name] for name in node.input[1:]] for node in model.graph.node if node.op_type == "Gemm"]
    h = torch.tensor(samples.inputs["x"])
    gates = []
    for weight, bias in weights[:2]:
        h = torch.nn.functional.linear(h, weight, bias).relu().requires_grad_()
        gates.append(h)
    logits = torch.nn.functional.linear(h, *weights[2])
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(samples.labels), reduction="sum")
    gradients = torch.autograd.grad(loss, gates)
    found = scores_of(model, samples)
    for name, gate, gradient in zip(("gemm_0", "gemm_2"), gates, gradients, strict=True):
        expected = (gate * gradient).detach().square().sum(0)  # few samples: one at a time
        np.testing.assert_allclose(found[name], expected, rtol=1e-4, atol=1e-10)


def test_a_unit_that_nobody_listens_to_counts_nothing() -> None:
    model = mlp()
    second = next(node for node in model.graph.node if node.name == "gemm_2")
    tensor = next(t for t in model.graph.initializer if t.name == second.input[1])
    value = numpy_helper.to_array(tensor).copy()
    value[:, 5] = 0
    tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    scores = scores_of(model, samples_of(64, 16, labels=4))["gemm_0"]
    assert scores[5] == 0
    assert np.argsort(scores)[0] == 5


def test_without_labels_it_follows_how_far_the_classes_move_without_a_unit() -> None:
    model, samples = mlp(), samples_of(512, 16)
    scores = scores_of(model, samples)["gemm_2"]
    before = log_softmax(outputs(model, samples))
    moved = []
    for unit in range(32):
        keep = {"gemm_2": [other for other in range(32) if other != unit]}
        after = log_softmax(outputs(masked(model, keep), samples))
        moved.append((np.exp(before) * (before - after)).sum(1).mean())
    assert correlation(scores, np.array(moved)) > 0.9


def test_without_labels_and_classes_it_follows_how_far_the_outputs_move_without_a_unit() -> None:
    net = Builder(0)  # linear: then the first-order change is the change
    h = net.add("Conv", "x", net.weight(12, 3, 1, 1))
    net.add("Conv", h, net.weight(2, 12, 1, 1))
    model = net.model(("x", ("batch", 3, 4, 4)), ("y", ("batch", 2, 4, 4)))
    samples = samples_of(512, 3, 4, 4)
    wide = Samples({"x": samples.inputs["x"]}, outputs(model, samples))
    (scores,) = scores_of(model, samples).values()
    (name,) = scores_of(model, samples)
    reference = outputs(model, samples)
    moved = [
        np.square(outputs(masked(model, {name: [u for u in range(12) if u != unit]}), wide) - reference).sum()
        for unit in range(12)
    ]
    assert correlation(scores, np.array(moved)) > 0.9


def log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def correlation(a: Array, b: Array) -> float:
    return float(np.corrcoef(a, b)[0, 1])


def test_heads_of_attention_are_weighed() -> None:
    model = encoder(width=32, heads=4)
    scores = scores_of(model, samples_of(32, 8, 32, labels=4))
    heads = next(group for group in channel_groups(model) if group.size == 4)
    assert (scores[heads.name] > 0).all()


def test_the_same_seed_gives_the_same_scores_and_another_one_does_not() -> None:
    model, samples = mlp(), samples_of(64, 16)
    first, again, other = (scores_of(model, samples, seed=seed)["gemm_0"] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_channels_that_much_depends_on_survive(store: Store, ctx: Context) -> None:
    model = mlp()
    for tensor in model.graph.initializer:
        if tensor.name == model.graph.node[2].input[1]:
            louder = numpy_helper.to_array(tensor) * np.where(np.arange(32) < 2, 5, 1).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(louder, tensor.name))
    source = stored(model, store)
    step = PruneChannels(widths={"gemm_0": 4}, importance="taylor")
    made = run_pass(step, source, store, replace(ctx, training=random_samples(source)))
    before, after = (numpy_helper.to_array(read_model(a).graph.initializer[0]) for a in (source, made))
    np.testing.assert_array_equal(after[:2], before[:2])


def test_it_beats_chance_and_needs_no_labels(trained: onnx.ModelProto, ctx: Context, tmp_path: Path) -> None:
    learn, judge = digits()
    groups = channel_groups(trained)
    inside = replace(ctx, folder=tmp_path)

    def accuracy(model: onnx.ModelProto) -> float:
        return float((outputs(model, judge).argmax(1) == judge.labels).mean())

    def left(scores: dict[str, Array]) -> float:
        smaller = cut(trained, {g.name: largest(scores[g.name], g.size * 5 // 8) for g in groups})
        return accuracy(recalibrated(smaller, learn, inside))

    random = np.random.default_rng(0)
    chance = np.mean([left({group.name: random.uniform(size=group.size) for group in groups}) for _ in range(4)])
    assert accuracy(trained) > 0.95
    assert left(scores_of(trained, learn)) > chance + 0.04  # seen: 0.935 over 0.817
    assert left(scores_of(trained, Samples(learn.inputs))) > chance
