"""Training within a search: which plans are trained, and for how long, by successive halving; then the winner in int8.

Each rung goes on from the parameters of the one before, at a new cycle of the learning rate (I. Loshchilov, F. Hutter,
"SGDR", arXiv:1608.03983), so no epoch is spent twice. Before the halving, where the epochs allow it, short trainings of
one candidate settle learning rate, temperature and the teacher's share (``knobs``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np

from hasten.errors import MissingDependency, Unsupported
from hasten.metrics import METRICS
from hasten.plan import Part, Plan
from hasten.search.bench import Bench
from hasten.search.frontier import cost, loss
from hasten.search.halving import rungs, successive_halving
from hasten.search.knobs import Knobs, tune
from hasten.search.result import Trial
from hasten.search.stages import TOLERABLE_DROP, provable_drop
from hasten.search.task import AUTO, TRAIN
from hasten.torchview.recipe import Recipe

CANDIDATES = 4
"""Plans with cut channels that are trained."""

HOPELESS = 0.6
"""Drop, before any training, from which a cut plan is not trained."""

RECOVERY = 0.7
"""Share of a drop that is expected to be left after a rung of twice the epochs; of a ResNet-20, between a half and five
epochs, it was 0.53 to 0.84."""

LEAST_LEFT = 1e-3
"""No training is expected to leave less of a drop."""

PENALTY = 0.5
"""What an expected drop over the limit by as much as the limit itself counts for, as a logarithm of speed."""

LEAST_EPOCHS = 0.25
"""Of a training that says anything where time is short; else one."""

QAT_SHARE = 0.5
"""Epochs of quantization-aware training, as a share of those of the last rung."""

QAT_LR = 0.1
"""Of the learning rate of the trainings before it."""

KNOB_TRIES = 6
KNOB_SHARE = 0.15
"""Of all epochs, for the trainings that settle the knobs, together."""

KNOB_STEPS = 100
"""Steps of a training that says something of its knobs."""


def train(bench: Bench, found: Trial, candidates: Sequence[Plan]) -> None:
    """Settle the knobs, halve the candidates, then train the winner's quantized form."""
    by_key = {plan.key: plan for plan in candidates}
    for plan in candidates:
        bench.run(plan)
    speeds = {key: _speed(bench, key) for key in by_key}
    hopeful = [plan for plan in candidates if _cuts(plan) and speeds[plan.key] and not is_hopeless(bench, plan)]
    cut_plans = sorted(hopeful, key=lambda plan: -speeds[plan.key])
    settled = _settled(bench, cut_plans)
    knobs = settled.knobs
    wanted = bench.task.effort.epochs - settled.epochs
    allowed = _within_budget(bench, wanted)
    epochs = allowed / (1 + QAT_SHARE / 2)
    least = LEAST_EPOCHS if allowed < wanted or epochs < 1.0 else 1.0
    if epochs < least:
        more = "budget" if allowed < wanted else "number of epochs"
        bench.note(f"nothing more is trained: {epochs:.2g} epochs are too few for the candidates; give a larger {more}")
        return
    entrants = min(len(cut_plans), CANDIDATES) + sum(not _cuts(plan) for plan in candidates)
    if not entrants:
        bench.note("nothing more is trained: no plan with cut channels could be measured")
        return
    ladder = [rung.epochs for rung in rungs(entrants, budget_epochs=epochs, least_epochs=least)]
    low = max(settled.left(len(ladder)), LEAST_LEFT)
    shares = np.geomspace(low, max(settled.left(1), low), CANDIDATES).tolist()
    promises = {key: _promise(bench, key, speeds[key], left=shares[0]) for key in by_key}
    chosen = _hedged(bench, [plan.key for plan in cut_plans], speeds, shares)
    by_key = {key: plan for key, plan in by_key.items() if key in chosen or not _cuts(plan)}

    def evaluate(key: str, effort: float) -> float:
        wanted = [each for each in ladder if each <= effort * 1.001]
        trial, gained = _climb(bench, by_key[key], wanted, knobs)
        return _score(bench, trial, speeds[key], left=RECOVERY ** (len(ladder) - len(wanted)) if gained else 1.0)

    made = successive_halving(
        sorted(by_key, key=lambda key: -promises[key]),
        evaluate,
        budget_epochs=epochs,
        least_epochs=least,
        memory=bench.journal,
    )
    for item in made.tries:
        if item.score is None:
            bench.note(f"fell out of the halving: {by_key[item.candidate]}: {item.reason}")
    if "int8" in found.traits:
        for key in [key for key in made.ranking if _cuts(by_key[key])][:2]:
            bench.check_budget()
            own = _bearable(bench, by_key[key], ladder[0], knobs)
            plan = _tuned(bench, by_key[key], _reached(bench, by_key[key], ladder, own), own)
            bench.run(plan.with_passes(*plan.passes, _finetune(bench, ladder[-1] * QAT_SHARE, _slower(knobs))))


