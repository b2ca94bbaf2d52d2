from dataclasses import replace

import msgspec
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

torch = pytest.importorskip("torch")

from hasten.artifact import hash_files  # noqa: E402
from hasten.errors import BuildFailed, SignatureMismatch, Unsupported  # noqa: E402
from hasten.graph.model import read_model  # noqa: E402
from hasten.passes.cast import Cast  # noqa: E402
from hasten.passes.finetune import Finetune  # noqa: E402
from hasten.passes.fold import Fold  # noqa: E402
from hasten.passes.quantize_static import QuantizeStatic  # noqa: E402
from hasten.samples import Samples  # noqa: E402
from hasten.testing.models import Builder, convnet, mlp, stored  # noqa: E402
from hasten.torchview.history import History  # noqa: E402
from hasten.transform import HISTORY, run_pass  # noqa: E402

QUICK = Finetune(epochs=4.0, batch=32, lr=3e-3, threads=1)


def rows(n=600, seed=0):
    return np.random.default_rng(seed).standard_normal((n, 16)).astype(np.float32)


def outputs(artifact, x):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(artifact.entry), options)
    return session.run(None, {session.get_inputs()[0].name: x})[0]


def lesson(original, n=600, seed=0, x=None):
    """Samples with the classes that a model gives."""
    x = rows(n, seed) if x is None else x
    return Samples({"x": x}, outputs(original, x).argmax(1))


def damaged(model, share=0.7):
    """Add noise to every weight matrix."""
    random = np.random.default_rng(5)
    for tensor in model.graph.initializer:
        value = numpy_helper.to_array(tensor)
        if value.ndim > 1:
            noisy = value + random.standard_normal(value.shape).astype(np.float32) * share * value.std()
            tensor.CopyFrom(numpy_helper.from_array(noisy, tensor.name))
    return model


def agreement(artifact, original, x):
    return float((outputs(artifact, x).argmax(1) == outputs(original, x).argmax(1)).mean())


@pytest.fixture
def original(store):
    return stored(mlp(), store)


@pytest.fixture
def broken(store):
    return stored(damaged(mlp()), store)


@pytest.mark.parametrize("labelled", [True, False])
def test_what_was_damaged_is_repaired(labelled, original, broken, store, ctx):
    samples = lesson(original)
    samples = samples if labelled else Samples(samples.inputs)
    made = run_pass(replace(QUICK, lr=1e-2), broken, store, replace(ctx, training=samples, teacher=original))
    fresh = rows(seed=9)
    before, after = (agreement(artifact, original, fresh) for artifact in (broken, made))
    assert after > before + 0.5 * (1 - before)


def test_labels_alone_repair_without_a_teacher(original, broken, store, ctx):
    made = run_pass(replace(QUICK, lr=1e-2), broken, store, replace(ctx, training=lesson(original)))
    fresh = rows(seed=9)
    assert agreement(made, original, fresh) > agreement(broken, original, fresh) + 0.05


def test_a_convnet_with_batch_norm_is_repaired(store, ctx):
    original, broken = stored(convnet(width=4), store), stored(damaged(convnet(width=4)), store)
    x = np.random.default_rng(0).standard_normal((200, 3, 16, 16)).astype(np.float32)
    samples = Samples({"x": x + (np.arange(200)[:, None, None, None] % 3).astype(np.float32)})
    made = run_pass(replace(QUICK, lr=1e-2), broken, store, replace(ctx, training=samples, teacher=original))
    gaps = [
        np.abs(outputs(m, samples.inputs["x"]) - outputs(original, samples.inputs["x"])).mean() for m in (broken, made)
    ]
    assert gaps[1] < 0.6 * gaps[0]
    kinds = [[node.op_type for node in read_model(artifact).graph.node] for artifact in (broken, made)]
    assert kinds[0] == kinds[1]


def test_the_result_has_the_trait_the_lineage_and_its_history_beside_it(original, broken, store, ctx):
    made = run_pass(QUICK, broken, store, replace(ctx, training=lesson(original), teacher=original))
    assert made.traits == {"finetuned"}
    assert made.signature == broken.signature
    assert made.lineage[-1].name == "finetune"
    history = msgspec.json.decode((made.folder / HISTORY).read_bytes(), type=History)
    assert [epoch.number for epoch in history.epochs] == [1, 2, 3, 4]
    assert history.epochs[history.best - 1].held < history.start.held
    assert HISTORY in made.files


