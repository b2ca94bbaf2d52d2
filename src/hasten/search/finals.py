"""The finals: all finalists in one comparison, block by block, and their outputs on data that the search never saw."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from hasten.errors import HastenError, StoreError
from hasten.host import Ticks, ticks
from hasten.measure.compare import Comparison, compare
from hasten.measure.latency import WarmUp, latency_of
from hasten.measure.roofline import bound
from hasten.measure.statistics import LOOKS, P99_CONFIDENCE, percentile_holds, runs_needed
from hasten.measure.worker import IsolatedSession
from hasten.measurement import WIN, Bound, Latency, Measurement, Ratio
from hasten.search.bench import FINALISTS, Bench
from hasten.search.frontier import best_of, cost, frontier, levels, loss, simplicity
from hasten.search.result import Certificate, Goal, Trial
from hasten.search.stages import Limits, provable_drop

FINALS = "finals"
"""What the journal calls the record of the finals."""

COMPARED, WARMED = 0.55, 0.2
"""Shares of the finals' time for the comparison and for warming up; loading, profiling and judging take the rest."""

PROFILED_RUNS = 20
TWIN = "twin"
"""What the second session of the original is called."""

P99_S = 20.0
"""Seconds for the runs that a claim about p99 needs, each finalist."""


@dataclass(frozen=True, kw_only=True)
class Finals:
    """What the finals found. ``faster`` lists pairs (a, b): a is better than b by the objective, beyond doubt."""

    certificates: tuple[Certificate, ...]
    """Best objective first; of those that no comparison tells apart, the simplest first."""
    faster: tuple[tuple[str, str], ...]
    twin: Ratio | None
    best_lossless: str
    fallen: dict[str, str]
    """Finalists that failed here, and why."""


@dataclass(frozen=True)
class _Scene:
    """The comparison that all certificates share, with the name of its baseline."""

    result: Comparison
    original: str
    since: Ticks


def finals(bench: Bench, limits: Limits) -> Finals:
    """Certify the finalists, or recall it from the journal."""
    if (found := bench.journal.recall(FINALS, Finals)) is not None:
        return found
    bench.drop_anchor()  # the original takes part as a finalist of its own
    chosen = finalists(bench, best_lossless(bench))
    since, original = ticks(), bench.task.original.key
    fallen: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        sessions = _open_all(bench, chosen, stack, fallen)
        twins = _open_twin(bench, stack)
        result = compare(
            [*sessions.values(), *twins],
            precision=bench.task.effort.final_precision,
            budget_s=bench.finals_s() * COMPARED,
            slice_s=bench.task.effort.slice_s,
            seed=bench.task.seed,
            progress=bench.progress,
        )
        for key in [key for key, session in sessions.items() if session.name in result.failures]:
            _fall(bench, sessions, fallen, key, result.failures[sessions[key].name])
        certificates = _certify(bench, limits, sessions, fallen, _Scene(result, sessions[original].name, since))
        names = {item.plan: sessions[item.plan].name for item in certificates}
        twin_ratio = None if not twins or TWIN in result.failures else result.ratio(names[original], TWIN)
    faster = _better(bench, certificates) if bench.task.goal.objective != "latency" else _faster(result, names)
    lossless = best_lossless(bench, among=set(names))
    certificates = [
        replace(item, over_lossless=result.ratio(names[lossless], names[item.plan])) for item in certificates
    ]
    done = Finals(
        certificates=tuple(_in_order(bench, certificates, faster)),
        faster=tuple(sorted(faster)),
        twin=twin_ratio,
        best_lossless=lossless,
        fallen=fallen,
    )
    bench.journal.record(FINALS, done)
    return done


def finalists(bench: Bench, lossless: str) -> list[Trial]:
    """Give the original, the best lossless plan, and the best that keep the allowed drop.

    Among these is the best whose drop can be expected to be proven on the certify split; those within the goal's
    limits of size, memory and throughput come before those that are not.
    """
    task, original = bench.task, bench.task.original.key
    fitting = [trial for trial in bench.trials.values() if bench.meets(trial)]
    inside = [trial for trial in fitting if bench.fits(trial)]
    limit = task.goal.max_drop
    sure = [t for t in inside if limit is not None and t.key != original and provable_drop(bench, t) <= limit]
    surest = best_of(sure, task.goal, original=original)
    ranked = (*frontier(inside, task.goal, original=original), *frontier(fitting, task.goal, original=original))
    keys = [key for key in dict.fromkeys((*ranked, *_rivals(inside, task.goal, original))) if key != original]
    keys = keys[:FINALISTS]
    names = dict.fromkeys([original, lossless, *([surest.key] if surest else []), *keys])
    return [bench.trials[key] for key in names]


