"""The stage that trains, on a small network: widths from measured tables, halving, quantization-aware training."""

import dataclasses
import math
import shutil
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")


from hasten.engines.onnxruntime import OnnxRuntime  # noqa: E402
from hasten.errors import InvalidSetting, MissingDependency  # noqa: E402
from hasten.graph.groups import Group  # noqa: E402
from hasten.plan import Part  # noqa: E402
from hasten.samples import Samples  # noqa: E402
from hasten.search import compress as stage  # noqa: E402
from hasten.search import train as training  # noqa: E402
from hasten.search.journal import Journal  # noqa: E402
from hasten.search.knobs import Knobs  # noqa: E402
from hasten.search.optimize import JOURNAL, optimize  # noqa: E402
from hasten.search.result import Goal, read_result  # noqa: E402
from hasten.search.table import Sensitivities  # noqa: E402
from hasten.search.task import Effort  # noqa: E402
from hasten.search.timing import time_blocks  # noqa: E402
from hasten.testing import models  # noqa: E402
from hasten.transform import run_pass  # noqa: E402

from .trials import trial  # noqa: E402

QUICK = Effort(trial_s=0.4, slice_s=0.01, finals_s=1.5, limit_s=60.0, epochs=6.0)


@pytest.fixture
def convnet(store, ctx, shared_peaks):
    """A small convolutional network in a store, samples that it labels itself, and as many more to train on."""
    shutil.copytree(shared_peaks, store.root / "peaks")
    source = models.stored(models.convnet(size=16, width=16, seed=4), store)
    session = OnnxRuntime().open(run_pass(OnnxRuntime(), source, store, ctx))
    random = np.random.default_rng(0)
    drawn = random.standard_normal((1200, 3, 16, 16)) + 1.5 * random.standard_normal((1200, 3, 1, 1))
    x = drawn.astype(np.float32)
    labels = session.run({"x": x})["y"].argmax(1).astype(np.int64)
    session.close()
    return store, source, Samples({"x": x[:600]}, labels[:600]), Samples({"x": x[550:]}, labels[550:])


@pytest.fixture
def small(monkeypatch):
    """Fewer plans, so that the test takes seconds; blocks timed here are too short to be ranked on a busy machine.

    Each is timed all the same (``tests/search/test_costmodel.py`` judges the times), but counts by its size.
    """
    monkeypatch.setattr(stage, "BUILT", 3)
    monkeypatch.setattr(stage, "CANDIDATES", 2)
    monkeypatch.setattr(training, "CANDIDATES", 2)
    monkeypatch.setattr(stage, "WORTH", 0.5)

    def by_size(blocks, *rest, **settings):
        times = time_blocks(blocks, *rest, **settings)
        assert set(times.ns) == {block.key for block in blocks}
        sizes = {b.key: 10.0 * sum(math.prod(value.shape) for _, value in b.values) for b in blocks}
        return dataclasses.replace(times, ns=sizes)

    monkeypatch.setattr(stage, "time_blocks", by_size)


@pytest.mark.usefixtures("small")
def test_a_search_with_samples_to_train_on_prunes_trains_and_ends_in_a_verdict(convnet) -> None:
    store, source, samples, training = convnet
    result = optimize(
        source,
        samples,
        Goal(max_drop=0.1),
        training=training,
        engines=["onnxruntime"],
        threads=[1],
        effort=QUICK,
        home=store.root,
    )
    assert result.verdict.word in {"MEETS", "UNPROVEN", "BEST_EFFORT", "INCONCLUSIVE"}
    assert result.splits["train"] == 600  # 50 of the 650 are among the samples that it is judged by
    stages = {trial.stage for trial in result.trials}
    assert "compress" in stages
    passes = [[part.name for part in trial.plan.passes] for trial in result.trials if trial.stage == "compress"]
    notes = Journal.open(result.run / JOURNAL).notes()
    assert any(names[0] == "prune-channels" and "finetune" in names for names in passes), (passes, notes)
    found = result.compression
    assert found is not None
    assert found.cells
    assert all(cell.units < cell.size and cell.kl >= 0 for cell in found.cells)
    measured = [item for item in found.predictions if item.measured_ns is not None]
    assert measured
    assert all(item.refitted_ns is not None for item in measured)
    assert {curve.step for curve in found.curves} >= {"finetune 1"}
    assert read_result(result.run / "result.json") == result
    assert any("predicted against measured" in note for note in notes)