def test_two_runs_make_the_same_bytes(original, broken, store, ctx):
    made = []
    for _ in range(2):
        with store.scratch() as folder:
            QUICK.apply(broken, replace(ctx, folder=folder, training=lesson(original), teacher=original))
            made.append(hash_files(folder))
    assert made[0] == made[1]


def test_the_seed_of_the_run_makes_another_result(original, broken, store, ctx):
    context = replace(ctx, training=lesson(original), teacher=original)
    made = [run_pass(QUICK, broken, store, replace(context, seed=seed)).content for seed in (0, 1)]
    assert made[0] != made[1]


def test_an_interrupted_pass_goes_on_from_its_checkpoints(original, broken, store, ctx):
    calls = []

    def interrupt(text, share):
        calls.extend([share] * text.startswith("epoch"))
        if len(calls) == 2:
            raise KeyboardInterrupt

    context = replace(ctx, training=lesson(original), teacher=original)
    with pytest.raises(KeyboardInterrupt):
        run_pass(QUICK, broken, store, replace(context, progress=interrupt))
    assert list((store.root / "checkpoints").rglob("*.checkpoint"))
    shares = []
    resumed = run_pass(QUICK, broken, store, replace(context, progress=lambda text, share: shares.append(share)))
    assert shares[0] > 0.5  # two of four epochs were not made again
    with store.scratch() as folder:
        assert QUICK.apply(broken, replace(context, folder=folder)).content == resumed.content
    assert not list((store.root / "checkpoints").iterdir())


def quantized(original, store, ctx, samples):
    source = run_pass(Fold(), original, store, ctx)
    step = QuantizeStatic(per_channel=False, reduce_range=True, bias_correction=False)
    return run_pass(step, source, store, replace(ctx, samples=samples))


def unequal(model, factor=60):
    """Make two units of the first layer larger, and what reads them smaller: one scale for all loses the others."""
    for tensor in model.graph.initializer:
        value = numpy_helper.to_array(tensor).copy()
        if tensor.name in ("w0", "w1"):  # weights and bias of the first layer
            value[:2] *= factor
        elif tensor.name == "w2":
            value[:, :2] /= factor
        tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    return model


def test_what_quantization_lost_is_won_back_by_training_the_integers(store, ctx):
    original = stored(unequal(mlp()), store)
    samples = Samples({"x": rows(1500)})
    coarse = quantized(original, store, ctx, samples.take(range(64)))
    made = run_pass(replace(QUICK, epochs=10.0), coarse, store, replace(ctx, training=samples, teacher=original))
    fresh = rows(seed=9)
    before, after = (agreement(artifact, original, fresh) for artifact in (coarse, made))
    assert after > before + 0.05
    assert made.traits == {"int8", "finetuned"}


def test_a_quantized_convnet_is_repaired(store, ctx):
    original = stored(convnet(width=4), store)
    x = np.random.default_rng(0).standard_normal((200, 3, 16, 16)).astype(np.float32)
    exact = quantized(original, store, ctx, Samples({"x": x[:64]}))
    noisy, random = read_model(exact), np.random.default_rng(5)
    for tensor in noisy.graph.initializer:
        value = numpy_helper.to_array(tensor)
        if tensor.data_type == onnx.TensorProto.INT8 and value.ndim > 1:
            near = np.clip(value + random.integers(-30, 31, value.shape), -63, 63).astype(np.int8)
            tensor.CopyFrom(numpy_helper.from_array(near, tensor.name))
    broken = replace(stored(noisy, store), traits=exact.traits)
    how = replace(QUICK, epochs=6.0, loss="mse")
    made = run_pass(how, broken, store, replace(ctx, training=Samples({"x": x}), teacher=original))
    gaps = [np.square(outputs(m, x) - outputs(original, x)).mean() for m in (broken, made)]
    assert gaps[1] < 0.5 * gaps[0]


