"""What a batch costs on this machine: t(n) by how many instances are busy, its spread, and what a request costs beside.

It comes from a session in this process (``measure_costs``), or from what a server said of the requests of recorded
runs (``costs_of``); where only a server's statistics are there, ``costs_from_statistics`` gives means without spread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hasten.analyse.phases import Joined, join_phases
from hasten.analyse.server_runs import ServerRuns, infer_ended_ns, server_runs
from hasten.artifact import Json
from hasten.errors import BadInput, InvalidSetting
from hasten.load.run import Ints, LoadRun

Floats = npt.NDArray[np.float64]

FEWEST_RUNS = 5
"""A size that fewer runs had says nothing of t(n)."""

MOST_RESIDUALS = 20_000


@dataclass(frozen=True, kw_only=True)
class BatchCosts:
    """t(n) and what surrounds it. Times in nanoseconds.

    ``busy_ns[k - 1][j]`` is the typical time of a run of ``sizes[j]`` rows while ``k`` instances run at once.
    """

    sizes: tuple[int, ...]
    busy_ns: tuple[tuple[float, ...], ...]
    residuals: Floats
    """[m]: times of runs over the typical time of their size, to draw from."""
    outside_ns: Floats
    """[m]: response times less queue, batch wait, pre and infer, where nothing else was going on, to draw from."""
    loop_ns: float = 0.0
    """Processor time that each request takes beside its run: the event loop's work, and whoever shares its cores."""
    between_ns: float = 0.0
    """From the end of a run to the beginning of the next on an instance that always has one."""
    wake_ns: float = 0.0
    """From a request's arrival at an idle instance to the closing of its batch."""
    runs: int = 0
    """How many runs stand behind it."""
    source: str = ""

    def __post_init__(self) -> None:
        if not self.sizes or not self.busy_ns or any(len(row) != len(self.sizes) for row in self.busy_ns):
            raise InvalidSetting(f"batch costs need a time for each of the sizes {self.sizes} at each number of busy")
        if not len(self.residuals) or not len(self.outside_ns):
            raise InvalidSetting("batch costs need one residual and one time outside at least")

    def ns(self, rows: float, busy: int = 1) -> float:
        """Give t(rows) with ``busy`` instances at work, between sizes by straight lines, beyond them in proportion."""
        times = self.busy_ns[min(busy, len(self.busy_ns)) - 1]
        if rows > self.sizes[-1]:
            return times[-1] * rows / self.sizes[-1]
        return float(np.interp(rows, self.sizes, times))

    def slowdown(self, size: int, busy: int) -> float:
        """Give how much longer a run of ``size`` takes with ``busy`` instances at work than alone."""
        return max(self.ns(size, busy) / self.ns(size), 1.0)

    @property
    def bare_ns(self) -> float:
        """The least that a response of one row takes: its run and what surrounds it."""
        return self.ns(self.sizes[0]) + float(np.median(self.outside_ns)) + self.wake_ns

    def best_rate(self, instances: int, sizes: Sequence[int]) -> float:
        """Rows a second that ``instances`` can run at most, whatever the waiting: the largest of n / t(n)."""
        return max(instances * size / (self.ns(size, instances) + self.between_ns) * 1e9 for size in sizes)


def costs_of(
    loaded: Sequence[LoadRun], *, alone: LoadRun | None = None, saturated: LoadRun | None = None
) -> BatchCosts:
    """Read t(n) out of runs against a server that tells batch rows and phases.

    Args:
        loaded: Runs in which the service had work, and all its instances now and then.
        alone: A run of single requests, one after the other: what a run takes where no other instance is busy.
        saturated: A run in which there was always more to do: what lies between two runs of an instance.

    Raises:
        BadInput: the server told neither, or no size was run ``FEWEST_RUNS`` times.
    """
    every = [*loaded, *([saturated] if saturated else [])]
    seen = [_seen(run) for run in every]
    sizes, infer = np.concatenate([s.size for s in seen]), np.concatenate([s.run_ns for s in seen])
    known = [int(size) for size in np.unique(sizes) if (sizes == size).sum() >= FEWEST_RUNS]
    if not known:
        raise BadInput(f"no batch size was run {FEWEST_RUNS} times in these runs; measure for longer")
    typical = _rising([float(np.median(infer[sizes == size])) for size in known])
    times = dict(zip(known, typical, strict=True))
    residuals = np.concatenate([s.run_ns[s.size == size] / ns for s in seen for size, ns in times.items()])
    instances = max(s.instances for s in seen)
    return BatchCosts(
        sizes=tuple(known),
        busy_ns=_by_busy(typical, times[known[0]], known[0], alone, instances),
        residuals=residuals[:MOST_RESIDUALS],
        outside_ns=np.concatenate([s.outside_ns for s in seen[: len(loaded)] or seen])[:MOST_RESIDUALS],
        between_ns=_between_ns(saturated) if saturated else 0.0,
        wake_ns=min(s.wake_ns for s in seen),
        runs=len(sizes),
        source="what the server told of each request",
    )


