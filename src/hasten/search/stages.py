"""The stages of a search: the untouched model everywhere, lossless passes, int8, int8 with nodes left in float."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import onnx

from hasten.errors import HastenError, StoreError
from hasten.graph.costs import operators_of
from hasten.graph.model import read_model
from hasten.measure.peaks import measure_peaks
from hasten.measure.roofline import floor_ns
from hasten.measurement import Measurement, Operator, Peaks
from hasten.plan import Part, Plan
from hasten.search import space
from hasten.search.bench import TRAINED, Bench
from hasten.search.exclusions import find_exclusions
from hasten.search.frontier import best_of, cost, levels, loss, simplicity
from hasten.search.result import Trial
from hasten.search.space import REFERENCE_ENGINE

TOLERABLE_DROP = 0.01
"""Loss of quality from which int8 is worth repairing, where the goal sets no limit."""


@dataclass(frozen=True)
class Limits:
    """What the machine allows any plan: for skipping those that cannot win."""

    operators: tuple[Operator, ...]
    peaks: dict[int, Peaks]

    def floor_ns(self, plan: Plan) -> float:
        """Give a time that no run of this plan can be under, by its lowest precision and its threads."""
        precisions = {str(plan.load_engine().precision)}
        if any(part.name.startswith("quantize") for part in plan.passes):
            precisions.add("int8")  # where int8 is slow, what was left in float may be the faster part
        return min(floor_ns(self.operators, self.peaks[plan.threads], precision=name) for name in precisions)


def machine_limits(bench: Bench) -> Limits:
    """Measure this machine's peaks for every thread count, or recall them, and price the model."""
    task = bench.task
    bench.tell("progress", "measuring what this machine can do at most")
    model: onnx.ModelProto = read_model(task.source)
    dims = {str(s.shape[0]): task.goal.batch for s in task.source.signature.inputs if s.shape}
    counts = sorted({*task.threads, task.original.threads})
    return Limits(
        operators_of(model, dims),
        {threads: measure_peaks(threads, home=task.store.root) for threads in counts},
    )


def sweep(bench: Bench) -> None:
    """Run the untouched model in every engine, precision and thread count that is here. Nothing is skipped.

    A fixed batch helps one runtime and hinders another: both forms run at the most threads, the better at the others.
    """
    task = bench.task
    bench.run(task.original)
    for engine in task.engines:
        batch = _better_batch(bench, engine)
        for precision in space.precisions(engine):
            for threads in reversed(task.threads):
                trial = bench.run(Plan(space.engine_part(engine, threads=threads, precision=precision, batch=batch)))
                if trial.outcome == "unsupported":
                    break  # a precision that a runtime lacks, it lacks at every thread count


def _better_batch(bench: Bench, engine: str) -> int | None:
    """Give the batch to fix for an engine, or None where an open one is as fast: it serves any number of rows."""
    task = bench.task
    fixed = space.fixed_batch(task.source, task.goal.batch)
    if fixed is None:
        return None
    threads = task.threads[-1]
    open_, closed = (
        bench.run(Plan(space.engine_part(engine, threads=threads, batch=batch))) for batch in (None, fixed)
    )
    if open_.outcome != "measured" or closed.outcome != "measured":
        return fixed if closed.outcome == "measured" else None
    level = levels((open_, closed), task.goal)
    return fixed if level[closed.key] < level[open_.key] else None


def lossless(bench: Bench, limits: Limits) -> None:
    """Apply the passes that change no result, for each engine at its best thread count."""
    for engine in bench.task.engines:
        best = leader_of(bench, engine=engine, lossy=False)
        if best is not None:
            for plan in space.lossless_plans(best.plan.engine):
                attempt(bench, limits, plan)


