"""What a run of load says: counts, rates, response times, and whether the generator itself can be believed.

A generator that sends late adds its own delay to what it measures, for response times count from the scheduled time.
With an objective the run is INVALID where the delay's p99 is over 5 % of it (measurement rules). Without one, where the
delay moves a percentile: where p50 or p99 from the scheduled time is over 5 % above the same from the time of sending.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import special

from hasten.load.arrivals import Closed, read_arrivals
from hasten.load.objective import Objective
from hasten.load.recorder import ERROR, OK, REFUSED, TIMEOUT, UNSENT
from hasten.load.run import LoadRun
from hasten.measure.percentiles import QUANTILES, STRETCHES, Floats, Percentile, independent, percentiles
from hasten.measure.statistics import percentile_fails, percentile_holds, quantile, runs_needed
from hasten.measurement import Estimate

LARGEST_DELAY = 0.05
"""Of the generator, as a share of the objective, or of what it may add to a percentile."""

State = Literal["MEETS", "MISSES", "INCONCLUSIVE", "INVALID"]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether a run proves an objective, at 99 % confidence; ``why`` in one line."""

    objective: str
    state: State
    why: str
    misses: int
    requests: int


@dataclass(frozen=True, kw_only=True)
class Figures:
    """One run in numbers. Rates are per second of the run."""

    planned: int
    sent: int
    ok: int
    refused: int
    timeouts: int
    errors: int
    unsent: int
    sent_rate: float
    ok_rate: float
    """Answers that came while the run went on."""
    rows_rate: float
    """The samples in them."""
    percentiles: tuple[Percentile, ...]
    """From the scheduled time, of all that was sent; empty where nothing was."""
    issue_delay_p50_ns: float | None
    """The generator's own delay; None in a closed loop, which has no schedule to be late for."""
    issue_delay_p99_ns: float | None
    invalid: str | None
    """Why the generator cannot be believed; None: it can."""
    verdict: Verdict | None


def figures_of(run: LoadRun, objective: Objective | None = None) -> Figures:
    """Sum a run up, and judge it by an objective where there is one."""
    requests = run.requests
    sent = requests.outcome != UNSENT
    ok = requests.outcome == OK
    span_s = span_of(run)
    counts = {name: int((requests.outcome == code).sum()) for name, code in _COUNTED.items()}
    in_time = ok & (requests.done_ns <= span_s * 1e9)
    times = times_of(run)
    closed = isinstance(read_arrivals(run.arrivals), Closed)
    delays = None if closed or not sent.any() else (requests.sent_ns - requests.scheduled_ns)[requests.sent_ns >= 0]
    if delays is not None and not len(delays):
        delays = None
    invalid = why_invalid(run, objective)
    return Figures(
        planned=len(requests.outcome),
        sent=int(sent.sum()),
        **counts,
        sent_rate=float(sent.sum()) / span_s,
        ok_rate=float(in_time.sum()) / span_s,
        rows_rate=float(requests.rows[in_time].sum()) / span_s,
        percentiles=percentiles(times, QUANTILES) if len(times) else (),
        issue_delay_p50_ns=None if delays is None else quantile(delays, 0.5),
        issue_delay_p99_ns=None if delays is None else quantile(delays, 0.99),
        invalid=invalid,
        verdict=None if objective is None else judged(times, objective, UNASKED if closed else invalid),
    )


UNASKED = "a closed loop does not ask while the server stalls, and so misses it; use --arrivals poisson:rate=..."
"""Why response times of a closed loop prove no objective (coordinated omission)."""

_COUNTED = {"ok": OK, "refused": REFUSED, "timeouts": TIMEOUT, "errors": ERROR, "unsent": UNSENT}


def span_of(run: LoadRun) -> float:
    """Give the seconds over which requests left: the plan's, or until the run was cut short."""
    if run.cut_short is None:
        return run.duration_s
    left = run.requests.sent_ns[run.requests.sent_ns >= 0]
    return max(float(left.max()) / 1e9, 1e-3) if len(left) else run.duration_s


