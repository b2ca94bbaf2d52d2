from __future__ import annotations

import importlib.util
import subprocess
import sys
from dataclasses import replace
from functools import partial

import msgspec
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from hasten.artifact import Artifact
from hasten.errors import InvalidSetting, MissingDependency, UnknownName, Unsupported
from hasten.graph.cut import masked
from hasten.graph.groups import channel_groups
from hasten.graph.importance import largest, unit_norms
from hasten.graph.model import read_model
from hasten.passes.prune_channels import PruneChannels, RoundsHistory
from hasten.passes.widths import macs
from hasten.samples import Samples
from hasten.store import Store
from hasten.tensors import relative_error
from hasten.testing.contracts import check_pass
from hasten.testing.models import Builder, convnet, encoder, mlp, poison, random_samples, stored, strange
from hasten.transform import Context, run_pass

SMALL = PruneChannels(ratio=0.6, grid=2)


def outputs(model: onnx.ModelProto, samples: Samples) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options).run(None, dict(samples.inputs))[0]


def softmax(logits: np.ndarray) -> np.ndarray:
    exponential = np.exp(logits - logits.max(1, keepdims=True))
    return exponential / exponential.sum(1, keepdims=True)


def sizes(artifact: Artifact) -> dict[str, int]:
    return {group.name: group.size for group in channel_groups(read_model(artifact))}


def trained(store: Store, ctx: Context, n: int = 64) -> tuple[Artifact, Context]:
    """A small network, and samples with labels that it gives itself."""
    source = stored(convnet(size=8, width=16), store)
    samples = random_samples(source, n=n)
    labels = outputs(read_model(source), samples).argmax(1)
    return source, replace(ctx, training=Samples(samples.inputs, labels), teacher=source)


@pytest.mark.parametrize("step", [SMALL, PruneChannels(ratio=0.5, grid=4, importance="l1", steps=2)])
def test_it_keeps_the_contract_of_a_pass(step, tmp_path):
    check_pass(lambda: step, tmp_path=tmp_path)