def _within_budget(bench: Bench, epochs: float) -> float:
    """Give so many of the epochs as there is time for, by what those before have taken.

    It is kept, so that a search that is resumed goes on alike.
    """
    budget = bench.task.effort.budget_s
    if budget is None:
        return epochs
    name = f"compression: epochs within {budget:g} s"
    kept = bench.journal.recall(name, float)
    if kept is None:
        kept = _affordable(bench, epochs)
        bench.journal.record(name, kept)
    return kept


def _affordable(bench: Bench, epochs: float) -> float:
    """Give so many of the epochs as there is time for now; all, where nobody knows how long one takes."""
    left, each_s = bench.budget_left_s(), epoch_seconds(list(bench.trials.values()))
    return epochs if left is None or each_s is None else min(epochs, max(left - bench.reserve_s(), 0.0) / each_s)


def epoch_seconds(trials: Sequence[Trial]) -> float | None:
    """Give the seconds that an epoch of training takes, measuring what came of it left out; None: none was trained."""
    measured = [trial for trial in trials if trial.outcome == "measured"]
    trained = {trial.plan.key: _epochs(trial.plan) for trial in measured}
    usual = [trial.seconds for trial in measured if not trained[trial.plan.key]]
    longer = [
        max(trial.seconds - float(np.median(usual)), 0.0) / trained[trial.plan.key]
        for trial in measured
        if usual and trained[trial.plan.key]
    ]
    return max(float(np.median(longer)), 1e-3) if longer else None


def _epochs(plan: Plan) -> float:
    return sum(float(part.settings["epochs"]) for part in plan.passes if part.name == "finetune")


def _hedged(bench: Bench, keys: Sequence[str], speeds: Mapping[str, float], shares: Sequence[float]) -> set[str]:
    """Choose a candidate for each share of its drop that training may leave: the one that promises most under it.

    How much can be won back nobody knows before: chosen by the hopeful share alone, all of them may be lost in the end.
    """
    chosen: set[str] = set()
    for share in shares:
        left = [key for key in keys if key not in chosen]
        if left:
            chosen.add(max(left, key=lambda key: _promise(bench, key, speeds[key], left=share)))
    return chosen


def _promise(bench: Bench, key: str, speed: float, *, left: float) -> float:
    """Say what a candidate promises before it is trained; one that could not be measured comes last."""
    trial = bench.trials[key]
    return _score(bench, trial, speed, left=left) if trial.outcome == "measured" else -math.inf


@dataclass(frozen=True)
class Settled:
    """The knobs, the epochs that it took to settle them, and the share of a drop that the shortest training left."""

    knobs: Knobs = field(default_factory=Knobs)
    epochs: float = 0.0
    first: float = RECOVERY

    def left(self, count: int) -> float:
        """Give the share of a drop that is expected to be left after so many rungs."""
        return self.first * RECOVERY ** (count - 1)