def int8(bench: Bench, limits: Limits) -> None:
    """Quantize: observers on the engine that leads, the best of them elsewhere, then nodes back to float."""
    leaders = [t for engine in bench.task.engines if (t := leader_of(bench, engine=engine, lossy=False)) is not None]
    leaders.sort(key=lambda trial: cost(trial, bench.task.goal))
    if not leaders:
        return
    lead, *others = leaders
    tried = [attempt(bench, limits, _static(lead, {"observer": name})) for name in space.observers()]
    measured = [trial for trial in tried if trial.outcome == "measured"]
    best = _least_loss(bench, measured)
    settings = _settings(best) if best else {}
    chosen = {lead.key: best}
    for other in others:
        chosen[other.key] = attempt(bench, limits, _static(other, settings))
    for leader in leaders:
        if leader.plan.engine.name != REFERENCE_ENGINE:  # it fuses pairs around single nodes only
            flowing = attempt(bench, limits, _static(leader, {**settings, "through": True}))
            chosen[leader.key] = _fastest(bench, (chosen[leader.key], flowing))
        if (quantized := chosen[leader.key]) is not None:
            attempt(bench, limits, _other_batch(bench, quantized.plan))
        for plan in _lower_precisions(bench, _static(leader, settings)):
            attempt(bench, limits, plan)
    for leader in leaders:
        attempt(bench, limits, leader.plan.with_passes(*_prefix(leader), Part("quantize-dynamic")))
        if _wants_small(bench):
            attempt(bench, limits, leader.plan.with_passes(*_prefix(leader), Part("cast", {"to": "float16"})))
    if best is not None and provable_drop(bench, best) > _allowed_drop(bench):
        for leader in leaders:
            if (quantized := chosen[leader.key]) is not None and quantized.outcome == "measured":
                _repair(bench, limits, leader, _settings(quantized))
    _other_threads(bench, limits)


def _other_batch(bench: Bench, plan: Plan) -> Plan:
    """Give a plan with the batch fixed where it is open, and the reverse: what was a hair in float may be more now."""
    fixed = space.fixed_batch(bench.task.source, bench.task.goal.batch)
    settings = dict(plan.engine.settings)
    if settings.pop("batch", None) is not None or fixed is None:
        return replace(plan, engine=replace(plan.engine, settings=settings))
    threads, precision = int(settings["threads"]), str(settings.get("precision", "float32"))
    return replace(plan, engine=space.engine_part(plan.engine.name, threads=threads, precision=precision, batch=fixed))


def _fastest(bench: Bench, trials: Sequence[Trial | None]) -> Trial | None:
    """Give the first of the trials on the best level that was measured."""
    measured = [trial for trial in trials if trial is not None and trial.outcome == "measured"]
    level = levels(measured, bench.task.goal)
    return min(measured, key=lambda trial: level[trial.key], default=None)


def _lower_precisions(bench: Bench, plan: Plan) -> Iterator[Plan]:
    """Give a quantized plan with what stays in float computed in each lower precision that its engine really has."""
    engine = plan.engine
    for precision in space.precisions(engine.name)[1:]:
        lower = {**engine.settings, "precision": precision}
        works = any(
            trial.outcome == "measured" and trial.plan.engine == replace(engine, settings=lower)
            for trial in bench.trials.values()
        )
        if works:
            yield replace(plan, engine=replace(engine, settings=lower))


def _repair(bench: Bench, limits: Limits, leader: Trial, settings: dict[str, object]) -> None:
    """Leave nodes in float, in the order of accuracy gained per millisecond lost, until the drop can be proven."""
    plan = _static(leader, settings)
    if bench.trials.get(plan.key) is None or bench.trials[plan.key].outcome != "measured":
        return
    try:
        sets = _exclusions(bench, leader.plan, plan)
    except StoreError:
        raise
    except HastenError as error:
        bench.note(f"{leader.plan.engine.name}: its nodes cannot be ranked, so none is left in float: {error}")
        return
    enough: int | None = None
    for index, excluded in enumerate(sets):
        trial = attempt(bench, limits, _static(leader, {**settings, "exclude": list(excluded)}))
        if trial.outcome == "measured" and provable_drop(bench, trial) <= _allowed_drop(bench):
            enough = index
            break
    if enough is None:
        bench.note(f"{leader.plan.engine.name}: no set of nodes left in float keeps the allowed drop")
        return
    low, high = (len(sets[enough - 1]) if enough else 0), len(sets[enough])
    while high - low > 1:  # fewer nodes may do: halve the gap between the last that failed and the first that held
        middle = (low + high) // 2
        trial = attempt(bench, limits, _static(leader, {**settings, "exclude": list(sets[-1][:middle])}))
        held = trial.outcome == "measured" and provable_drop(bench, trial) <= _allowed_drop(bench)
        low, high = (low, middle) if held else (middle, high)


def _exclusions(bench: Bench, floating: Plan, quantized: Plan) -> tuple[tuple[str, ...], ...]:
    """Rank the nodes, or recall the ranking from the journal."""
    name = f"exclusions of {quantized.key}"
    found = bench.journal.recall(name, tuple[tuple[str, ...], ...])
    if found is None:
        bench.check_budget()
        found = find_exclusions(bench, floating, quantized)
        bench.journal.record(name, found)
    return found


