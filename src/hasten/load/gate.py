"""Limits that a recorded run must keep, each judged by what its requests can prove.

A limit is MET, MISSED, or INCONCLUSIVE: the interval of what was measured lies on both sides of it. A gate that guesses
is worth less than none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hasten.errors import InvalidSetting
from hasten.load.figures import State, judged, rate_of, times_of, why_invalid
from hasten.load.objective import Objective
from hasten.load.recorder import OK, UNSENT
from hasten.load.run import LoadRun
from hasten.measure.percentiles import independent
from hasten.measure.statistics import percentile_fails, percentile_holds, runs_needed


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What must hold."""

    objectives: Sequence[Objective] = ()
    min_throughput: float | None = None
    """Good answers a second."""
    max_errors: float | None = None
    """Share of requests without a good answer: refused, timed out, failed; 0: none at all may be."""

    def __post_init__(self) -> None:
        if not self.objectives and self.min_throughput is None and self.max_errors is None:
            raise InvalidSetting("a gate needs a limit: --max-p99 20ms, --slo, --min-throughput or --max-errors")


@dataclass(frozen=True, kw_only=True)
class Check:
    """One limit, judged; ``why`` in one line."""

    limit: str
    state: State
    why: str


def checks_of(run: LoadRun, limits: Limits) -> tuple[Check, ...]:
    """Judge a run by every limit. One that was cut short misses: its service did not last."""
    found = []
    if run.cut_short is not None:
        found.append(Check(limit="the run lasts", state="MISSES", why=f"it was cut short: {run.cut_short}"))
    times = times_of(run)
    for objective in limits.objectives:
        verdict = judged(times, objective, why_invalid(run, objective))
        found.append(Check(limit=str(objective), state=verdict.state, why=verdict.why))
    if limits.min_throughput is not None:
        found.append(_throughput(run, limits.min_throughput))
    if limits.max_errors is not None:
        found.append(_errors(run, limits.max_errors))
    return tuple(found)


def state_of(checks: Sequence[Check]) -> State:
    """Give the worst: one that misses decides, whatever could not be told of others."""
    states = {check.state for check in checks}
    order: tuple[State, ...] = ("MISSES", "INVALID", "INCONCLUSIVE")
    return next((state for state in order if state in states), "MEETS")


def _throughput(run: LoadRun, least: float) -> Check:
    rate = rate_of(run)
    state: State = "MEETS" if rate.low >= least else "MISSES" if rate.high < least else "INCONCLUSIVE"
    why = f"{rate.value:.4g} answers a second, 95 % interval {rate.low:.4g} to {rate.high:.4g}"
    if state == "INCONCLUSIVE":
        why += "; a longer run narrows it, and an open loop never answers more than it sends"
    return Check(limit=f"throughput >= {least:g}/s", state=state, why=why)


def _errors(run: LoadRun, most: float) -> Check:
    outcomes = run.requests.outcome
    bad = outcomes[outcomes != UNSENT] != OK
    n, missed = len(bad), int(bad.sum())
    alone, alone_missed = independent(bad)
    limit, why = f"errors <= {most * 100:g}%", f"{missed} of {n} requests had no good answer"
    state: State = "INCONCLUSIVE"
    if n and most == 0:
        state = "MISSES" if missed else "MEETS"
    elif most >= 1 or percentile_holds(alone, alone_missed, 1 - most):
        state = "MEETS"
    elif percentile_fails(n, missed, 1 - most):  # a burst of errors is one event, but it did happen
        state = "MISSES"
    else:
        crowds = f", in crowds, as {alone_missed} of {alone} independent ones" if alone < n else ""
        why += f"{crowds}; with so many, {runs_needed(1 - most, missed)} requests would prove it"
    return Check(limit=limit, state=state, why=why)