def _settled(bench: Bench, plans: Sequence[Plan]) -> Settled:
    """Settle the knobs by short trainings of the middle one of the plans, the fastest first."""
    each = bench.task.effort.epochs * KNOB_SHARE / KNOB_TRIES
    if not plans or each * bench.task.splits[TRAIN] < KNOB_STEPS * Recipe.batch:
        return Settled()
    plan = plans[len(plans) // 2]

    def evaluate(knobs: Knobs) -> float:
        trial = bench.run(_tuned(bench, plan, [each], knobs))
        judged = trial.measurement.quality if trial.measurement else None
        if judged is None:
            raise Unsupported("training", trial.reason or "it was not judged")
        return judged.drop.value

    bench.run(_tuned(bench, plan, [each], Knobs()))  # how long an epoch takes is known then
    tries = _knob_tries(bench, each)
    try:
        found = tune(evaluate, tries=tries, seed=bench.task.seed)
    except MissingDependency as error:
        bench.note(f"learning rate, temperature and alpha are the usual ones: {error}")
        return Settled()
    for reason in found.fallen:
        bench.note(f"fell out of the choice of knobs: {reason}")
    bench.note(f"trainings go on with {found.knobs}: after {each:.2g} epochs the drop was {found.loss:.2%}")
    before = max(loss(bench.trials[plan.key]), 1e-6)
    share = found.loss / before if math.isfinite(found.loss) else RECOVERY
    return Settled(found.knobs, each * tries, min(max(share, 0.0), RECOVERY))


def _knob_tries(bench: Bench, each: float) -> int:
    """Give how many short trainings of so many epochs the knobs get: a share of those that there is time for.

    It is kept, so that a search that is resumed goes on alike.
    """
    budget = bench.task.effort.budget_s
    name = f"knobs: tries within {budget or 0:g} s"
    kept = bench.journal.recall(name, int)
    if kept is None:
        allowed = _affordable(bench, bench.task.effort.epochs)
        kept = max(1, min(KNOB_TRIES, int(allowed * KNOB_SHARE / each + 1e-6)))
        bench.journal.record(name, kept)
    return kept


def _cuts(plan: Plan) -> bool:
    return any(part.name == "prune-channels" for part in plan.passes)


def _tuned(bench: Bench, plan: Plan, epochs: Sequence[float], knobs: Knobs) -> Plan:
    """Put trainings behind what cuts; where nothing is cut, there is only what int8 lost to win back: behind it."""
    cuts = [part for part in plan.passes if part.name == "prune-channels"]
    if not cuts:
        return plan.with_passes(*plan.passes, *(_finetune(bench, each, _slower(knobs)) for each in epochs))
    rest = [part for part in plan.passes if part.name != "prune-channels"]
    return plan.with_passes(*cuts, *(_finetune(bench, each, knobs) for each in epochs), *rest)


def _climb(bench: Bench, plan: Plan, wanted: Sequence[float], knobs: Knobs) -> tuple[Trial, bool]:
    """Train a candidate on these rungs, the last one now; gives what to judge it by, and whether it gained by that.

    Raises:
        Unsupported: no training gained anything, or it could not be measured.
    """
    if len(wanted) == 1:
        bench.run(_tuned(bench, plan, wanted, knobs))
    own = _bearable(bench, plan, wanted[0], knobs)
    reached = _reached(bench, plan, wanted[:-1], own)
    if len(reached) == len(wanted) - 1:
        trial = bench.run(_tuned(bench, plan, wanted, own))
        if trial.outcome == "measured":
            return trial, True
        if not reached:
            raise Unsupported("training", trial.reason or "it was not measured")
        bench.note(f"stays as it was after {len(reached)} trainings: {plan}: {trial.reason}")
    return bench.trials[_tuned(bench, plan, reached, own).key], False


def _bearable(bench: Bench, plan: Plan, first: float, knobs: Knobs) -> Knobs:
    """Give the knobs that a candidate is trained with: at a lower rate, where the first training gained nothing.

    What was hardly hurt is near its best: a rate that wins back much elsewhere only throws it off.
    """
    trial = bench.trials.get(_tuned(bench, plan, [first], knobs).key)
    return knobs if trial is None or trial.outcome == "measured" else _slower(knobs)


def _reached(bench: Bench, plan: Plan, ladder: Sequence[float], knobs: Knobs) -> list[float]:
    """Give the rungs that a candidate was trained up to: one that gained nothing ends them, and leaves it as it was."""
    done: list[float] = []
    for each in ladder:
        trial = bench.trials.get(_tuned(bench, plan, [*done, each], knobs).key)
        if trial is None or trial.outcome != "measured":
            break
        done.append(each)
    return done


def _slower(knobs: Knobs) -> Knobs:
    """Give the knobs of a quantization-aware training: its weights are trained already, and must not wander off."""
    return replace(knobs, lr=float(f"{knobs.lr * QAT_LR:.2g}"))


def _finetune(bench: Bench, epochs: float, knobs: Knobs) -> Part:
    image = {"augment": "mirror-shift"} if _may_move(bench) else {}
    changed = {name: value for name, value in asdict(knobs).items() if value != getattr(Knobs(), name)}
    metric, device = bench.task.metric, bench.task.effort.device
    of_values = {"loss": "mse"} if metric.name in METRICS and not metric.classes else {}
    there = {} if device in (AUTO, Recipe.device) else {"device": device}
    return Part("finetune", {"epochs": round(epochs, 3), **image, **of_values, **changed, **there})


def training_device(asked: str) -> str:
    """Give the device to train on; of "auto" that of the first GPU, where PyTorch is here and finds one, else "cpu".

    Raises:
        InvalidSetting: PyTorch does not know the device, or does not find it here.
        MissingDependency: a device is asked for by name, and torch is not installed.
    """
    if asked == Recipe.device:
        return asked
    try:
        from hasten.torchview.machine import check_device, found_device
    except ModuleNotFoundError as error:
        if asked == AUTO:
            return Recipe.device
        raise MissingDependency(f"what training on {asked} needs (torch)", "pip install 'hasten[train]'") from error
    if asked == AUTO:
        return found_device()
    check_device(asked)
    return asked


def _may_move(bench: Bench) -> bool:
    """Say whether samples may be moved and mirrored: they are pictures, and stay what they are, as classes do."""
    return bench.task.source.preprocess is not None and bench.task.metric.classes


def _speed(bench: Bench, key: str) -> float:
    """Give a candidate's speed, 0 where it could not be measured: its training is left for last."""
    trial = bench.trials[key]
    return 1.0 / cost(trial, bench.task.goal) if trial.outcome == "measured" else 0.0


def _score(bench: Bench, trial: Trial, speed: float, *, left: float) -> float:
    """Give the logarithm of the speed, less what a drop of which a share is ``left`` at the end is over the limit."""
    goal = bench.task.goal
    limit = max(goal.max_drop if goal.max_drop is not None else TOLERABLE_DROP, 1e-4)
    expected = provable_drop(bench, trial) * left
    return math.log(max(speed, 1e-12)) - PENALTY * max(0.0, expected - limit) / limit


def is_hopeless(bench: Bench, plan: Plan | None) -> bool:
    """Say whether a plan was measured and lost more than training is expected to win back."""
    trial = bench.trials.get(plan.key) if plan else None
    return trial is not None and (trial.outcome != "measured" or loss(trial) > HOPELESS)
