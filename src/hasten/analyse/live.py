"""A service that is up, looked at from here: alone, saturated, along its curve, under one load, and at its limit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from hasten.analyse.analysis import (
    Analysis,
    Capacity,
    LoadPoint,
    Predicted,
    analyse_run,
    load_point,
    mean_parts,
)
from hasten.analyse.batch_costs import BatchCosts, costs_from_statistics, costs_of
from hasten.analyse.capacity import Load, highest_rate, point_at, replicas_for, saturated_rate
from hasten.analyse.highest_rate import Found, Rules, Seen, check_objective, find_highest_rate
from hasten.analyse.host_samples import HostSamples, sampling
from hasten.analyse.phases import join_phases
from hasten.analyse.simulate import Setup
from hasten.artifact import Json
from hasten.client.client import Client
from hasten.errors import BadInput, ServeError
from hasten.isolation import Progress
from hasten.load.arrivals import Arrivals, Closed, Poisson
from hasten.load.cores import server_pid
from hasten.load.figures import rate_of, times_of, why_invalid
from hasten.load.generate import OpenLoad
from hasten.load.objective import Objective
from hasten.load.run import OUTCOMES, STOPPED, LoadRun
from hasten.load.target import LoadPlan, Target

ALONE_S = 1.0
SATURATED_S = 2.5
CLIENTS = (8, 32, 128)
"""Of the closed loops that saturate a service: more are tried as long as they bring more."""

BRINGS = 1.1

SHARES = (0.1, 0.3, 0.5, 0.7, 0.85, 0.95)
"""Of the saturated rate: where the curve is measured."""

USUAL_UP_TO = 0.75
"""Of the saturated rate: beyond it what surrounds a run is no longer what surrounds it at other rates."""

USUAL_SHARE = 0.6
"""Of the saturated rate: the load that is looked at closely where none is named."""

SIMULATED = 8000

UNDISTURBED_TRIES = 4
"""Runs of one load, until the generator was on time in one."""


@dataclass(frozen=True, kw_only=True)
class Look:
    """How a service is looked at. ``arrivals`` None: Poisson at 60 % of the saturated rate."""

    arrivals: Arrivals | None = None
    duration_s: float = 20.0
    curve_s: float = 3.0
    """For each point of the curve; 0: no curve."""
    objective: Objective | None = None
    rules: Rules = field(default_factory=Rules)
    rates: tuple[float, ...] = ()
    """For which the replicas are to be told."""
    seed: int = 0
    timeout_s: float = 10.0


@dataclass(frozen=True, kw_only=True)
class Looked:
    """What came of a look: the analysis, the record of the load that it is about, and what the host said meanwhile."""

    analysis: Analysis
    run: LoadRun
    host: HostSamples | None
    costs: BatchCosts | None


def look_at(load: OpenLoad, look: Look, *, progress: Progress) -> Looked:
    """Analyse the service that ``load`` has reached.

    Raises:
        InvalidSetting: an objective that one request on the idle service misses; said before any load.
        BadInput: the service answers nothing. HastenError: the generator failed.
    """
    service = _Service(load, look, progress)
    alone = service.alone()
    bare_ns = _median_ns(alone)
    if look.objective is not None:
        check_objective(look.objective, bare_ns)
    saturated = service.saturated()
    top = rate_of(saturated).value
    if top <= 0:
        raise BadInput(f"{load.target.url} answered nothing under load: {_why(saturated)}")
    runs = service.curve(top)
    before = statistics_of(load.target)
    with _watched(load.target) as host_now:
        arrivals = look.arrivals or Poisson(rate=float(f"{USUAL_SHARE * top:.3g}"))
        run = service.run(arrivals, look.duration_s, look.seed, f"looking closely, {arrivals}")
        host = host_now()
    after = statistics_of(load.target)
    found = None if look.objective is None else service.search(look.objective, bare_ns)
    means = mean_parts(before, after) if before and after else ()
    analysis = analyse_run(run, objective=look.objective, host=host, means=means)
    points = tuple(load_point(one, look.objective) for one in (*runs, saturated) if len(times_of(one)))
    usual = [one for one, share in zip(runs, SHARES, strict=False) if share <= USUAL_UP_TO]
    costs, lacking = _costs(usual, run, alone, saturated, (before, after))
    capacity = None if costs is None else _capacity(costs, points, look, found)
    notes = (*analysis.notes, *lacking)
    told = replace(analysis, curve=points, found=found, capacity=capacity, notes=notes)
    return Looked(analysis=told, run=run, host=host, costs=costs)


def statistics_of(target: Target) -> Mapping[str, Json] | None:
    """Ask a server for Triton's statistics; None where it has none."""
    if target.protocol in ("http", "session"):
        return None
    try:
        with Client(target.url, api_key=target.api_key, certificate=target.certificate) as client:
            return client.statistics(target.model, version=target.version)
    except ServeError:
        return None


