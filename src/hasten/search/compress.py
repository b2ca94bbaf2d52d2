"""The stage that trains: widths from a knapsack over measured milliseconds, then training for those that last longest.

1. Sensitivity tables: what each width of each channel group loses alone (``table``).
2. A cost model: every block of the graph that the fastest recipe runs, timed in its engine (``timing``, ``costmodel``).
3. The predicted front (``knapsack``), the best of it built and measured, the cost model refitted, and once more.
4. Successive halving over the candidates with fine-tuning; each rung goes on from the parameters of the one before, at
   a new cycle of the learning rate (I. Loshchilov, F. Hutter, "SGDR", arXiv:1608.03983), so no epoch is spent twice.
5. Behind it, quantization-aware training of the winner, where its recipe quantizes.

Before the halving, where the epochs allow it, short trainings of one candidate settle learning rate, temperature and
the teacher's share (``knobs``).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np

from hasten import registry
from hasten.artifact import Artifact
from hasten.errors import BuildFailed, HastenError, MissingDependency, StoreError, Unsupported
from hasten.graph.groups import Group, channel_groups, refusals
from hasten.graph.model import read_model
from hasten.plan import Part, Plan
from hasten.search import space
from hasten.search.bench import Bench
from hasten.search.compression import Cell, Prediction
from hasten.search.costmodel import CostModel, cost_model, mean_error, parts_of, refit, wanted_blocks
from hasten.search.frontier import best_of, cost, loss
from hasten.search.halving import rungs, successive_halving
from hasten.search.knapsack import Choice, Problem, Solution, front
from hasten.search.knobs import Knobs, tune
from hasten.search.result import Trial
from hasten.search.stages import TOLERABLE_DROP, TRAINED, provable_drop
from hasten.search.table import (
    Loss,
    Sensitivities,
    Site,
    change_of,
    losses,
    measured_sites,
    sensitivities,
    width_sites,
)
from hasten.search.task import TRAIN
from hasten.search.timing import time_blocks
from hasten.torchview.recipe import Recipe

TABLE = "sensitivities"
"""What the journal calls what each width loses, as far as it was measured."""

CELLS, PREDICTIONS = "compression: cells", "compression: predictions"
"""What the journal calls what the report shows of this stage."""

BUILT = 10
"""Plans of the predicted front that are built and measured."""

CANDIDATES = 4
"""Plans with cut channels that are trained: those that promise most."""

LEAST_SHARE = 0.35
"""Of the recipe's time: a plan predicted to be faster than this has lost too much to be trained back."""

WORTH = 1.05
"""Predicted speed-up over the recipe from which cutting is worth a training."""

RUINED = 0.2
"""Drop of an int8 recipe that no training is expected to win back."""

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


@dataclass(frozen=True)
class Ground:
    """What there is to choose, and what each choice loses and takes."""

    sites: tuple[Site, ...]
    """By the names of the source's channel groups."""
    table: Sensitivities
    costs: CostModel
    """Over the same sites in the same order, by the names in the graph that the engine runs."""

    def problem(self) -> Problem:
        """Give the knapsack."""
        by: Loss = "kl" if all(row.kl is not None for row in self.table.rows) else "error"
        return Problem(losses(self.sites, self.table, by=by), self.costs.terms(), self.costs.fixed_ns)


def compress(bench: Bench) -> None:
    """Prune, fine-tune and train quantized what the stages before found fastest; nothing without a train split."""
    if TRAIN not in bench.task.splits or not _can_train(bench):
        return
    found = recipe(bench)
    if found is None:
        return
    bench.note(f"training for the recipe {found.plan}")
    candidates = [found.plan] if found.traits else []  # an untouched model has nothing to win back
    try:
        candidates += _pruned(bench, found)
    except StoreError:
        raise
    except HastenError as error:
        bench.note(f"nothing is pruned: {error}")
    if candidates:
        _train(bench, found, candidates)


def recipe(bench: Bench) -> Trial | None:
    """Give the fastest trial whose loss training may win back: its engine and passes are what is trained for."""
    fitting = [
        trial
        for trial in bench.trials.values()
        if trial.outcome == "measured"
        and not {*TRAINED, "dynamic"} & set(trial.traits)
        and loss(trial) <= RUINED
        and not any(part.settings.get("exclude") for part in trial.plan.passes)
    ]
    return best_of(fitting, bench.task.goal, original=bench.task.original.key)