@pytest.mark.usefixtures("small")
def test_where_int8_leads_the_winner_is_trained_with_its_quantizers_in_place(convnet, monkeypatch) -> None:
    store, source, samples, training = convnet
    led = stage.recipe

    def quantized(bench):
        found = led(bench)
        int8 = [t for t in bench.trials.values() if "int8" in t.traits and t.outcome == "measured"]
        return next((t for t in int8 if t.plan.passes[-1].name == "quantize-static"), found)

    monkeypatch.setattr(stage, "recipe", quantized)
    monkeypatch.setattr(stage, "_pruned", lambda bench, found: [])
    ask = {"engines": ["onnxruntime"], "threads": [1], "effort": QUICK, "home": store.root}
    result = optimize(source, samples, Goal(max_drop=0.1), training=training, **ask)
    passes = [[p.name for p in trial.plan.passes] for trial in result.trials if trial.outcome == "measured"]
    assert ["fold", "quantize-static", "finetune"] in passes


def test_without_samples_to_train_on_nothing_is_trained(convnet) -> None:
    store, source, samples, _ = convnet
    ask = {"engines": ["onnxruntime"], "threads": [1], "effort": QUICK, "home": store.root}
    result = optimize(source, samples, Goal(max_drop=0.1), **ask)
    assert result.compression is None
    assert "compress" not in {trial.stage for trial in result.trials}


def trained(speed, drop, seconds, *, epochs=(), mark):
    """Make a trial behind trainings of so many epochs each."""
    made = trial(speed, drop, mark=mark)
    passes = (Part("prune-channels"), *(Part("finetune", {"epochs": each}) for each in epochs))
    return dataclasses.replace(made, plan=made.plan.with_passes(*passes), seconds=seconds)


def test_an_epoch_takes_what_trials_with_training_take_more_than_others() -> None:
    trials = [trained(1.5, 0.1, 10.0, mark=1), trained(1.4, 0.1, 12.0, mark=2), trained(1.3, 0.1, 14.0, mark=3)]
    assert training.epoch_seconds(trials) is None
    trials += [trained(1.5, 0.02, 32.0, epochs=(0.2,), mark=4), trained(1.5, 0.02, 52.0, epochs=(0.2, 0.2), mark=5)]
    assert training.epoch_seconds(trials) == pytest.approx(100.0)
    broken = dataclasses.replace(trained(1.0, 0.0, 900.0, epochs=(0.1,), mark=6), outcome="failed")
    assert training.epoch_seconds([*trials, broken]) == pytest.approx(100.0)


class Short:
    """A search with so many seconds left before its finals."""

    def __init__(self, left_s, trials, kept=None) -> None:
        effort = dataclasses.replace(QUICK, budget_s=600.0)
        metric = dataclasses.make_dataclass("Metric", ["name"])("accuracy")
        self.task = dataclasses.make_dataclass(
            "Task", ["effort", "goal", "splits", "source", "store", "build_limits", "metric"]
        )(effort, Goal(max_drop=0.01), {"certify": 5000}, None, None, None, metric)
        self.task.samples = lambda split: None
        self.trials = {item.plan.key: item for item in trials}
        self.left_s, self.kept = left_s, {} if kept is None else kept
        self.journal = self

    def budget_left_s(self) -> float:
        return self.left_s + self.reserve_s()

    def reserve_s(self) -> float:
        return 150.0

    def check_budget(self) -> None:
        return

    def progress(self, text, share) -> None:
        return

    def run(self, plan):
        return self.trials[plan.key]

    def note(self, text) -> None:
        self.notes = [*getattr(self, "notes", []), text]

    def recall(self, name, kind):
        return self.kept.get(name)

    def record(self, name, value) -> None:
        self.kept[name] = value


def test_trainings_are_as_long_as_there_is_time_for_and_stay_so_when_the_search_goes_on() -> None:
    trials = [trained(1.5, 0.1, 10.0, mark=1), trained(1.5, 0.02, 30.0, epochs=(0.2,), mark=2)]
    short = Short(250.0, trials)
    assert training._within_budget(short, 8.0) == pytest.approx(2.5)
    assert training._within_budget(Short(20.0, trials, short.kept), 8.0) == pytest.approx(2.5), "resumed"
    assert training._within_budget(Short(5000.0, trials), 8.0) == 8.0
    assert training._within_budget(Short(-10.0, trials), 8.0) == 0.0
    assert training._within_budget(Short(250.0, trials[:1]), 8.0) == 8.0, "nobody knows how long an epoch takes"


def test_the_choice_of_knobs_takes_its_share_of_the_time_that_there_is() -> None:
    trials = [trained(1.5, 0.1, 10.0, mark=1), trained(1.5, 0.02, 30.0, epochs=(0.2,), mark=2)]
    short = Short(2000.0, trials)  # 20 epochs of 100 s, and a share of 0.15 of them
    short.task.effort = dataclasses.replace(short.task.effort, epochs=24.0)
    assert training._knob_tries(short, 0.6) == 5
    resumed = Short(10.0, trials, short.kept)
    assert training._knob_tries(resumed, 0.6) == 5
    hurried = Short(100.0, trials)
    assert training._knob_tries(hurried, 0.6) == 1, "the usual ones alone"


