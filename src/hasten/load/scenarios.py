"""MLPerf's four scenarios, with their rules of validity, so that a figure can be put beside published ones.

Source: MLCommons, "MLPerf Inference Rules" (v5), sections "Scenarios" and "Early stopping"; defaults of LoadGen.
Early stopping is the exact binomial test at 99 % confidence, the same as ``percentile_holds``. What is measured here is
a service behind its protocol: the rules allow that, and it is told beside the figure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from hasten.errors import InvalidSetting, UnknownName
from hasten.load.arrivals import Arrivals, Closed, Poisson
from hasten.load.figures import span_of, times_of
from hasten.load.objective import Objective
from hasten.load.recorder import OK, UNSENT
from hasten.load.run import LoadRun
from hasten.measure.percentiles import Floats
from hasten.measure.statistics import percentile_holds, runs_needed

Name = Literal["single-stream", "multi-stream", "server", "offline"]
LEAST_S = 600.0
OFFLINE_UNDER_WAY = 16
"""Requests under way at once where all samples are there at once, if no closed loop of another size is asked for."""


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """How load arrives, and what makes its figure valid."""

    name: Name
    metric: str
    q: float | None
    """The percentile that the rules look at."""
    samples_per_query: int | None
    """None: any."""
    least_samples: int = 0
    least_s: float = LEAST_S


SCENARIOS: dict[str, Scenario] = {
    "single-stream": Scenario(name="single-stream", metric="p90 latency", q=0.9, samples_per_query=1),
    "multi-stream": Scenario(name="multi-stream", metric="p99 latency of 8 samples", q=0.99, samples_per_query=8),
    "server": Scenario(name="server", metric="queries a second under the objective", q=0.99, samples_per_query=1),
    "offline": Scenario(
        name="offline", metric="samples a second", q=None, samples_per_query=None, least_samples=24_576
    ),
}


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One rule, and whether the run keeps it."""

    rule: str
    kept: bool
    found: str


@dataclass(frozen=True, kw_only=True)
class ScenarioResult:
    """The scenario's figure (nanoseconds, or a rate per second); it may stand beside others only where ``valid``."""

    scenario: str
    metric: str
    value: float | None
    valid: bool
    rules: tuple[Rule, ...]


def scenario_of(name: str) -> Scenario:
    """Give a scenario by its name. Raises UnknownName."""
    if name not in SCENARIOS:
        raise UnknownName("scenario", name, SCENARIOS)
    return SCENARIOS[name]


def arrivals_for(scenario: Scenario, asked: Arrivals | None) -> Arrivals:
    """Give the arrivals of a scenario.

    Raises:
        InvalidSetting: ``asked`` is none that the scenario has; the server's rate is not known by itself.
    """
    if scenario.name == "server":
        if not isinstance(asked, Poisson):
            raise InvalidSetting("the server scenario needs its rate; give --arrivals poisson:rate=200")
        return asked
    if scenario.name == "offline":
        if asked is not None and not isinstance(asked, Closed):
            raise InvalidSetting("offline, all samples are there at once; --arrivals may be closed:concurrency=16")
        return asked or Closed(concurrency=OFFLINE_UNDER_WAY)
    if asked is not None:
        raise InvalidSetting(f"{scenario.name} sends one query after the other; leave --arrivals out")
    return Closed(concurrency=1)


def batch_for(scenario: Scenario, asked: int) -> int:
    """Give the rows of a request. Raises InvalidSetting: the scenario has another number."""
    wanted = scenario.samples_per_query
    if wanted is not None and asked not in (1, wanted):
        raise InvalidSetting(f"{scenario.name} has {wanted} samples in a query; leave --batch out")
    return asked if wanted is None else wanted


def check_objective(scenario: Scenario, objective: Objective | None) -> None:
    """See that a scenario has what its figure needs.

    Raises:
        InvalidSetting: the server scenario has no objective, or one of another percentile than its own.
    """
    if scenario.name != "server":
        return
    if objective is None:
        raise InvalidSetting('the server scenario needs its objective; give --slo "p99 <= 15ms"')
    if objective.q != scenario.q:
        raise InvalidSetting(f'the server scenario is judged by its p99, not by {objective}; give --slo "p99 <= 15ms"')


def judge(run: LoadRun, scenario: Scenario, objective: Objective | None = None) -> ScenarioResult:
    """Give a scenario's figure and what its rules say of the run.

    Raises:
        InvalidSetting: the server scenario without an objective has no figure.
    """
    check_objective(scenario, objective)
    times, span_s = times_of(run), span_of(run)
    outcomes = run.requests.outcome
    rows = int(run.requests.rows[outcomes != UNSENT].sum())
    rules = [
        Rule(
            rule=f"at least {scenario.least_s:g} s",
            kept=run.cut_short is None and span_s >= scenario.least_s,
            found=f"{span_s:g} s",
        ),
        Rule(
            rule="every query is answered",
            kept=bool(len(times)) and bool((outcomes == OK).all()),
            found=f"{int((outcomes == OK).sum())} of {len(outcomes)}",
        ),
    ]
    if scenario.least_samples:
        least = scenario.least_samples
        rules.append(Rule(rule=f"at least {least} samples", kept=rows >= least, found=f"{rows}"))
    value, more = _figure(run, scenario, objective, times)
    rules += more
    kept = all(rule.kept for rule in rules)
    return ScenarioResult(scenario=scenario.name, metric=scenario.metric, value=value, valid=kept, rules=tuple(rules))


def early_estimate_ns(times_ns: Floats, q: float) -> float | None:
    """Give the time that the ``q`` quantile is proven to be under, at 99 %; None: too few queries.

    LoadGen's early-stopping estimate: the slowest that is left when as many of the slowest are set aside as the
    binomial test allows misses.
    """
    n = len(times_ns)
    if n < runs_needed(q, 0):
        return None
    low, high = 0, n
    while high - low > 1:  # the most misses that still hold
        middle = (low + high) // 2
        low, high = (middle, high) if percentile_holds(n, middle, q) else (low, middle)
    return float(np.sort(times_ns)[n - 1 - low])


def _figure(
    run: LoadRun, scenario: Scenario, objective: Objective | None, times: Floats
) -> tuple[float | None, list[Rule]]:
    if scenario.q is None:
        ok = run.requests.outcome == OK
        last_s = float(run.requests.done_ns[ok].max()) / 1e9 if ok.any() else 0.0
        return (float(run.requests.rows[ok].sum()) / last_s if last_s else None), []
    if scenario.name != "server" or objective is None:
        value = early_estimate_ns(times, scenario.q)
        needed = runs_needed(scenario.q, 0)
        rule = Rule(rule=f"early stopping: {needed} queries", kept=len(times) >= needed, found=f"{len(times)}")
        return (value if value is not None and np.isfinite(value) else None), [rule]
    misses = int((times > objective.limit_ns).sum())
    holds = bool(len(times)) and percentile_holds(len(times), misses, objective.q)
    found = f"{misses} of {len(times)} over it"
    return len(times) / span_of(run), [Rule(rule=f"{objective}, at 99 % confidence", kept=holds, found=found)]