@dataclass(frozen=True)
class _Seen:
    size: Ints
    run_ns: Ints
    outside_ns: Floats
    wake_ns: float
    instances: int


def _seen(run: LoadRun) -> _Seen:
    joined = join_phases(run)
    runs, run_ns = _told(run, joined)
    return _Seen(
        size=runs.batch_rows,
        run_ns=run_ns,
        outside_ns=np.maximum(_outside(joined), 0.0),
        wake_ns=float(np.median(joined.part("batch_wait"))),
        instances=len(np.unique(runs.instance)),
    )


def _told(run: LoadRun, joined: Joined) -> tuple[ServerRuns, Ints]:
    """Give the runs that a server told of, and the time of each with joining, [runs]. Raises BadInput."""
    runs = server_runs(run, joined)
    if runs is None:
        raise BadInput(f"{run.url} does not tell infer times and batch rows, so t(n) must come from its statistics")
    pre = np.zeros(len(runs.infer_ns), np.int64)
    pre[runs.run_of] = joined.part("pre")
    return runs, runs.infer_ns + pre


def _by_busy(
    typical: Sequence[float], smallest_ns: float, size: int, alone: LoadRun | None, instances: int
) -> tuple[tuple[float, ...], ...]:
    """Give t(n) by busy instances: as seen where all are, and where one is, by what its smallest run took alone."""
    loaded = tuple(typical)
    if alone is None or instances == 1:
        return (loaded,) * instances
    seen = _seen(alone)
    own = seen.run_ns[seen.size == size]
    gain = min(float(np.median(own)) / smallest_ns, 1.0) if len(own) >= FEWEST_RUNS else 1.0
    shares = [gain + (1 - gain) * k / (instances - 1) for k in range(instances)]
    return tuple(tuple(ns * share for ns in loaded) for share in shares)


def _between_ns(saturated: LoadRun) -> float:
    """Give the mean time that a busy instance spends between runs.

    Each request counts as its share of a run: runs of tens of microseconds that a server tells in whole ones cannot all
    be told apart, and must not be counted.
    """
    joined, requests = join_phases(saturated), saturated.requests
    ended, instances = infer_ended_ns(saturated, joined), requests.instance[joined.row]
    fill = np.minimum(requests.rows[joined.row] / np.maximum(requests.batch_rows[joined.row], 1), 1.0)
    ran_ns = (joined.part("infer") + joined.part("pre")) * fill
    spans = runs = 0.0
    for instance in np.unique(instances):
        mine = instances == instance
        spans += float(np.ptp(ended[mine]) - ran_ns[mine].sum())
        runs += float(fill[mine].sum())
    return max(spans / runs, 0.0) if runs else 0.0


def costs_from_statistics(before: Mapping[str, Json], after: Mapping[str, Json], *, outside_ns: float) -> BatchCosts:
    """Read mean t(n) out of two answers of Triton's statistics extension, one from before a load and one from after.

    Raises:
        BadInput: no run came between them, or the server does not tell ``batch_stats``.
    """
    first, last = _batch_times(before), _batch_times(after)
    means: dict[int, float] = {}
    runs = 0
    for size, (count, ns) in sorted(last.items()):
        count_before, ns_before = first.get(size, (0, 0))
        if count - count_before >= FEWEST_RUNS:
            means[size] = (ns - ns_before) / (count - count_before)
            runs += count - count_before
    if not means:
        raise BadInput("the server's batch_stats tell of no runs between two looks, so t(n) is not known")
    return BatchCosts(
        sizes=tuple(means),
        busy_ns=(tuple(_rising(list(means.values()))),),
        residuals=np.ones(1),
        outside_ns=np.array([max(outside_ns, 0.0)]),
        runs=runs,
        source="means of the server's batch_stats, without their spread",
    )


def _outside(joined: Joined) -> Floats:
    inner = sum((joined.part(name) for name in ("issue_delay", "queue", "batch_wait", "pre", "infer")), np.int64(0))
    return (joined.response_ns - inner).astype(np.float64)


def _batch_times(statistics: Mapping[str, Json]) -> dict[int, tuple[int, int]]:
    """Give runs and nanoseconds of compute_infer by batch size, of one model's entry."""
    batches = statistics.get("batch_stats")
    found: dict[int, tuple[int, int]] = {}
    for one in batches if isinstance(batches, list) else []:
        infer = one.get("compute_infer", {})
        found[int(one["batch_size"])] = (int(infer.get("count", 0)), int(infer.get("ns", 0)))
    return found


def _rising(times: list[float]) -> list[float]:
    """More rows never take less time: where noise says so, the larger time stands."""
    return [float(one) for one in np.maximum.accumulate(times)]
