"""What is known of a service after it was looked at: values alone, ready to be shown or written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from hasten.analyse.causes import Explanation, explain
from hasten.analyse.highest_rate import Found
from hasten.analyse.host_samples import HostSamples
from hasten.analyse.phases import Band, bands, join_phases
from hasten.analyse.server_runs import server_runs
from hasten.artifact import Json
from hasten.load.figures import Verdict, figures_of, rate_of, span_of, times_of
from hasten.load.objective import Objective
from hasten.load.run import OUTCOMES, LoadRun
from hasten.measure.percentiles import Percentile, percentiles
from hasten.measurement import Estimate

TIMELINE = 120
"""Points of the timeline."""

BINS = 60


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What was done to which service."""

    url: str
    protocol: str
    model: str
    version: str | None
    arrivals: str
    duration_s: float
    timeout_s: float
    seed: int
    began_unix_ns: int
    cut_short: str | None


@dataclass(frozen=True, kw_only=True)
class Moment:
    """A stretch of a run: when it began, requests that were due in it, their p50 and slowest, and what was missed."""

    at_s: float
    requests: int
    median_ns: float | None
    slowest_ns: float | None
    misses: int


@dataclass(frozen=True, kw_only=True)
class Bin:
    """Answers whose response time lay from ``low_ns`` up to ``high_ns``."""

    low_ns: float
    high_ns: float
    answers: int


@dataclass(frozen=True, kw_only=True)
class BatchSize:
    """A batch size: how many runs had it and how many requests were in them, and the typical time of a run."""

    rows: int
    runs: int
    requests: int
    infer_ns: float


@dataclass(frozen=True, kw_only=True)
class OnHost:
    """What the server took of this host while it was under load; None: the system does not tell."""

    cores_used: float | None
    waiting_share: float | None
    """Time that its threads waited for a core, over the time that passed."""
    throttled_share: float | None
    peak_rss_bytes: int | None
    samples: int


@dataclass(frozen=True, kw_only=True)
class MeanPart:
    """What a server that tells no phases publishes: the mean time of one of Triton's parts, over ``n`` requests."""

    part: str
    mean_ns: float
    n: int


@dataclass(frozen=True, kw_only=True)
class LoadPoint:
    """One measured point of the throughput-latency curve. Rates are requests a second; ``rows`` samples a second."""

    arrivals: str
    offered: float
    throughput: Estimate
    rows: float
    percentiles: tuple[Percentile, ...]
    misses: int
    invalid: str | None


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """The model beside the measurement at one rate."""

    rate: float
    p50_ns: float | None
    p99_ns: float | None
    measured_p50_ns: float | None
    measured_p99_ns: float | None

    @property
    def error_p50(self) -> float | None:
        """Relative error of the predicted median."""
        return _error(self.p50_ns, self.measured_p50_ns)

    @property
    def error_p99(self) -> float | None:
        """Relative error of the predicted p99."""
        return _error(self.p99_ns, self.measured_p99_ns)


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """What the simulation says of the service, and how far it was off where both are known."""

    source: str
    saturated: float
    measured_saturated: float | None
    points: tuple[Predicted, ...]
    highest: float | None
    """Predicted highest rate under the objective."""
    measured_highest: float | None
    replicas: tuple[tuple[float, int | None], ...] = ()
    """(rate, replicas that carry it under the objective)."""

    @property
    def error_saturated(self) -> float | None:
        """Relative error of the predicted saturated rate."""
        return _error(self.saturated, self.measured_saturated)

    @property
    def error_highest(self) -> float | None:
        """Relative error of the predicted highest rate."""
        return _error(self.highest, self.measured_highest)


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """A service under one load, and where it was asked for, under others."""

    asked: Asked
    objective: Objective | None
    counts: Mapping[str, int]
    """Requests by outcome."""
    offered: float
    """Requests that were due, a second."""
    throughput: Estimate
    """Answers a second."""
    rows: Estimate
    """Samples a second; of images, frames."""
    percentiles: tuple[Percentile, ...]
    issue_delay: tuple[Percentile, ...]
    invalid: str | None
    """Why the generator cannot be believed; None: it can."""
    verdict: Verdict | None
    """Whether this run proves the objective."""
    bands: tuple[Band, ...]
    unfitting: float
    """Largest share of a response by which the server's phases are longer than the client's wait."""
    explanation: Explanation | None
    batches: tuple[BatchSize, ...]
    timeline: tuple[Moment, ...]
    distribution: tuple[Bin, ...]
    on_host: OnHost | None
    means: tuple[MeanPart, ...] = ()
    curve: tuple[LoadPoint, ...] = ()
    found: Found | None = None
    capacity: Capacity | None = None
    notes: tuple[str, ...] = ()
    conditions: Mapping[str, Json] = field(default_factory=dict)