def fitted(costs: BatchCosts, measured: float, *, load: Load, setup: Callable[[BatchCosts], Setup]) -> BatchCosts:
    """Fit the event loop's work for each request, so that the simulation saturates where the service was seen to."""
    if saturated_rate(setup(costs), load) <= measured * 1.01:
        return costs
    low, high = 0.0, 2e9 / measured
    for _ in range(10):
        middle = (low + high) / 2
        if saturated_rate(setup(replace(costs, loop_ns=middle)), load) > measured:
            low = middle
        else:
            high = middle
    return replace(costs, loop_ns=high)


def undisturbed(measure: Callable[[int], LoadRun], objective: Objective | None) -> LoadRun:
    """Give the first run in which the generator was on time, of a few with the seeds 0, 1, ...; else the last.

    A search for the highest rate does not count the runs in which it was late (``highest_rate``). What a stalling
    machine did to the service in such a run must then not be learnt from it either. Without an objective there is no
    such search, and the first run is as good as any.
    """
    for seed in range(1 if objective is None else UNDISTURBED_TRIES):
        run = measure(seed)
        if why_invalid(run, objective) is None:
            break
    return run


@dataclass(frozen=True)
class _Service:
    load: OpenLoad
    look: Look
    progress: Progress

    def run(self, arrivals: Arrivals, seconds: float, seed: int, doing: str) -> LoadRun:
        plan = LoadPlan(arrivals=arrivals, duration_s=seconds, seed=seed, timeout_s=self.look.timeout_s)
        run = self.load.run(plan, progress=lambda done, missed, share: self.progress(doing, share))
        if run.cut_short == STOPPED:  # Ctrl-C ends the look, not this load alone
            raise KeyboardInterrupt
        return run

    def alone(self) -> LoadRun:
        """One request after the other."""
        run = self.run(Closed(concurrency=1), ALONE_S, self.look.seed, "one request at a time")
        if not (run.requests.outcome == OUTCOMES.index("ok")).any():
            raise BadInput(f"{self.load.target.url} answered none of {len(run.requests.outcome)} requests: {_why(run)}")
        return run

    def saturated(self) -> LoadRun:
        """More and more clients that wait for their answers, as long as that brings more."""

        def clients(count: int) -> LoadRun:
            return self.run(Closed(concurrency=count), SATURATED_S, self.look.seed, f"{count} clients at once")

        best = clients(CLIENTS[0])
        for count in CLIENTS[1:]:
            run = clients(count)
            if rate_of(run).value < BRINGS * rate_of(best).value:
                break
            best = run
        return best

    def curve(self, top: float) -> list[LoadRun]:
        if not self.look.curve_s:
            return []
        found = []
        for place, share in enumerate(SHARES):
            arrivals = Poisson(rate=float(f"{share * top:.3g}"))

            def measure(seed: int, place: int = place, arrivals: Arrivals = arrivals) -> LoadRun:
                first = self.look.seed + place + seed * len(SHARES)
                return self.run(arrivals, self.look.curve_s, first, f"the curve, {arrivals}")

            found.append(undisturbed(measure, self.look.objective))
        return found

    def search(self, objective: Objective, bare_ns: float) -> Found:
        def measure(rate: float, seconds: float, seed: int) -> Seen:
            run = self.run(Poisson(rate=rate), seconds, seed, f"the highest rate, {rate:.4g}/s")
            late = why_invalid(run, objective) is not None
            return Seen(times_ns=times_of(run), late=late)

        return find_highest_rate(measure, objective, bare_ns=bare_ns, rules=self.look.rules)


