"""The main job on small networks: the right answer, and every planted fault a recorded outcome."""

import shutil
from dataclasses import replace

import numpy as np
import pytest

from hasten.engines.onnxruntime import OnnxRuntime
from hasten.errors import BadInput, BuildFailed, InvalidSetting, SignatureMismatch, UnknownName
from hasten.graph.model import read_model
from hasten.passes.fold import Fold
from hasten.samples import Samples
from hasten.search import stages
from hasten.search.journal import Journal
from hasten.search.optimize import JOURNAL, optimize
from hasten.search.result import Goal, read_result
from hasten.search.task import Effort
from hasten.store import Store
from hasten.testing import models
from hasten.transform import run_pass

QUICK = Effort(trial_s=0.5, slice_s=0.01, finals_s=1.5, limit_s=60.0)


@pytest.fixture
def convnet(store, ctx, shared_peaks):
    """A small convolutional network in a store, and samples that it labels itself: it is right everywhere."""
    shutil.copytree(shared_peaks, store.root / "peaks")
    source = models.stored(models.convnet(size=24, width=16, seed=4), store)
    session = OnnxRuntime().open(run_pass(OnnxRuntime(), source, store, ctx))
    random = np.random.default_rng(0)
    drawn = random.standard_normal((800, 3, 24, 24)) + 1.5 * random.standard_normal((800, 3, 1, 1))
    x = drawn.astype(np.float32)
    labels = session.run({"x": x})["y"].argmax(1)
    session.close()
    assert np.bincount(labels).min() > 10
    return store, source, Samples({"x": x}, labels.astype(np.int64))


def test_a_search_ends_with_a_verdict_a_deployment_and_a_result_that_can_be_read_back(convnet) -> None:
    store, source, samples = convnet
    result = optimize(
        source, samples, Goal(max_drop=0.05), engines=["onnxruntime"], threads=[1], effort=QUICK, home=store.root
    )
    assert result.verdict.word in {"MEETS", "UNPROVEN"}
    assert result.original in result.frontier
    assert result.deployment.exists()
    assert read_result(result.run / "result.json") == result
    assert sum(result.splits.values()) == len(samples)
    assert {trial.stage for trial in result.trials} == {"sweep", "lossless", "int8"}
    for item in result.certificates:
        bound = item.measurement.bound
        assert bound is not None
        parts = sum(op.time_ns or 0.0 for op in bound.operators) + bound.outside_ns
        assert parts == pytest.approx(bound.measured_ns, rel=1e-6)


def test_the_same_question_asked_again_is_answered_from_the_record(convnet) -> None:
    store, source, samples = convnet
    ask = {"engines": ["onnxruntime"], "threads": [1], "effort": QUICK, "home": store.root}
    first = optimize(source, samples, Goal(), **ask)
    events = []
    again = optimize(source, samples, Goal(), **ask, on_event=events.append)
    assert again == first
    assert not [event for event in events if event.kind == "trial-start"]


@pytest.mark.parametrize(
    ("fault", "outcome", "says"),
    [
        ("crashing", "failed", "ChildCrashed"),
        ("hanging", "failed", "ChildHung"),
        ("nan", "failed", "not finite"),
    ],
)
@pytest.mark.usefixtures("faulty_engines")
def test_a_broken_engine_is_a_recorded_outcome_and_the_search_goes_on(convnet, fault, outcome, says) -> None:
    store, source, samples = convnet
    result = optimize(
        source,
        samples,
        Goal(),
        engines=["onnxruntime", fault],
        threads=[1],
        effort=replace(QUICK, limit_s=6.0),
        home=store.root,
    )
    broken = [trial for trial in result.trials if trial.plan.engine.name == fault]
    assert broken
    assert {trial.outcome for trial in broken} == {outcome}
    assert any(says in (trial.reason or "") for trial in broken)
    assert result.trial(result.chosen).plan.engine.name == "onnxruntime"


@pytest.mark.usefixtures("faulty_engines")
def test_a_twin_of_the_original_does_not_win(convnet) -> None:
    store, source, samples = convnet
    result = optimize(
        source,
        samples,
        Goal(max_drop=0.05),
        engines=["onnxruntime", "twin"],
        threads=[1],
        effort=QUICK,
        home=store.root,
    )
    twins = [t for t in result.trials if t.plan.engine.name == "twin" and not t.plan.passes]
    assert any(trial.outcome == "measured" for trial in twins)
    assert not {trial.key for trial in twins} & set(result.frontier)
    assert result.chosen not in {trial.key for trial in twins}


def test_a_poisoned_layer_is_left_in_float(convnet, ctx) -> None:
    store, clean, samples = convnet
    folded = read_model(run_pass(Fold(), clean, store, ctx))
    convolution = [node.name for node in folded.graph.node if node.op_type == "Conv"][-1]
    classifier = next(node.name for node in folded.graph.node if node.op_type == "Gemm")
    source = models.stored(models.poison(folded, convolution, classifier), store)
    result = optimize(
        source, samples, Goal(max_drop=0.05), engines=["onnxruntime"], threads=[1], effort=QUICK, home=store.root
    )
    int8 = [t for t in result.trials if t.outcome == "measured" and "int8" in t.traits]
    whole = [t for t in int8 if "exclude" not in t.plan.passes[-1].settings]
    repaired = [t for t in int8 if classifier in t.plan.passes[-1].settings.get("exclude", [])]
    assert min(t.measurement.quality.drop.value for t in whole) > 0.05
    assert min(t.measurement.quality.drop.value for t in repaired) <= 0.05