def test_a_plan_that_training_may_bring_within_the_drop_promises_more_than_a_fast_ruin() -> None:
    ruin, mild, unmeasured = trial(2.7, 0.7, mark=1), trial(1.35, 0.03, mark=2), trial(3.0, 0.0, mark=3)
    unmeasured = dataclasses.replace(unmeasured, outcome="failed", measurement=None)
    short = Short(250.0, [ruin, mild, unmeasured])
    promises = {
        item.plan.key: training._promise(short, item.plan.key, speed, left=0.25)
        for item, speed in ((ruin, 2.7), (mild, 1.35), (unmeasured, 0.0))
    }
    assert promises[mild.plan.key] > promises[ruin.plan.key] > promises[unmeasured.plan.key]


def test_where_no_plan_could_be_measured_nothing_is_trained_and_the_search_goes_on() -> None:
    failed = dataclasses.replace(trained(2.0, 0.0, 1.0, mark=1), outcome="failed", measurement=None)
    short = Short(250.0, [failed])
    found = trial(1.2, 0.0, mark=2)
    training.train(short, found, [failed.plan])
    assert short.notes == ["nothing more is trained: no plan with cut channels could be measured"]


@pytest.mark.parametrize("fails", ["longer", "usual rate"])
def test_a_training_that_gains_nothing_does_not_end_a_candidate(fails, monkeypatch) -> None:
    """A high rate can undo what was won back before, or throw off what was hardly hurt: it may still win."""
    candidates = [trained(speed, 0.2, 10.0, mark=mark).plan for mark, speed in ((1, 2.0), (2, 1.5))]
    short = Short(1e9, [trained(speed, 0.2, 10.0, mark=mark) for mark, speed in ((1, 2.0), (2, 1.5))])
    kind = dataclasses.make_dataclass("Kind", ["preprocess", "classes", "name"])
    short.task = dataclasses.make_dataclass("Task", ["source", "metric", "effort", "goal", "splits"])(
        kind(None, True, ""),
        kind(None, True, "accuracy"),
        dataclasses.replace(QUICK, epochs=5.0),
        Goal(max_drop=0.01),
        {"certify": 5000, "train": 640},
    )

    def run(plan):
        trainings = [part for part in plan.passes if part.name == "finetune"]
        if plan.key not in short.trials:
            made = dataclasses.replace(trial(1.8, 0.1), plan=plan)
            ended = {"outcome": "failed", "measurement": None, "reason": "nothing was gained"}
            lost = {"longer": len(trainings) > 1, "usual rate": bool(trainings) and "lr" not in trainings[0].settings}
            short.trials[plan.key] = dataclasses.replace(made, **ended) if lost[fails] else made
        return short.trials[plan.key]

    monkeypatch.setattr(short, "run", run)
    training.train(short, trial(1.2, 0.0, mark=3), candidates)
    rates = {
        part.settings.get("lr")
        for each in short.trials.values()
        for part in each.plan.passes
        if part.name == "finetune"
    }
    if fails == "longer":
        assert [text[:37] for text in short.notes] == ["stays as it was after 1 trainings: pr"]
        assert rates == {None}
    else:
        assert not getattr(short, "notes", [])
        assert rates == {None, 1e-4}, "trained again at a tenth of the rate"


def test_groups_that_are_one_in_another_form_of_the_graph_are_not_taken_apart() -> None:
    """Two layers whose equal biases were merged: a cut of one would be priced as a cut of the other."""
    one, other, third = (Group(name, 8, (), (name,), exact=True) for name in "abc")
    merged = Group("a", 8, (), ("a", "b"), exact=True)
    assert stage._aliases([one, other, third], [merged, third]) == {"c": "c"}


def test_pictures_are_moved_only_where_they_stay_what_they_are() -> None:
    """A mirrored picture has its class still; its boxes and landmarks lie elsewhere."""
    kind = dataclasses.make_dataclass("Kind", ["preprocess", "classes", ("name", str, "accuracy")])
    for preprocess, classes, moved in ((object(), True, True), (object(), False, False), (None, True, False)):
        short = Short(250.0, [])
        task = dataclasses.make_dataclass("Task", ["source", "metric", "effort"])
        short.task = task(kind(preprocess, None), kind(None, classes), Effort())
        assert ("augment" in training._finetune(short, 1.0, Knobs()).settings) == moved


@pytest.mark.parametrize(("device", "told"), [("cpu", None), ("cuda:1", "cuda:1")])
def test_trainings_of_a_search_run_where_it_was_asked_and_cpu_is_not_worth_a_word(device, told) -> None:
    kind = dataclasses.make_dataclass("Kind", ["preprocess", "classes", ("name", str, "accuracy")])
    short = Short(250.0, [])
    task = dataclasses.make_dataclass("Task", ["source", "metric", "effort"])
    short.task = task(kind(None, None), kind(None, True), Effort(device=device))
    assert training._finetune(short, 1.0, Knobs()).settings.get("device") == told