def _costs(
    runs: Sequence[LoadRun],
    run: LoadRun,
    alone: LoadRun,
    saturated: LoadRun,
    statistics: tuple[Mapping[str, Json] | None, Mapping[str, Json] | None],
) -> tuple[BatchCosts | None, tuple[str, ...]]:
    """Give t(n) from the best source that there is, or why there is none."""
    try:
        return costs_of([*runs, run], alone=alone, saturated=saturated), ()
    except BadInput as told:
        before, after = statistics
        if before is None or after is None:
            return None, (f"no capacity model: {told}",)
        joined = join_phases(alone)
        infer = sum(part.mean_ns for part in mean_parts(before, after) if part.part != "queue")
        try:
            outside = max(float(np.median(joined.response_ns)) - infer, 0.0)
            return costs_from_statistics(before, after, outside_ns=outside), ()
        except BadInput as also:
            return None, (f"no capacity model: {also}",)


def _capacity(costs: BatchCosts, points: Sequence[LoadPoint], look: Look, found: Found | None) -> Capacity:
    """Predict what was measured, and say how far off that is."""
    saturated, opened = points[-1], points[:-1]
    load = Load(requests=SIMULATED, seed=look.seed)
    instances = len(costs.busy_ns)

    def setup(with_costs: BatchCosts) -> Setup:
        return Setup(costs=with_costs, instances=instances, cores=instances + 1, sizes=costs.sizes)

    costs = fitted(costs, saturated.throughput.value, load=load, setup=setup)
    service = setup(costs)
    predicted = [(point, point_at(service, point.offered, load)) for point in opened if not point.misses]
    return Capacity(
        source=costs.source,
        saturated=saturated_rate(service, load),
        measured_saturated=saturated.throughput.value,
        points=tuple(
            Predicted(
                rate=point.offered,
                p50_ns=model.value_ns(0.5),
                p99_ns=model.value_ns(0.99),
                measured_p50_ns=_value(point, 0.5),
                measured_p99_ns=_value(point, 0.99),
            )
            for point, model in predicted
        ),
        highest=None if look.objective is None else highest_rate(service, look.objective, load).rate,
        measured_highest=None if found is None or not found.rate else found.rate,
        replicas=()
        if look.objective is None
        else tuple((rate, replicas_for(rate, service, look.objective, load).count) for rate in look.rates),
    )


def _value(point: LoadPoint, q: float) -> float | None:
    return next((one.value_ns for one in point.percentiles if one.q == q), None)


@contextlib.contextmanager
def _watched(target: Target) -> Iterator[Callable[[], HostSamples | None]]:
    """Sample the server's host while the block runs, where it is this one."""
    pid = server_pid(target)
    if pid is None:
        yield lambda: None
        return
    with sampling(pid) as taken:
        yield taken.samples


def _median_ns(run: LoadRun) -> float:
    times = times_of(run)
    return float(np.median(times[np.isfinite(times)]))


def _why(run: LoadRun) -> str:
    errors = run.conditions.get("errors")
    if isinstance(errors, Mapping) and errors:
        return ", ".join(f"{reason} ({count})" for reason, count in list(errors.items())[:3])
    counts = {name: int((run.requests.outcome == place).sum()) for place, name in enumerate(OUTCOMES)}
    return ", ".join(f"{name} {count}" for name, count in counts.items() if count) or "no request was sent"