def rate_of(run: LoadRun, *, by_rows: bool = False) -> Estimate:
    """Give answers, or answered rows, a second, with a 95 % interval from stretches of the run (batch means)."""
    requests = run.requests
    ok = (requests.outcome == OK) & (requests.done_ns >= 0)
    weights = (requests.rows[ok] if by_rows else np.ones(int(ok.sum()), np.int64)).astype(np.float64)
    done_s = requests.done_ns[ok] / 1e9
    length_s = span_of(run)
    weights, done_s = weights[done_s <= length_s], done_s[done_s <= length_s]
    value = float(weights.sum()) / length_s
    counts, _ = np.histogram(done_s, bins=STRETCHES, range=(0.0, length_s), weights=weights)
    half = float(special.stdtrit(STRETCHES - 1, 0.975) * counts.std(ddof=1) / np.sqrt(STRETCHES)) * STRETCHES / length_s
    return Estimate(value=value, low=max(value - half, 0.0), high=value + half, n=len(done_s))


def times_of(run: LoadRun) -> Floats:
    """Give the response times of what was sent, in order, in nanoseconds; infinite where there was no good answer."""
    requests = run.requests
    times = np.where(requests.outcome == OK, requests.latency_ns.astype(np.float64), np.inf)
    sent: Floats = times[requests.outcome != UNSENT]
    return sent


def why_invalid(run: LoadRun, objective: Objective | None) -> str | None:
    """Say why a run's generator cannot be believed; None: it can, as in a closed loop, or it has sent nothing."""
    requests = run.requests
    known = requests.sent_ns >= 0
    if not known.any() or isinstance(read_arrivals(run.arrivals), Closed):
        return None
    delay_p99_ns = quantile((requests.sent_ns - requests.scheduled_ns)[known], 0.99)
    if objective is not None:
        if delay_p99_ns <= LARGEST_DELAY * objective.limit_ns:
            return None
        share = delay_p99_ns / objective.limit_ns
        return (
            f"the generator was {delay_p99_ns / 1e6:.3g} ms late at p99, {share:.0%} of the objective, and 5 % are "
            "allowed; use more --processes, other cores, or a lower rate"
        )
    ok = requests.outcome == OK
    if not ok.any():
        return None
    late, own = requests.latency_ns[ok], (requests.done_ns - requests.sent_ns)[ok]
    for q in (0.5, 0.99):
        with_delay, without = quantile(late, q), quantile(own, q)
        if with_delay > (1 + LARGEST_DELAY) * without:
            return (
                f"the generator's own delay moves p{q * 100:g} from {without / 1e6:.3g} to {with_delay / 1e6:.3g} ms; "
                "use more --processes, other cores, or a lower rate"
            )
    return None


def judged(times_ns: Floats, objective: Objective, invalid: str | None) -> Verdict:
    """Judge response times [n], in order of arrival, by an objective: the exact binomial test in both directions.

    Slow responses come in crowds; so many count as are independent of each other.
    """
    over = times_ns > objective.limit_ns
    n, misses = len(times_ns), int(over.sum())
    alone, alone_misses = independent(over)
    told = f"{misses} of {n} requests were over {objective.limit_ns / 1e6:.6g} ms"
    state: State = "INCONCLUSIVE"
    if invalid is not None:
        state, why = "INVALID", invalid
    elif percentile_holds(alone, alone_misses, objective.q):
        state, why = "MEETS", told
    elif percentile_fails(alone, alone_misses, objective.q):
        state, why = "MISSES", told
    elif alone < n:
        why = f"{told}, in crowds: they prove as much as {alone_misses} of {alone} independent ones; a longer run would"
    else:
        why = f"{told}; with so many, {runs_needed(objective.q, misses)} requests would prove it: a longer run would"
    return Verdict(objective=str(objective), state=state, why=why, misses=misses, requests=n)