def _rivals(trials: Sequence[Trial], goal: Goal, original: str) -> list[str]:
    """Give those that screening does not tell from the fastest, one of each skeleton: the finals look more closely."""
    best = best_of(trials, goal, original=original)
    if best is None or best.measurement is None or goal.objective != "latency":
        return []
    fastest = best.measurement.speedup.value
    near = [t for t in trials if t.measurement is not None and t.measurement.speedup.high >= fastest]
    simplest: dict[str, Trial] = {}
    for trial in sorted(near, key=lambda t: (loss(t), simplicity(t, original=original))):
        simplest.setdefault(trial.skeleton or trial.key, trial)
    taken = best.skeleton or best.key
    rivals = [trial for skeleton, trial in simplest.items() if skeleton != taken]
    return [trial.key for trial in sorted(rivals, key=lambda t: (cost(t, goal), t.key))]


def best_lossless(bench: Bench, *, among: Collection[str] | None = None) -> str:
    """Give the key of the fastest plan that computes in float32 throughout; of equals the simplest."""
    task = bench.task
    plain = [
        trial
        for trial in bench.trials.values()
        if trial.outcome == "measured" and not trial.traits and (among is None or trial.key in among)
    ]
    best = best_of(plain, task.goal, original=task.original.key)
    return best.key if best else task.original.key


def as_certified(trials: Sequence[Trial], certificates: Sequence[Certificate]) -> list[Trial]:
    """Give the trials with speeds on one footing: the finals', and the others' as they would be there.

    Finalists, and what runs the same operators, get the ratio of the final comparison. The others keep that of their
    screening, times what that of the nearest finalist changed by: screening and finals are different hours.
    """
    known = {trial.key: trial.skeleton or trial.key for trial in trials}
    speeds = {known[item.plan]: item.over_original for item in certificates}
    before = {known[t.key]: t.measurement.speedup.value for t in trials if t.measurement and known[t.key] in speeds}

    def drift(value: float) -> float:
        nearest = min(before, key=lambda name: abs(math.log(before[name] / value)), default=None)
        return speeds[nearest].value / before[nearest] if nearest else 1.0

    found = []
    for trial in trials:
        if trial.measurement is not None:
            speed = trial.measurement.speedup
            by = drift(speed.value)
            moved = replace(speed, value=speed.value * by, low=speed.low * by, high=speed.high * by)
            measured = replace(trial.measurement, speedup=speeds.get(known[trial.key], moved))
            trial = replace(trial, measurement=measured)
        found.append(trial)
    return found


def _open_all(
    bench: Bench, chosen: Sequence[Trial], stack: contextlib.ExitStack, fallen: dict[str, str]
) -> dict[str, IsolatedSession]:
    sessions: dict[str, IsolatedSession] = {}
    for trial in chosen:
        try:
            sessions[trial.key] = stack.enter_context(_reopen(bench, trial, name=trial.key))
        except StoreError:
            raise
        except HastenError as error:
            _fall(bench, sessions, fallen, trial.key, error)
    return sessions


def _certify(
    bench: Bench, limits: Limits, sessions: dict[str, IsolatedSession], fallen: dict[str, str], scene: _Scene
) -> list[Certificate]:
    certificates = []
    for key, session in list(sessions.items()):
        try:
            certificates.append(_certificate(bench, limits, bench.trials[key], session, scene))
        except StoreError:
            raise
        except HastenError as error:
            _fall(bench, sessions, fallen, key, error)
    return certificates


def _fall(
    bench: Bench, sessions: dict[str, IsolatedSession], fallen: dict[str, str], key: str, error: HastenError
) -> None:
    """Record that a finalist failed; without the original there is nothing to compare with.

    Raises:
        HastenError: the error, where it is the original's.
    """
    if key == bench.task.original.key:
        raise error
    fallen[key] = str(error)
    sessions.pop(key, None)
    bench.note(f"{bench.trials[key].plan} fell out of the finals: {error}")


def _open_twin(bench: Bench, stack: contextlib.ExitStack) -> list[IsolatedSession]:
    """Open the original once more, for what the comparison takes for a difference; nothing where it has no room."""
    try:
        return [stack.enter_context(_reopen(bench, bench.original(), name=TWIN))]
    except StoreError:
        raise
    except HastenError as error:
        bench.note(f"the original is not compared with itself: {error}")
        return []