def _can_train(bench: Bench) -> bool:
    for name in ("finetune", "prune-channels"):
        try:
            registry.load("pass", name)
        except MissingDependency as error:
            bench.note(f"nothing is trained: {error}")
            return False
    return True


def _tail(plan: Plan) -> tuple[Part, ...]:
    return plan.passes or (space.FOLD,)


# Widths


def _pruned(bench: Bench, found: Trial) -> list[Plan]:
    """Give the plans with cut channels that may be worth training: those that were built, and the refitted front's."""
    ground = survey(bench, found)
    if ground is None:
        return []
    first = ground.costs
    base = _measured_ns(found)
    scale = base / first.time_ns(_untouched(ground))
    chosen = _spread(_worth(ground, front(ground.problem())), BUILT)
    measured: dict[Choice, float] = {_untouched(ground): base}
    plans: dict[Choice, Plan] = {}
    for item in chosen:
        plans[item.choice] = _cut(found.plan, ground, item.choice)
        trial = bench.run(plans[item.choice])
        if trial.outcome == "measured":
            measured[item.choice] = _measured_ns(trial)
    refitted = refit(first, measured)
    before = float(np.mean([abs(first.time_ns(c) * scale - ns) / ns for c, ns in measured.items()]))
    bench.note(
        f"predicted against measured: off by {before:.1%} before the refit, {mean_error(refitted, measured):.1%} after"
    )
    ground = Ground(ground.sites, ground.table, refitted)
    _record(bench, ground, first, scale, plans, measured)
    again = _worth(ground, front(ground.problem()))
    kept = [item for item in again if not _is_hopeless(bench, plans.get(item.choice))]
    others = [plans.get(item.choice) or _cut(found.plan, ground, item.choice) for item in _spread(kept, CANDIDATES)]
    built = [plan for plan in plans.values() if not _is_hopeless(bench, plan)]
    return list({plan.key: plan for plan in (*built, *others)}.values())


def _is_hopeless(bench: Bench, plan: Plan | None) -> bool:
    """Say whether a plan was measured and lost more than training is expected to win back."""
    trial = bench.trials.get(plan.key) if plan else None
    return trial is not None and (trial.outcome != "measured" or loss(trial) > HOPELESS)


def survey(bench: Bench, found: Trial) -> Ground | None:
    """Measure what each width loses and takes; None where nothing can be cut.

    Raises:
        BudgetSpent: there is no time for it. HastenError: the graph cannot be priced.
    """
    task = bench.task
    source = read_model(task.source)
    runs = read_model(bench.before_engine(bench.built(found)))
    groups = channel_groups(source)
    names = _aliases(groups, channel_groups(runs))
    sites = tuple(site for site in width_sites(groups) if site.name in names)
    if not sites:
        reasons = refusals(source)
        bench.note(f"nothing can be cut: {next(iter(reasons.values()), 'no layer is read by other layers alone')}")
        return None
    is_late = _lateness(bench)
    table = _losses(bench, sites, is_late)
    sites = measured_sites(sites, table)
    if not sites:
        why = next(iter(table.failures.values()), "there was no time to measure what a width loses")
        bench.note(f"nothing can be cut: {why}")
        return None
    dims = _dims(task.source, task.goal.batch)
    alias = tuple(Site(names[site.name], site.kind, site.options) for site in sites)
    parts = parts_of(runs, alias, dims)
    times = time_blocks(
        wanted_blocks(parts, alias),
        found.plan.engine,
        task.store,
        limits=task.limits(found.plan.threads),
        deadline=is_late,
        progress=bench.progress,
    )
    return Ground(sites, table, cost_model(parts, alias, times))