def _other_threads(bench: Bench, limits: Limits) -> None:
    """Try the best plan of each engine at the other thread counts."""
    for engine in bench.task.engines:
        best = leader_of(bench, engine=engine, lossy=None, trained=False)
        if best is None or not best.plan.passes:
            continue
        for threads in bench.task.threads:
            part = replace(best.plan.engine, settings={**best.plan.engine.settings, "threads": threads})
            attempt(bench, limits, replace(best.plan, engine=part))


def attempt(bench: Bench, limits: Limits, plan: Plan) -> Trial:
    """Run a plan unless the machine's own limit says that it cannot win; then record that."""
    if (found := bench.trials.get(plan.key)) is not None:
        return found
    best, original = bench.best(), bench.original().measurement
    if (
        best is not None
        and original is not None
        and _may_end_it(bench, best)
        and bench.task.goal.objective == "latency"
    ):
        incumbent_ns = _cautious_ns(best, original)
        floor = limits.floor_ns(plan)
        if floor > incumbent_ns:
            return bench.skip(
                plan,
                f"this machine cannot run it in under {floor / 1e6:.3f} ms on {plan.threads} threads, "
                f"and {best.plan} takes {incumbent_ns / 1e6:.3f} ms",
            )
    return bench.run(plan)


def _cautious_ns(best: Trial, original: Measurement) -> float:
    """Give the longer of the incumbent's own time and its ratio's: nobody is skipped because a core was busy."""
    own = best.measurement.latency.median_ns if best.measurement else math.inf
    speed = best.measurement.speedup.low if best.measurement else 1.0
    return max(own, original.latency.median_ns / speed)


def _may_end_it(bench: Bench, best: Trial) -> bool:
    """A lossy incumbent ends other plans only where the goal says how much may be lost."""
    return bench.task.goal.max_drop is not None or loss(best) == 0.0


def leader_of(bench: Bench, *, engine: str, lossy: bool | None, trained: bool | None = None) -> Trial | None:
    """Give the engine's best measured trial that meets the drop; not ``trained``: nothing of it was cut or trained."""
    task = bench.task
    fitting = [
        trial
        for trial in bench.trials.values()
        if trial.plan.engine.name == engine
        and bench.meets(trial)
        and (lossy is None or bool(trial.traits) == lossy)
        and (trained is None or bool(TRAINED & set(trial.traits)) == trained)
    ]
    return best_of(fitting, task.goal, original=task.original.key)


def provable_drop(bench: Bench, trial: Trial) -> float:
    """Give the drop that certification can be expected to prove: the estimate, plus what the sample size costs.

    The half-width of a paired difference is about 1.96 sqrt(d / n), d the share of samples that disagree; with none
    that disagree, n samples leave about 3.84 / n open, which no plan can better.
    """
    judged = trial.measurement.quality if trial.measurement else None
    if judged is None:
        return 0.0
    n = max(bench.task.splits["certify"], 1)
    return loss(trial) + max(1.96 * math.sqrt(judged.disagreement / n), 3.84 / (n + 3.84))


def in_order(bench: Bench, stages: Iterable[tuple[str, Callable[[], None]]]) -> None:
    """Run stages one after another, telling each."""
    for name, stage in stages:
        bench.stage = name
        bench.tell("stage", name)
        stage()


def _allowed_drop(bench: Bench) -> float:
    """Give the drop to repair down to: the goal's, unless the certify split is too small to prove even none."""
    limit = bench.task.goal.max_drop
    n = max(bench.task.splits["certify"], 1)
    return max(TOLERABLE_DROP if limit is None else limit, 3.84 / (n + 3.84))


def _wants_small(bench: Bench) -> bool:
    """Half-precision weights halve the files also where the processor computes in float32 all the same."""
    goal = bench.task.goal
    return goal.objective != "latency" or goal.max_file_bytes is not None or goal.max_memory_bytes is not None


def _static(leader: Trial, settings: dict[str, object]) -> Plan:
    return leader.plan.with_passes(*_prefix(leader), Part("quantize-static", dict(settings)))


def _prefix(leader: Trial) -> tuple[Part, ...]:
    return leader.plan.passes or (space.FOLD,)


def _settings(trial: Trial) -> dict[str, object]:
    return dict(trial.plan.passes[-1].settings)


def _least_loss(bench: Bench, trials: Sequence[Trial]) -> Trial | None:
    """Give the trial that loses least; of those that lose the same the fastest, of those on one level the simplest."""
    level, original = levels(trials, bench.task.goal), bench.task.original.key
    return min(
        trials,
        key=lambda t: (provable_drop(bench, t), level[t.key], simplicity(t, original=original)),
        default=None,
    )