@pytest.mark.parametrize(
    ("metric", "classes", "loss"), [("accuracy", True, None), ("mse", False, "mse"), ("mine.py:score", False, None)]
)
def test_values_are_trained_by_their_squares_and_not_as_if_they_were_classes(metric, classes, loss) -> None:
    kind = dataclasses.make_dataclass("Kind", ["preprocess", "classes", "name"])
    short = Short(250.0, [])
    task = dataclasses.make_dataclass("Task", ["source", "metric", "effort"])
    short.task = task(kind(None, None, ""), kind(None, classes, metric), Effort())
    assert training._finetune(short, 1.0, Knobs()).settings.get("loss") == loss


def test_a_plan_that_is_ruined_is_not_trained() -> None:
    ruined = trained(3.0, 0.7, 10.0, mark=1)
    short = Short(1e9, [ruined])
    training.train(short, trial(1.2, 0.0, mark=2), [ruined.plan])
    assert short.notes == ["nothing more is trained: no plan with cut channels could be measured"]


@pytest.mark.parametrize("found", [False, True])
def test_the_device_is_a_gpu_where_there_is_one(found, monkeypatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: found)
    assert training.training_device("auto") == ("cuda" if found else "cpu")


def test_a_device_that_is_not_here_is_refused_before_the_search() -> None:
    pytest.importorskip("torch")
    with pytest.raises(InvalidSetting, match="device = 'cuda:99'"):
        training.training_device("cuda:99")


def test_without_torch_a_device_by_name_is_refused_with_the_command_that_mends_it(monkeypatch) -> None:
    monkeypatch.delitem(sys.modules, "hasten.torchview.machine", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert training.training_device("auto") == training.training_device("cpu") == "cpu"
    with pytest.raises(MissingDependency, match=r"pip install 'hasten\[train\]'"):
        training.training_device("cuda")


def test_a_search_that_is_resumed_keeps_its_table_and_one_with_more_time_completes_it(monkeypatch) -> None:
    part, whole = (Sensitivities(rows=(), failures=dict.fromkeys(names, "no")) for names in (["a=8"], ["a=8", "b=8"]))
    asked = []

    def measure(*_, known, keep, **__):
        asked.append(known)
        return part if known is None else whole

    monkeypatch.setattr(stage, "sensitivities", measure)
    short = Short(250.0, [])
    assert stage._losses(short, (), lambda: True) == part
    assert stage._losses(short, (), lambda: False) == part
    assert asked == [None]
    short.task.effort = dataclasses.replace(QUICK, budget_s=6000.0)
    assert stage._losses(short, (), lambda: False) == whole
    assert asked == [None, part]


def test_candidates_are_chosen_for_much_and_for_little_that_training_wins_back() -> None:
    """Were all of them chosen as if nearly everything came back, a slower and surer one would not be among them."""
    drops = {7.0: 0.4, 3.3: 0.1, 3.0: 0.06, 2.4: 0.02, 1.6: 0.004}
    trials = [trial(speed, drop, mark=number) for number, (speed, drop) in enumerate(drops.items())]
    short = Short(250.0, trials)
    speeds = {item.key: speed for item, speed in zip(trials, drops, strict=True)}
    shares = [0.05, 0.1, 0.22, 0.5]
    found = {speeds[key] for key in training._hedged(short, list(speeds), speeds, shares)}
    assert len(found) == 4
    assert 1.6 in found or 2.4 in found
    assert {speeds[key] for key in training._hedged(short, list(speeds)[:2], speeds, shares)} == {7.0, 3.3}


@pytest.mark.parametrize(
    ("budget_s", "begun_s", "until_s"),
    [(None, 500.0, math.inf), (360.0, 60.0, 165.0), (360.0, 20.0, 145.0), (360.0, 200.0, 235.0), (900.0, 10.0, 342.5)],
)
def test_tables_have_half_of_what_the_stages_before_have_left(budget_s, begun_s, until_s) -> None:
    """However long the sweep was: a third of the whole budget may be over before the tables begin."""

    class Clock:
        task = dataclasses.make_dataclass("Task", ["effort"])(dataclasses.replace(QUICK, budget_s=budget_s))
        now_s = begun_s

        def elapsed(self) -> float:
            return self.now_s

        def budget_left_s(self) -> float | None:
            return None if budget_s is None else budget_s - self.now_s

        def reserve_s(self) -> float:
            return 0.25 * budget_s

    clock = Clock()
    is_late = stage._lateness(clock)
    clock.now_s = min(until_s, 1e9) - 1e-3
    assert not is_late()
    clock.now_s = until_s + 1e-3
    assert is_late() == (budget_s is not None)