def _losses(bench: Bench, sites: Sequence[Site], is_late: Callable[[], bool]) -> Sensitivities:
    """Measure what each width loses, or recall it; a search that is resumed with a larger budget measures the rest.

    Raises:
        BudgetSpent: there is no time for it. HastenError: the untouched model does not run.
    """
    task, done = bench.task, f"{TABLE}: measured within {bench.task.effort.budget_s} s"
    known = bench.journal.recall(TABLE, Sensitivities)
    if known is not None and bench.journal.recall(done, bool):
        return known
    if known is None:
        bench.check_budget()
    table = sensitivities(
        task.source,
        sites,
        task.store,
        task.samples("search"),
        limits=task.build_limits,
        calibrate=task.samples("calibrate"),
        metric=task.metric.name,
        deadline=is_late,
        progress=bench.progress,
        known=known,
        keep=lambda table: bench.journal.record(TABLE, table),
    )
    bench.journal.record(TABLE, table)
    bench.journal.record(done, True)  # resumed, it goes on by the same table, though there may be time for more
    return table


def _lateness(bench: Bench) -> Callable[[], bool]:
    """Give what tells that tables have had their time: a third of the budget, or half of what is left for the stage."""
    budget, left = bench.task.effort.budget_s, bench.budget_left_s()
    if budget is None or left is None:
        return lambda: False
    until = max(budget / 3, bench.elapsed() + (left - bench.reserve_s()) / 2)
    return lambda: bench.elapsed() > until


def _aliases(groups: Sequence[Group], others: Sequence[Group]) -> dict[str, str]:
    """Give the name in another form of the graph of each group: the one with the same makers, as large, and its own."""
    by_maker = {maker: group for group in others for maker in group.makers}
    found = {}
    for group in groups:
        twins = {by_maker[maker].name for maker in group.makers if maker in by_maker}
        sizes = {by_maker[maker].size for maker in group.makers if maker in by_maker}
        if len(twins) == 1 and sizes == {group.size}:
            found[group.name] = twins.pop()
    shared = {name for name, count in Counter(found.values()).items() if count > 1}
    return {group: name for group, name in found.items() if name not in shared}


def _dims(source: Artifact, batch: int) -> dict[str, int]:
    return {str(s.shape[0]): batch for s in source.signature.inputs if s.shape and isinstance(s.shape[0], str)}


def _untouched(ground: Ground) -> Choice:
    return tuple(0 for _ in ground.sites)


def _worth(ground: Ground, solutions: Sequence[Solution]) -> list[Solution]:
    """Leave out what cuts nothing, what hardly gains, and what is cut to the bone."""
    whole = ground.problem().time_ns(_untouched(ground))
    return [s for s in solutions if any(s.choice) and whole * LEAST_SHARE <= s.time_ns <= whole / WORTH]


def _spread(solutions: Sequence[Solution], count: int) -> list[Solution]:
    """Give so many of a front, evenly over its times."""
    if len(solutions) <= count:
        return list(solutions)
    times = np.log([s.time_ns for s in solutions])
    wanted = np.linspace(times[0], times[-1], count)
    chosen = {int(np.abs(times - value).argmin()) for value in wanted}
    return [solutions[at] for at in sorted(chosen)]


def _cut(plan: Plan, ground: Ground, choice: Choice, **settings: object) -> Plan:
    widths = dict(change_of(ground.sites, choice).widths)
    return plan.with_passes(Part("prune-channels", {"widths": widths, **settings}), *_tail(plan))


def _measured_ns(trial: Trial) -> float:
    if trial.measurement is None:
        raise BuildFailed("search", f"{trial.plan} has no measured time")
    return trial.measurement.latency.median_ns


def _record(
    bench: Bench,
    ground: Ground,
    first: CostModel,
    scale: float,
    plans: Mapping[Choice, Plan],
    measured: Mapping[Choice, float],
) -> None:
    """Keep what the report shows."""
    problem = ground.problem()
    whole = _untouched(ground)
    cells = []
    for at, site in enumerate(ground.sites):
        for index, option in enumerate(site.options[1:], start=1):
            row = ground.table.row(site, option)
            if row is not None:
                choice = (*whole[:at], index, *whole[at + 1 :])
                cells.append(
                    Cell(
                        group=site.name,
                        units=option,
                        size=site.options[0],
                        kl=row.error if row.kl is None else row.kl,
                        metric=row.drop,
                        ns=ground.costs.time_ns(choice),
                    )
                )
    predictions = [
        Prediction(
            plan=plan.key,
            first_ns=first.time_ns(choice) * scale,
            refitted_ns=ground.costs.time_ns(choice),
            measured_ns=measured.get(choice),
            sensitivity=problem.loss(choice),
        )
        for choice, plan in plans.items()
    ]
    bench.journal.record(CELLS, tuple(cells))
    bench.journal.record(PREDICTIONS, tuple(predictions))


