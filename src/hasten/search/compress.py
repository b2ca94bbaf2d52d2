"""The stage that trains: widths from a knapsack over measured milliseconds, then training for those that last longest.

1. Sensitivity tables: what each width of each channel group loses alone (``table``).
2. A cost model: every block of the graph that the fastest recipe runs, timed in its engine (``timing``, ``costmodel``).
3. The predicted front (``knapsack``), the best of it built and measured, the cost model refitted, and once more.
4. Successive halving over the candidates with fine-tuning, and behind it quantization-aware training of the winner,
   where its recipe quantizes (``train``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from hasten import registry
from hasten.artifact import Artifact
from hasten.errors import BuildFailed, HastenError, MissingDependency, StoreError
from hasten.graph.groups import Group, channel_groups, refusals
from hasten.graph.model import read_model
from hasten.plan import Part, Plan
from hasten.search import space
from hasten.search.bench import TRAINED, Bench
from hasten.search.compression import Cell, Prediction
from hasten.search.costmodel import CostModel, cost_model, mean_error, parts_of, refit, wanted_blocks
from hasten.search.frontier import best_of, loss
from hasten.search.knapsack import Choice, Problem, Solution, front
from hasten.search.result import Trial
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
from hasten.search.train import CANDIDATES, is_hopeless, train

TABLE = "sensitivities"
"""What the journal calls what each width loses, as far as it was measured."""

CELLS, PREDICTIONS = "compression: cells", "compression: predictions"
"""What the journal calls what the report shows of this stage."""

BUILT = 10
"""Plans of the predicted front that are built and measured."""

LEAST_SHARE = 0.35
"""Of the recipe's time: a plan predicted to be faster than this has lost too much to be trained back."""

WORTH = 1.05
"""Predicted speed-up over the recipe from which cutting is worth a training."""

RUINED = 0.2
"""Drop of an int8 recipe that no training is expected to win back."""


@dataclass(frozen=True)
class Ground:
    """What there is to choose, and what each choice loses and takes."""

    sites: tuple[Site, ...]
    """By the names of the source's channel groups."""
    table: Sensitivities
    costs: CostModel
    """Over the same sites in the same order, by the names in the graph that the engine runs."""
    classes: bool
    """What is judged are classes: what a cut loses is the divergence of their probabilities, else the error."""

    def problem(self) -> Problem:
        """Give the knapsack."""
        by: Loss = "kl" if self.classes and all(row.kl is not None for row in self.table.rows) else "error"
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
        train(bench, found, candidates)


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
    ground = replace(ground, costs=refitted)
    _record(bench, ground, first, scale, plans, measured)
    again = _worth(ground, front(ground.problem()))
    kept = [item for item in again if not is_hopeless(bench, plans.get(item.choice))]
    others = [plans.get(item.choice) or _cut(found.plan, ground, item.choice) for item in _spread(kept, CANDIDATES)]
    built = [plan for plan in plans.values() if not is_hopeless(bench, plan)]
    return list({plan.key: plan for plan in (*built, *others)}.values())


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
    return Ground(sites, table, cost_model(parts, alias, times), bench.task.metric.classes)


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