def test_a_plan_whose_bound_is_above_the_incumbent_is_skipped_and_the_journal_says_so(convnet, monkeypatch) -> None:
    store, source, samples = convnet
    monkeypatch.setattr(stages.Limits, "floor_ns", lambda self, plan: 1e12 if plan.passes else 0.0)
    result = optimize(
        source, samples, Goal(max_drop=0.05), engines=["onnxruntime"], threads=[1], effort=QUICK, home=store.root
    )
    skipped = [trial for trial in result.trials if trial.outcome == "skipped"]
    assert skipped
    assert all("cannot run it in under" in (trial.reason or "") for trial in skipped)
    assert any("skipped" in note for note in Journal(result.run / JOURNAL).notes())


def test_forty_certify_samples_prove_no_tenth_of_a_percent(convnet) -> None:
    store, source, samples = convnet
    few = samples.take(list(range(80)))
    result = optimize(
        source, few, Goal(max_drop=0.001), engines=["onnxruntime"], threads=[1], effort=QUICK, home=store.root
    )
    assert result.splits["certify"] <= 45
    unproven = result.verdict.word == "UNPROVEN"
    assert unproven or result.chosen == result.original
    if unproven:
        assert result.verdict.more_samples is not None
        assert result.verdict.more_samples > 1000


def test_a_p99_below_the_machines_limit_is_said_at_once(convnet) -> None:
    store, source, samples = convnet
    events = []
    result = optimize(
        source,
        samples,
        Goal(p99_ns=1.0),
        engines=["onnxruntime"],
        threads=[1],
        effort=QUICK,
        home=store.root,
        on_event=events.append,
    )
    assert result.verdict.word == "INFEASIBLE"
    first_trial = next(i for i, event in enumerate(events) if event.kind == "trial-start")
    assert any("cannot run" in event.text for event in events[:first_trial])


def test_a_budget_ends_the_trials_and_leaves_time_for_the_finals(convnet) -> None:
    store, source, samples = convnet
    result = optimize(
        source,
        samples,
        Goal(),
        engines=["onnxruntime"],
        threads=[1],
        effort=replace(QUICK, budget_s=0.5),
        home=store.root,
    )
    assert len(result.trials) == 1
    assert result.chosen == result.original


def test_with_a_larger_budget_it_goes_on_where_a_smaller_one_ended(convnet) -> None:
    store, source, samples = convnet
    ask = {"engines": ["onnxruntime"], "threads": [1], "home": store.root}
    cut = optimize(source, samples, Goal(), effort=replace(QUICK, budget_s=0.5), **ask)
    whole = optimize(source, samples, Goal(), effort=QUICK, **ask)
    assert len(whole.trials) > len(cut.trials)
    assert whole.trials[: len(cut.trials)] == cut.trials
    assert whole.run == cut.run


def test_a_fresh_search_lays_the_old_one_aside(convnet) -> None:
    store, source, samples = convnet
    ask = {"engines": ["onnxruntime"], "threads": [1], "effort": replace(QUICK, budget_s=0.5), "home": store.root}
    first = optimize(source, samples, Goal(), **ask)
    second = optimize(source, samples, Goal(), fresh=True, **ask)
    assert second.trials != first.trials
    assert (first.run.with_name(f"{first.run.name}-1") / "result.json").exists()


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"engines": ["onnxruntim"]}, UnknownName, "did you mean 'onnxruntime'"),
        ({"threads": [0]}, InvalidSetting, "cores"),
        ({"goal": Goal(metric="acuracy")}, UnknownName, "did you mean 'accuracy'"),
    ],
)
def test_a_wrong_choice_is_said_before_anything_runs(convnet, change, error, says) -> None:
    store, source, samples = convnet
    with pytest.raises(error, match=says):
        optimize(source, samples, **{"goal": Goal(), "home": store.root, **change})


def test_samples_that_do_not_fit_the_signature_are_refused(convnet) -> None:
    store, source, samples = convnet
    wrong = Samples({"x": samples.inputs["x"][:, :2]}, samples.labels)
    with pytest.raises(SignatureMismatch, match="axis 1"):
        optimize(source, wrong, home=store.root)


def test_labels_of_another_length_are_refused(convnet) -> None:
    _, _, samples = convnet
    with pytest.raises(BadInput, match="800, labels has 799"):
        Samples(samples.inputs, samples.labels[:-1])


@pytest.mark.usefixtures("faulty_engines")
def test_the_original_that_does_not_run_is_an_error_not_an_outcome(tmp_path) -> None:
    store = Store(tmp_path / "home")
    source = models.stored(models.mlp(), store)
    with pytest.raises(BuildFailed, match="untouched model"):
        samples = models.random_samples(source, n=60)
        optimize(source, samples, engines=["crashing"], threads=[1], effort=QUICK, home=store.root)