# Training


def _train(bench: Bench, found: Trial, candidates: Sequence[Plan]) -> None:
    """Settle the knobs, halve the candidates, then train the winner's quantized form."""
    by_key = {plan.key: plan for plan in candidates}
    for plan in candidates:
        bench.run(plan)
    speeds = {key: _speed(bench, key) for key in by_key}
    cut_plans = sorted((p for p in candidates if _cuts(p) and speeds[p.key]), key=lambda p: -speeds[p.key])
    settled = _settled(bench, [plan for plan in cut_plans if not _is_hopeless(bench, plan)])
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
        done = [each for each in ladder if each <= effort * 1.001]
        trial = bench.run(_tuned(bench, by_key[key], done, knobs))
        if trial.outcome != "measured":
            raise Unsupported("training", trial.reason or "it was not measured")
        return _score(bench, trial, speeds[key], left=RECOVERY ** (len(ladder) - len(done)))

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
            done = [each for each in ladder if any(t.candidate == key and t.epochs >= each * 0.999 for t in made.tries)]
            plan = _tuned(bench, by_key[key], done, knobs)
            bench.run(plan.with_passes(*plan.passes, _finetune(bench, ladder[-1] * QAT_SHARE, _slower(knobs))))


def _within_budget(bench: Bench, epochs: float) -> float:
    """Give so many of the epochs as there is time for, by what those before have taken.

    It is kept, so that a search that is resumed goes on alike.
    """
    budget, left = bench.task.effort.budget_s, bench.budget_left_s()
    if budget is None or left is None:
        return epochs
    name = f"compression: epochs within {budget:g} s"
    kept = bench.journal.recall(name, float)
    if kept is None:
        each_s = epoch_seconds(list(bench.trials.values()))
        kept = epochs if each_s is None else min(epochs, max(left - bench.reserve_s(), 0.0) / each_s)
        bench.journal.record(name, kept)
    return kept


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

    try:
        found = tune(evaluate, tries=KNOB_TRIES, seed=bench.task.seed)
    except MissingDependency as error:
        bench.note(f"learning rate, temperature and alpha are the usual ones: {error}")
        return Settled()
    for reason in found.fallen:
        bench.note(f"fell out of the choice of knobs: {reason}")
    bench.note(f"trainings go on with {found.knobs}: after {each:.2g} epochs the drop was {found.loss:.2%}")
    before = max(loss(bench.trials[plan.key]), 1e-6)
    share = found.loss / before if math.isfinite(found.loss) else RECOVERY
    return Settled(found.knobs, each * KNOB_TRIES, min(max(share, 0.0), RECOVERY))


def _cuts(plan: Plan) -> bool:
    return any(part.name == "prune-channels" for part in plan.passes)


def _tuned(bench: Bench, plan: Plan, epochs: Sequence[float], knobs: Knobs) -> Plan:
    """Put trainings behind what cuts; where nothing is cut, there is only what int8 lost to win back: behind it."""
    cuts = [part for part in plan.passes if part.name == "prune-channels"]
    if not cuts:
        return plan.with_passes(*plan.passes, *(_finetune(bench, each, _slower(knobs)) for each in epochs))
    rest = [part for part in plan.passes if part.name != "prune-channels"]
    return plan.with_passes(*cuts, *(_finetune(bench, each, knobs) for each in epochs), *rest)


def _slower(knobs: Knobs) -> Knobs:
    """Give the knobs of a quantization-aware training: its weights are trained already, and must not wander off."""
    return replace(knobs, lr=float(f"{knobs.lr * QAT_LR:.2g}"))


def _finetune(bench: Bench, epochs: float, knobs: Knobs) -> Part:
    image = {"augment": "mirror-shift"} if _may_move(bench) else {}
    changed = {name: value for name, value in asdict(knobs).items() if value != getattr(Knobs(), name)}
    return Part("finetune", {"epochs": round(epochs, 3), **image, **changed})


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
