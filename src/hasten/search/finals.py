"""The finals: all finalists in one comparison, block by block, and their outputs on data that the search never saw."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from hasten.errors import HastenError, StoreError
from hasten.host import Ticks, ticks
from hasten.measure.compare import Comparison, compare
from hasten.measure.latency import WarmUp
from hasten.measure.roofline import bound
from hasten.measure.statistics import percentile_holds, runs_needed
from hasten.measure.worker import IsolatedSession
from hasten.measurement import Latency, Measurement, Ratio
from hasten.search.bench import Bench
from hasten.search.frontier import best_of, cost, frontier, simplicity
from hasten.search.result import Certificate, Trial
from hasten.search.stages import Limits

FINALISTS = 4
"""Plans that come into the finals beside the original and the best lossless one."""

PROFILED_RUNS = 20
P99_S = 20.0
"""Seconds for the runs that a claim about p99 needs, each finalist."""


@dataclass(frozen=True, kw_only=True)
class Finals:
    """What the finals found. ``faster`` lists pairs (a, b) of plans: a is faster than b beyond doubt."""

    certificates: tuple[Certificate, ...]
    """Best objective first; of those that no comparison tells apart, the simplest first."""
    faster: tuple[tuple[str, str], ...]
    twin: Ratio | None
    best_lossless: str
    fallen: dict[str, str]
    """Finalists that failed here, and why."""


@dataclass(frozen=True)
class _Scene:
    """The comparison that all certificates share, with the names of its two baselines."""

    result: Comparison
    original: str
    lossless: str
    since: Ticks


def finals(bench: Bench, limits: Limits) -> Finals:
    """Certify the finalists, or recall it from the journal."""
    if (found := bench.journal.recall("finals", Finals)) is not None:
        return found
    bench.drop_anchor()  # the original takes part as a finalist of its own
    lossless = best_lossless(bench)
    chosen = finalists(bench, lossless)
    since = ticks()
    fallen: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        sessions = _open_all(bench, chosen, stack, fallen)
        twin = stack.enter_context(_reopen(bench, bench.original(), name="twin"))
        result = compare(
            [*sessions.values(), twin],
            precision=bench.task.effort.final_precision,
            budget_s=bench.finals_s(),
            slice_s=bench.task.effort.slice_s,
            seed=bench.task.seed,
            progress=bench.progress,
        )
        for key, session in list(sessions.items()):
            if session.name in result.failures:
                fallen[key] = str(result.failures[session.name])
                del sessions[key]
        lossless = lossless if lossless in sessions else bench.task.original.key
        scene = _Scene(result, sessions[bench.task.original.key].name, sessions[lossless].name, since)
        certificates = [
            _certificate(bench, limits, trial, sessions[trial.key], scene) for trial in chosen if trial.key in sessions
        ]
        faster = _faster(result, {key: session.name for key, session in sessions.items()})
        twin_ratio = None if twin.name in result.failures else result.ratio(scene.original, twin.name)
    done = Finals(
        certificates=tuple(_in_order(bench, certificates, faster)),
        faster=tuple(sorted(faster)),
        twin=twin_ratio,
        best_lossless=lossless,
        fallen=fallen,
    )
    bench.journal.record("finals", done)
    return done


def finalists(bench: Bench, lossless: str) -> list[Trial]:
    """Give the original, the best lossless plan, and the best plans of the frontier that keep the allowed drop."""
    task = bench.task
    trials = list(bench.trials.values())
    fitting = [trial for trial in trials if bench.meets(trial)]
    keys = [key for key in frontier(fitting, task.goal, original=task.original.key) if key != task.original.key]
    names = dict.fromkeys([task.original.key, lossless, *keys[:FINALISTS]])
    return [bench.trials[key] for key in names]


def best_lossless(bench: Bench) -> str:
    """Give the key of the fastest plan that computes in float32 throughout; of equals the simplest."""
    task = bench.task
    plain = [t for t in bench.trials.values() if t.outcome == "measured" and not t.traits]
    best = best_of(plain, task.goal, original=task.original.key)
    return best.key if best else task.original.key


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
            if trial.key == bench.task.original.key:
                raise
            fallen[trial.key] = str(error)
            bench.note(f"{trial.plan} fell out of the finals: {error}")
    return sessions


def _reopen(bench: Bench, trial: Trial, *, name: str) -> IsolatedSession:
    """Open a finalist on the certify split, from the very files that were measured."""
    built = bench.task.store.get(trial.artifact or "")
    bench.task.store.verify(built)
    return bench.session(
        trial.plan, built, name=name, split="certify", warm_up=WarmUp(max_s=max(1.0, bench.finals_s() / 6))
    )


def _certificate(bench: Bench, limits: Limits, trial: Trial, session: IsolatedSession, scene: _Scene) -> Certificate:
    bench.progress(f"certifying {trial.plan}", None)
    latency = _with_p99_runs(bench, session, scene.result.latency(session.name, limit_ns=bench.task.goal.p99_ns))
    over_original = scene.result.ratio(scene.original, session.name)
    same = trial.key == bench.task.original.key
    return Certificate(
        plan=trial.key,
        quality=None if same else bench.judge(session, "certify"),
        over_original=over_original,
        over_lossless=scene.result.ratio(scene.lossless, session.name),
        measurement=Measurement(
            latency=latency,
            speedup=over_original,
            resources=session.resources(),
            conditions=bench.conditions(scene.since, threads=trial.plan.threads),
            signature=session.signature,
            bound=bound(session.operators(PROFILED_RUNS), limits.peaks[trial.plan.threads], latency.median_ns),
        ),
    )


def _with_p99_runs(bench: Bench, session: IsolatedSession, latency: Latency) -> Latency:
    """Add runs until the goal's p99 is proven or cannot be, or its time is over."""
    limit = bench.task.goal.p99_ns
    if limit is None or latency.median_ns > limit:
        return latency
    runs, misses, more = latency.runs, latency.misses or 0, 0.0
    while not percentile_holds(runs, misses, 0.99) and more < P99_S and runs < runs_needed(0.99, max(misses, 10)):
        samples = session.slice(bench.task.effort.slice_s)
        runs, misses = runs + len(samples), misses + int((samples > limit).sum())
        more += float(samples.sum()) / 1e9
    return replace(latency, runs=runs, misses=misses)


def _faster(result: Comparison, names: dict[str, str]) -> list[tuple[str, str]]:
    """List the pairs (a, b) of plans where a is faster than b beyond doubt."""
    return [(a, b) for a in names for b in names if a != b and result.ratio(names[b], names[a]).wins]


def _in_order(
    bench: Bench, certificates: Sequence[Certificate], faster: Sequence[tuple[str, str]]
) -> list[Certificate]:
    """Order finalists: what is faster beyond doubt comes first; of the rest, the simpler."""
    goal, original = bench.task.goal, bench.task.original.key

    def rank(item: Certificate) -> tuple[float, tuple[bool, bool, int, int, str]]:
        trial = bench.trials[item.plan]
        if goal.objective == "latency":
            beaten_by = sum(1 for _, slower in faster if slower == item.plan)
            return float(beaten_by), simplicity(trial, original=original)
        return cost(replace(trial, measurement=item.measurement), goal), simplicity(trial, original=original)

    return sorted(certificates, key=rank)
