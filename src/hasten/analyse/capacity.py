"""What a service can carry, by simulation: its curve, its highest rate under an objective, and what would carry more.

A rate holds an objective where the share of simulated responses over the limit is small enough. All rates are tried
with the same random numbers, so that a higher rate is not called better by luck.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from hasten.analyse.batch_costs import BatchCosts
from hasten.analyse.simulate import Arrivals, Setup, Simulated, closed, poisson, simulate
from hasten.errors import BadInput, InvalidSetting
from hasten.load.objective import Objective
from hasten.measure.percentiles import QUANTILES, Percentile, percentiles
from hasten.measure.statistics import runs_needed

REQUESTS = 12_000
"""Requests of one simulation: a p99 stands on the slowest 120 of them."""

WARM_SHARE = 0.1
"""The first tenth of a simulation is not counted: it begins empty."""

PRECISION = 0.02
"""The highest rate is found to within this share of itself."""

LOADS = (0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 1.0)
"""Shares of the saturated rate at which the curve is drawn."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """What one rate gives. ``goodput``: answers within the limit, a second; without one, answers."""

    rate: float
    throughput: float
    goodput: float
    percentiles: tuple[Percentile, ...]
    mean_batch: float
    busy: float
    """Share of the time that an instance runs."""

    def value_ns(self, q: float) -> float | None:
        """Give one percentile."""
        return next((one.value_ns for one in self.percentiles if one.q == q), None)


@dataclass(frozen=True, kw_only=True)
class Highest:
    """The highest rate that holds the objective, requests a second; 0: none does. ``limit`` is what saturates."""

    rate: float
    saturated: float
    point: Point | None


@dataclass(frozen=True, kw_only=True)
class Load:
    """How requests come: rows of each, drawn from ``rows``; how many are simulated, and with which seed."""

    rows: tuple[int, ...] = (1,)
    requests: int = REQUESTS
    seed: int = 0

    def at(self, rate: float) -> Arrivals:
        """Give them at a rate."""
        return poisson(rate, self.requests, seed=self.seed, rows=self.rows)


def point_at(
    setup: Setup, rate: float, load: Load, *, limit_ns: float | None = None, objective: Objective | None = None
) -> Point:
    """Simulate one rate.

    An objective's percentile is among those told, with as many requests at least as prove it, and its limit is the one
    of the goodput.
    """
    if objective is None:
        return _point(simulate(setup, load.at(rate), seed=load.seed), setup, rate, limit_ns, QUANTILES)
    needed = math.ceil(runs_needed(objective.q, 0) / (1 - WARM_SHARE)) + 1
    load = replace(load, requests=max(load.requests, needed))
    found = simulate(setup, load.at(rate), seed=load.seed)
    return _point(found, setup, rate, objective.limit_ns, sorted({*QUANTILES, objective.q}))


def saturated_rate(setup: Setup, load: Load) -> float:
    """Give the requests a second that the service answers when there is always more to do."""
    clients = max(2, math.ceil(4 * setup.instances * setup.sizes[-1] / float(np.mean(load.rows))))
    count = max(2000, 20 * clients)
    found = simulate(setup, closed(clients, count, rows=load.rows, seed=load.seed), seed=load.seed)
    done = np.sort(found.done_ns[found.outcome == 0])
    first = len(done) // 5
    if len(done) - first < 2 or done[-1] <= done[first]:
        raise BadInput("the simulated service answered nothing: its queue or its timeout refuses every request")
    return float((len(done) - 1 - first) / (done[-1] - done[first]) * 1e9)


def curve(setup: Setup, load: Load, *, limit_ns: float | None = None) -> tuple[Point, ...]:
    """Give the predicted throughput-latency curve, up to the saturated rate."""
    top = saturated_rate(setup, load)
    return tuple(point_at(setup, share * top, load, limit_ns=limit_ns) for share in LOADS)


def highest_rate(setup: Setup, objective: Objective, load: Load, *, precision: float = PRECISION) -> Highest:
    """Predict the highest rate at which ``objective`` holds."""
    top = saturated_rate(setup, load)
    if setup.costs.bare_ns > objective.limit_ns:
        return Highest(rate=0.0, saturated=top, point=None)
    low, high = 0.0, top * 1.05
    best: Point | None = None
    while high - low > precision * high and high > top / 1000:
        rate = (low + high) / 2
        point = point_at(setup, rate, load, objective=objective)
        value = point.value_ns(objective.q)
        if value is not None and value <= objective.limit_ns:
            low, best = rate, point
        else:
            high = rate
    return Highest(rate=low, saturated=top, point=best)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A way to run the service, and what it is predicted to carry."""

    setup: Setup
    highest: Highest

    @property
    def name(self) -> str:
        """What it is in a line."""
        sizes = ",".join(str(size) for size in self.setup.sizes)
        return f"instances={self.setup.instances} threads={self.setup.threads} batch_sizes={sizes}"