@pytest.mark.parametrize("make", [mlp, convnet, partial(encoder, width=32, heads=4)])
def test_the_pruned_model_computes_what_the_masked_one_does(make, store, ctx):
    source = stored(make(), store)
    model = read_model(source)
    exact = [group for group in channel_groups(model) if group.exact]
    widths = {group.name: group.size // 2 for group in exact}
    made = run_pass(PruneChannels(widths=widths), source, store, ctx)
    keep = {group.name: largest(unit_norms(model, group, 2), widths[group.name]) for group in exact}
    samples = random_samples(source)
    assert sizes(made) == sizes(source) | widths
    assert relative_error(outputs(masked(model, keep), samples), outputs(read_model(made), samples)) < 1e-5


@pytest.mark.parametrize("ratio", [0.8, 0.6, 0.4])
def test_a_ratio_is_met_within_a_grid_step(ratio, store, ctx):
    source = stored(convnet(width=32), store)
    made = run_pass(PruneChannels(ratio=ratio, grid=2), source, store, ctx)
    left = macs(read_model(made), {}) / macs(read_model(source), {})
    assert ratio - 0.05 < left <= ratio  # the widest layer has 64 channels, and makes half of all: a step is 3 %


def test_the_signature_stays_and_the_trait_says_pruned(store, ctx):
    source = stored(convnet(width=16), store)
    made = run_pass(SMALL, source, store, ctx)
    assert made.signature == source.signature
    assert made.traits == {"pruned"}
    assert made.size_bytes < source.size_bytes


def test_kept_channels_are_multiples_of_the_grid(store, ctx):
    source = stored(mlp(hidden=50), store)
    made = run_pass(PruneChannels(ratio=0.4, grid=8), source, store, ctx)
    assert set(sizes(made).values()) <= {8, 16, 24, 32, 40, 48, 50}
    assert sizes(made) != sizes(source)


def test_given_widths_are_taken_as_they_are(store, ctx):
    source = stored(mlp(), store)
    assert sizes(run_pass(PruneChannels(widths={"gemm_0": 5}), source, store, ctx)) == {"gemm_0": 5, "gemm_2": 32}


def test_channels_that_everything_depends_on_survive(store, ctx):
    # Without the scale of their readers, the norms see at once which channels are loud.
    source = stored(poison(mlp(), "gemm_0", "gemm_2"), store)
    model, made = read_model(source), run_pass(PruneChannels(widths={"gemm_0": 4}), source, store, ctx)
    before, after = (
        numpy_helper.to_array(next(t for t in m.graph.initializer if t.name == m.graph.node[0].input[1]))
        for m in (model, read_model(made))
    )
    np.testing.assert_array_equal(after[:2], before[:2])


def test_rounds_fall_in_equal_ratios_to_the_same_end(store, ctx):
    source = stored(mlp(hidden=64), store)
    seen = []
    step = PruneChannels(widths={"gemm_0": 8}, steps=3, grid=4, importance="l1")
    told = replace(ctx, progress=lambda text, share: seen.append((text, share)))
    made = run_pass(step, source, store, told)
    assert sizes(made)["gemm_0"] == 8
    assert seen == [("round 1 of 3", 0), ("round 2 of 3", 1 / 3), ("round 3 of 3", 2 / 3)]


def test_widths_that_a_model_has_already_leave_it_as_it_is(store, ctx):
    source = stored(mlp(), store)
    assert run_pass(PruneChannels(widths={"gemm_0": 32}), source, store, ctx) == source
    assert run_pass(PruneChannels(ratio=1.0), source, store, ctx) == source


def test_an_unknown_group_is_an_error_with_the_nearest(store, ctx):
    with pytest.raises(UnknownName, match="did you mean 'gemm_0'"):
        run_pass(PruneChannels(widths={"gemm0": 8}), stored(mlp(), store), store, ctx)


@pytest.mark.parametrize("width", [0, 33])
def test_a_width_that_does_not_fit_is_an_error(width, store, ctx):
    with pytest.raises(InvalidSetting, match="'gemm_0' has 32 units"):
        run_pass(PruneChannels(widths={"gemm_0": width}), stored(mlp(), store), store, ctx)


def test_a_ratio_out_of_reach_says_so_before_anything_is_trained(store, ctx):
    source, ctx = trained(store, ctx)
    with pytest.raises(Unsupported, match="ask for a larger ratio"):
        run_pass(PruneChannels(ratio=0.05, epochs=1, steps=3), source, store, ctx)


def test_a_model_whose_channels_all_stay_is_declined_with_the_reason(store):
    reason = PruneChannels().why_not(stored(strange(), store))
    assert reason is not None
    assert "Strange" in reason


def test_a_model_without_layers_is_declined(store):
    net = Builder(0)
    net.add("Relu", "x")
    reason = PruneChannels().why_not(stored(net.model(("x", ("batch", 4)), ("y", ("batch", 4))), store))
    assert reason == "it has no layer whose channels only other layers of it read"


def test_a_quantized_or_pruned_model_is_declined(store, ctx):
    source = stored(mlp(), store)
    assert "prune first" in str(PruneChannels().why_not(replace(source, traits=frozenset({"int8"}))))
    made = run_pass(SMALL, source, store, ctx)
    assert "pruned already" in str(SMALL.why_not(made))
    assert PruneChannels(widths={"gemm_0": 4}).why_not(made) is None


def test_training_in_half_precision_is_declined(store):
    source = replace(stored(mlp(), store), traits=frozenset({"float16"}))
    assert "before the cast" in str(PruneChannels(epochs=1).why_not(source))
    assert PruneChannels().why_not(source) is None


@pytest.mark.parametrize("settings", [{"importance": "taylor"}, {"epochs": 1.0}])
def test_without_samples_to_train_on_it_says_what_to_give(settings, store, ctx):
    with pytest.raises(Unsupported, match="--train"):
        run_pass(PruneChannels(**settings), stored(mlp(), store), store, ctx)


def test_without_torch_gradients_say_what_to_install(store, ctx, monkeypatch):
    source = stored(mlp(), store)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match=r"pip install 'hasten\[train\]'"):
        PruneChannels(epochs=1).apply(source, replace(ctx, training=random_samples(source)))