def analyse_run(
    run: LoadRun, *, objective: Objective | None = None, host: HostSamples | None = None, means: Sequence[MeanPart] = ()
) -> Analysis:
    """Say what one record of load tells.

    Raises:
        BadInput: no request was due.
    """
    requests = run.requests
    times = times_of(run)
    answered = requests.outcome == OUTCOMES.index("ok")
    delays = (requests.sent_ns - requests.scheduled_ns)[requests.sent_ns >= 0]
    told = percentiles(times)
    some = bool(answered.any())
    joined = join_phases(run) if some else None
    figures = figures_of(run, objective)
    return Analysis(
        asked=_asked(run),
        objective=objective,
        counts={name: int((requests.outcome == place).sum()) for place, name in enumerate(OUTCOMES)},
        offered=len(times) / span_of(run),
        throughput=rate_of(run),
        rows=rate_of(run, by_rows=True),
        percentiles=told,
        issue_delay=percentiles(delays, (0.5, 0.99)) if len(delays) else (),
        invalid=figures.invalid,
        verdict=figures.verdict,
        bands=bands(joined) if joined else (),
        unfitting=joined.unfitting if joined else 0.0,
        explanation=explain(run, host=host) if some else None,
        batches=_batches(run) if some else (),
        timeline=_timeline(run),
        distribution=_distribution(times),
        on_host=None if host is None else _on_host(host),
        means=tuple(means),
        notes=tuple(_notes(run, joined is not None and "infer" in joined.told, host)),
        conditions=run.conditions,
    )


def load_point(run: LoadRun, objective: Objective | None = None) -> LoadPoint:
    """Give one run as a point of the curve."""
    times = times_of(run)
    return LoadPoint(
        arrivals=run.arrivals,
        offered=len(times) / span_of(run),
        throughput=rate_of(run),
        rows=rate_of(run, by_rows=True).value,
        percentiles=percentiles(times),
        misses=int(np.isinf(times).sum()),
        invalid=figures_of(run, objective).invalid,
    )


def mean_parts(before: Mapping[str, Json], after: Mapping[str, Json]) -> tuple[MeanPart, ...]:
    """Give the means of Triton's parts between two answers of its statistics extension; empty where they lack."""
    first, last = _inference_stats(before), _inference_stats(after)
    found = []
    for part in ("queue", "compute_input", "compute_infer", "compute_output"):
        one, two = first.get(part, {}), last.get(part, {})
        n = int(two.get("count", 0)) - int(one.get("count", 0))
        if n > 0:
            ns = int(two.get("ns", 0)) - int(one.get("ns", 0))
            found.append(MeanPart(part=part, mean_ns=ns / n, n=n))
    return tuple(found)


def _inference_stats(statistics: Mapping[str, Json]) -> Mapping[str, Mapping[str, int]]:
    found = statistics.get("inference_stats", {})
    return found if isinstance(found, Mapping) else {}


def _asked(run: LoadRun) -> Asked:
    return Asked(
        url=run.url,
        protocol=run.protocol,
        model=run.model,
        version=run.version,
        arrivals=run.arrivals,
        duration_s=run.duration_s,
        timeout_s=run.timeout_s,
        seed=run.seed,
        began_unix_ns=run.began_unix_ns,
        cut_short=run.cut_short,
    )


def _batches(run: LoadRun) -> tuple[BatchSize, ...]:
    joined = join_phases(run)
    runs = server_runs(run, joined)
    if runs is None:
        return ()
    rows = runs.batch_rows[runs.run_of]
    return tuple(
        BatchSize(
            rows=int(size),
            runs=int((runs.batch_rows == size).sum()),
            requests=int((rows == size).sum()),
            infer_ns=float(np.median(runs.infer_ns[runs.batch_rows == size])),
        )
        for size in np.unique(runs.batch_rows)
    )


def _timeline(run: LoadRun) -> tuple[Moment, ...]:
    times = times_of(run)
    at = run.requests.scheduled_ns[run.requests.outcome != OUTCOMES.index("unsent")] / 1e9
    count = max(1, min(TIMELINE, len(times) // 20))
    edges = np.linspace(0.0, max(run.duration_s, float(at.max(initial=0.0)) + 1e-9), count + 1)
    place = np.clip(np.searchsorted(edges, at, side="right") - 1, 0, count - 1)
    found = []
    for k in range(count):
        mine = times[place == k]
        whole = mine[np.isfinite(mine)]
        found.append(
            Moment(
                at_s=float(edges[k]),
                requests=len(mine),
                median_ns=float(np.median(whole)) if len(whole) else None,
                slowest_ns=float(whole.max()) if len(whole) else None,
                misses=len(mine) - len(whole),
            )
        )
    return tuple(found)


def _distribution(times: npt.NDArray[np.float64]) -> tuple[Bin, ...]:
    whole = times[np.isfinite(times) & (times > 0)]
    if not len(whole):
        return ()
    low, high = float(whole.min()), float(whole.max()) * 1.0001
    edges = np.geomspace(low, max(high, low * 1.001), BINS + 1)
    counts, _ = np.histogram(whole, edges)
    return tuple(
        Bin(low_ns=float(a), high_ns=float(b), answers=int(n))
        for a, b, n in zip(edges[:-1], edges[1:], counts, strict=True)
    )


def _on_host(host: HostSamples) -> OnHost:
    return OnHost(
        cores_used=host.cores_used,
        waiting_share=host.waiting_share,
        throttled_share=host.throttled_share,
        peak_rss_bytes=host.peak_rss_bytes,
        samples=len(host.at_unix_ns),
    )


def _notes(run: LoadRun, phases: bool, host: HostSamples | None) -> list[str]:
    found = []
    if run.cut_short is not None:
        found.append(f"the run ended before its plan did: {run.cut_short}; this is what was measured until then")
    if host is not None:
        found.append("client and server are on one host and share its processors")
    elif run.protocol != "session":
        found.append("the server's processes are not seen from here: what throttles it shows only in its times")
    if not phases:
        found.append("the server tells no phases of single requests, so its part is one: transfer and server together")
    return found


def _error(predicted: float | None, measured: float | None) -> float | None:
    return None if predicted is None or not measured else (predicted - measured) / measured