def choices(costs: Sequence[tuple[int, BatchCosts]], *, cores: int, most_rows: int | None = None) -> tuple[Setup, ...]:
    """Give every sensible way to run a model on ``cores``: instances times threads within them, batches up to a size.

    ``costs`` has t(n) by threads of a run.
    """
    found = []
    for threads, cost in costs:
        top = [size for size in cost.sizes if most_rows is None or size <= most_rows]
        for instances in range(1, max(1, cores // threads) + 1):
            for largest in top:
                sizes = tuple(size for size in cost.sizes if size <= largest)
                found.append(Setup(costs=cost, instances=instances, cores=cores, sizes=sizes, threads=threads))
    return tuple(found)


def best_choices(setups: Sequence[Setup], objective: Objective, load: Load, *, keep: int = 3) -> tuple[Choice, ...]:
    """Predict the highest rate of each, the best first. All are tried coarsely, the best again in full.

    One that cannot be among the ``keep`` best even without any waiting is left out.

    Raises:
        InvalidSetting: there is none to choose from.
    """
    if not setups:
        raise InvalidSetting("there is no way to run the service to choose from")
    coarse = replace(load, requests=max(2000, load.requests // 4))
    ranked: list[Choice] = []
    rows = float(np.mean(load.rows))
    for setup in sorted(setups, key=lambda one: -one.costs.best_rate(one.instances, one.sizes)):
        ranked.sort(key=lambda one: -one.highest.rate)
        most = setup.costs.best_rate(setup.instances, setup.sizes) / rows
        if len(ranked) >= keep and most < ranked[keep - 1].highest.rate:
            break  # and so are all that come after it
        ranked.append(Choice(setup=setup, highest=highest_rate(setup, objective, coarse, precision=3 * PRECISION)))
    ranked.sort(key=lambda one: -one.highest.rate)
    again = [Choice(setup=c.setup, highest=highest_rate(c.setup, objective, load)) for c in ranked[: 2 * keep]]
    again.sort(key=lambda one: -one.highest.rate)
    return (*again, *ranked[2 * keep :])


@dataclass(frozen=True, kw_only=True)
class Replicas:
    """The answer to "how many replicas for this rate": ``count``, or None where no number of them holds the objective.

    ``by_count`` are the points of 1, 2, ... replicas, each at its share of the rate.
    """

    rate: float
    count: int | None
    cores: int | None
    by_count: tuple[Point, ...]


def replicas_for(rate: float, setup: Setup, objective: Objective, load: Load, *, most: int = 1024) -> Replicas:
    """Say how many replicas of a service, each on ``setup.cores`` cores, carry ``rate`` under an objective.

    A balancer that sends each request to a random replica is assumed: a share of Poisson arrivals is Poisson again.
    """
    one = highest_rate(setup, objective, load)
    if one.rate <= 0:
        return Replicas(rate=rate, count=None, cores=None, by_count=())
    count = math.ceil(rate / one.rate)
    if count > most:
        raise BadInput(f"{rate:g} requests/s would take {count} replicas, and more than {most} are not considered")
    shown = sorted({max(1, count + step) for step in (-2, -1, 0, 1, 2)})
    points = tuple(point_at(setup, rate / k, load, objective=objective) for k in shown)
    holding = [
        k
        for k, point in zip(shown, points, strict=True)
        if (v := point.value_ns(objective.q)) and v <= objective.limit_ns
    ]
    found = min(holding, default=None)
    return Replicas(rate=rate, count=found, cores=None if found is None else found * setup.cores, by_count=points)


def _point(found: Simulated, setup: Setup, rate: float, limit_ns: float | None, quantiles: Sequence[float]) -> Point:
    first = int(len(found.due_ns) * WARM_SHARE)
    response = found.response_ns[first:]
    answered = np.isfinite(response)
    begun, ended = found.due_ns[first], max(found.done_ns.max(), found.due_ns[-1])
    seconds = max(float(ended - begun) / 1e9, 1e-9)
    good = answered if limit_ns is None else response <= limit_ns
    ran = found.infer_ns[first:] > 0
    rows, batch = found.rows[first:][ran], found.batch_rows[first:][ran]
    busy = float((found.infer_ns[first:][ran] * np.minimum(rows / np.maximum(batch, 1), 1.0)).sum())
    return Point(
        rate=rate,
        throughput=float(answered.sum()) / seconds,
        goodput=float(good.sum()) / seconds,
        percentiles=percentiles(response, quantiles),
        mean_batch=float(batch.mean()) if len(batch) else 0.0,
        busy=min(busy / (seconds * 1e9 * setup.instances), 1.0),
    )