def test_norms_without_training_do_not_load_torch(tmp_path):
    code = f"""
import sys
from pathlib import Path
from hasten.registry import load
from hasten.store import Store
from hasten.testing.models import mlp, random_samples, stored
from hasten.transform import Context, run_pass
store = Store(Path({str(tmp_path)!r}))
source = stored(mlp(), store)
ctx = Context(folder=store.root, samples=None, seed=0, progress=lambda *_: None, training=random_samples(source))
assert run_pass(load("pass", "prune-channels")(), source, store, ctx) != source
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_statistics_of_batch_norm_are_taken_anew_where_samples_are(store, ctx):
    source, ctx = trained(store, ctx)
    old, new = (read_model(run_pass(replace(SMALL, recalibrate=value), source, store, ctx)) for value in (False, True))
    assert [list(t.dims) for t in old.graph.initializer] == [list(t.dims) for t in new.graph.initializer]
    assert old != new
    mean = next(n for n in new.graph.node if n.op_type == "Conv").output[0]
    scratch = onnx.ModelProto()
    scratch.CopyFrom(new)
    scratch.graph.output.extend(value for value in new.graph.value_info if value.name == mean)
    h = onnxruntime.InferenceSession(scratch.SerializeToString()).run([mean], dict(ctx.training.inputs))[0]
    norm = next(n for n in new.graph.node if n.op_type == "BatchNormalization")
    told = next(numpy_helper.to_array(t) for t in new.graph.initializer if t.name == norm.input[3])
    np.testing.assert_allclose(told, h.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)


class TestTraining:
    """Rounds that train: these need torch."""

    STEP = PruneChannels(ratio=0.4, grid=2, steps=2, epochs=3.0, batch=16, lr=3e-3)

    @pytest.fixture(autouse=True)
    def torch(self):
        return pytest.importorskip("torch")

    def test_training_brings_back_what_the_cut_took(self, store, ctx):
        source, ctx = trained(store, ctx)
        plain = run_pass(replace(self.STEP, epochs=0.0), source, store, ctx)
        taught = run_pass(replace(self.STEP, epochs=10.0), source, store, ctx)
        before, cut, after = (softmax(outputs(read_model(made), ctx.training)) for made in (source, plain, taught))
        assert np.abs(after - before).mean() < 0.7 * np.abs(cut - before).mean()

    def test_its_history_is_beside_the_model(self, store, ctx):
        source, ctx = trained(store, ctx)
        made = run_pass(self.STEP, source, store, ctx)
        told = msgspec.json.decode((made.folder / "training.json").read_bytes(), type=RoundsHistory)
        assert "training.json" in made.files
        assert [epoch.number for epoch in told.epochs] == [1, 2, 3, 4, 5, 6]
        assert [entry.epochs for entry in told.rounds] == [3, 3]
        last = {name: width for entry in told.rounds for name, width in entry.widths.items()}
        assert sizes(made) == sizes(source) | last

    @pytest.mark.parametrize("at", ["round 1 of 2: epoch", "round 2 of 2: epoch", "round 2 of 2"])
    def test_an_interrupted_pass_goes_on_from_its_round(self, at, store, ctx, tmp_path):
        source, ctx = trained(store, ctx)
        whole = run_pass(self.STEP, source, store, ctx)

        def stop(text, share):
            if text.startswith(at):
                raise KeyboardInterrupt

        other = Store(tmp_path / "other")
        source = stored(convnet(size=8, width=16), other)
        with pytest.raises(KeyboardInterrupt):
            run_pass(self.STEP, source, other, replace(ctx, progress=stop, teacher=source))
        left = {path.name for path in (other.root / "checkpoints").glob("*/round-*/*")}
        seen: list[str] = []
        again = replace(ctx, progress=lambda text, share: seen.append(text), teacher=source)
        made = run_pass(self.STEP, source, other, again)
        assert "cut" in left
        assert ("done" in left) == at.startswith("round 2")
        assert any(text.startswith("round 1 of 2:") for text in seen) == at.startswith("round 1")
        assert made.content == whole.content
        assert not list((other.root / "checkpoints").iterdir())