def _reopen(bench: Bench, trial: Trial, *, name: str) -> IsolatedSession:
    """Open a finalist on the certify split, from the very files that were measured."""
    built = bench.built(trial)
    bench.task.store.verify(built)
    rule = WarmUp(max_s=max(1.5, bench.finals_s() * WARMED / (FINALISTS + 3)))
    return bench.session(trial.plan, built, name=name, split="certify", warm_up=rule)


def _certificate(bench: Bench, limits: Limits, trial: Trial, session: IsolatedSession, scene: _Scene) -> Certificate:
    bench.progress(f"certifying {trial.plan}", None)
    same = trial.key == bench.task.original.key
    judged = None if same else bench.judge(session, "certify")
    latency = _latency(bench, session, scene.result)
    over_original = scene.result.ratio(scene.original, session.name)
    return Certificate(
        plan=trial.key,
        quality=judged,
        over_original=over_original,
        over_lossless=over_original,
        measurement=Measurement(
            latency=latency,
            speedup=over_original,
            resources=session.resources(),
            conditions=bench.conditions(scene.since, threads=trial.plan.threads),
            signature=session.signature,
            bound=_bound(bench, limits, trial, session, latency),
        ),
    )


def _bound(bench: Bench, limits: Limits, trial: Trial, session: IsolatedSession, latency: Latency) -> Bound | None:
    """Hold a finalist against the machine's limit; None where its engine cannot tell its operators."""
    try:
        operators = session.operators(PROFILED_RUNS)
    except StoreError:
        raise
    except HastenError as error:
        bench.note(f"{trial.plan}: its operators cannot be told: {error}")
        return None
    return bound(operators, limits.peaks[trial.plan.threads], latency.median_ns)


def _latency(bench: Bench, session: IsolatedSession, result: Comparison) -> Latency:
    """Give a finalist's latency, with the runs that a claim about p99 needs.

    The claim is looked at only after the numbers of runs that allow 0, 1, 5 and 10 misses, each at a quarter of the
    error: looking after every slice until it holds would be wrong more often than one time in a hundred.
    """
    limit, latency = bench.task.goal.p99_ns, result.latency(session.name, limit_ns=bench.task.goal.p99_ns)
    if limit is None or latency.median_ns > limit:
        return latency
    slices, spent, seconds = list(result.slices[session.name]), 0.0, min(P99_S, bench.finals_s() / 3)
    for allowed in LOOKS:
        while sum(map(len, slices)) < runs_needed(0.99, allowed, P99_CONFIDENCE) and spent < seconds:
            slices.append(session.slice(bench.task.effort.slice_s))
            spent += float(slices[-1].sum()) / 1e9
        latency = latency_of(slices, first_run_ns=latency.first_run_ns, settled=latency.settled, limit_ns=limit)
        if percentile_holds(latency.runs, latency.misses or 0, 0.99, P99_CONFIDENCE):
            break
    return latency


def _faster(result: Comparison, names: dict[str, str]) -> list[tuple[str, str]]:
    """List the pairs (a, b) of plans where a is faster than b beyond doubt."""
    return [(a, b) for a in names for b in names if a != b and result.ratio(names[b], names[a]).wins]


def _better(bench: Bench, certificates: Sequence[Certificate]) -> list[tuple[str, str]]:
    """List the pairs (a, b) of plans where a is smaller than b by more than 2 %."""
    goal = bench.task.goal
    sizes = {
        item.plan: cost(replace(bench.trials[item.plan], measurement=item.measurement), goal) for item in certificates
    }
    return [(a, b) for a in sizes for b in sizes if sizes[b] > sizes[a] * WIN]


def _in_order(
    bench: Bench, certificates: Sequence[Certificate], faster: Sequence[tuple[str, str]]
) -> list[Certificate]:
    """Order finalists: the better beyond doubt; of the rest, those that beat the original; then the simpler."""
    goal, original = bench.task.goal, bench.task.original.key
    level = levels((replace(bench.trials[item.plan], measurement=item.measurement) for item in certificates), goal)

    def rank(item: Certificate) -> tuple[int, bool, tuple[bool, bool, int, int, str]]:
        trial = bench.trials[item.plan]
        simple = simplicity(trial, original=original)
        if goal.objective == "latency":
            beaten_by = sum(1 for _, slower in faster if slower == item.plan)
            return beaten_by, item.plan != original and not item.over_original.wins, simple
        return level[item.plan], False, simple

    return sorted(certificates, key=rank)