def test_a_trained_quantized_graph_is_the_same_graph_of_integers(original, store, ctx):
    samples = Samples({"x": rows()})
    coarse = quantized(original, store, ctx, samples.take(range(16)))
    made = run_pass(QUICK, coarse, store, replace(ctx, training=samples, teacher=original))
    onnx.checker.check_model(str(made.entry), full_check=True)
    before, after = (read_model(artifact).graph for artifact in (coarse, made))
    assert [(n.op_type, list(n.input), list(n.output)) for n in before.node] == [
        (n.op_type, list(n.input), list(n.output)) for n in after.node
    ]
    described = [{t.name: (t.data_type, tuple(t.dims)) for t in graph.initializer} for graph in (before, after)]
    assert described[0] == described[1]
    weights = [
        [numpy_helper.to_array(t) for t in g.initializer if t.data_type == 3 and t.dims] for g in (before, after)
    ]
    assert any((a != b).any() for a, b in zip(*weights, strict=True))


def test_without_samples_it_says_what_to_give(broken, store, ctx):
    with pytest.raises(Unsupported, match="finetune: it needs samples to train on; give some with --train"):
        run_pass(QUICK, broken, store, ctx)


def test_the_original_cannot_teach_itself(original, store, ctx):
    context = replace(ctx, training=Samples({"x": rows()}), teacher=original)
    with pytest.raises(Unsupported, match="no labels, and the only teacher is the model itself"):
        run_pass(QUICK, original, store, context)


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (mlp(classes=7), r"among the outputs the teacher has y: float32\[batch, 7\], the model y: float32\[batch, 4\]"),
        (mlp(features=8), r"among the inputs the teacher has x: float32\[batch, 8\]"),
    ],
)
def test_a_teacher_of_another_signature_is_refused(teacher, message, original, broken, store, ctx):
    with pytest.raises(SignatureMismatch, match=message):
        run_pass(QUICK, broken, store, replace(ctx, training=lesson(original), teacher=stored(teacher, store)))


def test_samples_of_another_shape_are_refused(broken, original, store, ctx):
    context = replace(ctx, training=Samples({"x": np.zeros((40, 5), np.float32)}), teacher=original)
    with pytest.raises(SignatureMismatch, match="the samples do not fit"):
        run_pass(QUICK, broken, store, context)


def test_a_planted_nan_stops_it_with_the_step_and_keeps_the_checkpoint(original, broken, store, ctx):
    samples = lesson(original)
    x = samples.inputs["x"].copy()
    x[:, 0][np.random.default_rng(0).permutation(600)[:40]] = np.nan
    context = replace(ctx, training=Samples({"x": x}, samples.labels), teacher=original)
    with pytest.raises((BuildFailed, Unsupported), match="not finite"):
        run_pass(QUICK, broken, store, context)


def test_training_that_gains_nothing_is_said_to(original, store, ctx):
    # It gives the labels already, as surely as it can: large steps can only lead away.
    context = replace(ctx, training=lesson(original))
    sure = run_pass(replace(QUICK, lr=1e-2, epochs=8.0), original, store, context)
    with pytest.raises(Unsupported, match=r"finetune: nothing was gained: on held-out rows .* try a lower lr than 9"):
        run_pass(replace(QUICK, lr=9.0), sure, store, context)


def test_a_model_that_mixes_the_samples_of_a_batch_is_refused(store, ctx):
    net = Builder(0)
    h = net.add("MatMul", "x", net.weight(16, 4))
    net.add("Sub", h, net.add("ReduceMean", h, net.constant(np.array([0], np.int64))))
    source = stored(net.model(("x", ("batch", 16)), ("y", ("batch", 4))), store)
    samples = Samples({"x": rows(64)}, np.arange(64) % 4)
    with pytest.raises(Unsupported, match="output 'y' of a sample changes"):
        run_pass(QUICK, source, store, replace(ctx, training=samples))


def test_half_precision_is_to_be_cast_after_training(original, store, ctx):
    half = run_pass(Cast(), original, store, ctx)
    assert QUICK.why_not(half) == "small steps vanish in float16 weights; train before the cast"
    assert "not 'nonsense'" in QUICK.why_not(replace(original, format="nonsense"))
