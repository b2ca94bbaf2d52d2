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
from hasten.artifact import Json
from hasten.errors import BadInput, InvalidSetting
from hasten.load.run import LoadRun

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
        return max(instances * size / self.ns(size, instances) * 1e9 for size in sizes)


def costs_of(runs: Sequence[LoadRun], *, busy: int = 1) -> BatchCosts:
    """Read t(n) out of runs against a server that tells batch rows and phases; all with ``busy`` instances at work.

    Raises:
        BadInput: the server told neither, or no size was run ``FEWEST_RUNS`` times.
    """
    infer: dict[int, list[npt.NDArray[np.int64]]] = {}
    outside, wakes = [], []
    for run in runs:
        joined = join_phases(run)
        batch = run.requests.batch_rows[joined.row]
        if "infer" not in joined.told or not (batch > 0).any():
            raise BadInput(f"{run.url} does not tell infer times and batch rows, so t(n) must come from its statistics")
        for size in np.unique(batch[batch > 0]):
            infer.setdefault(int(size), []).append(joined.part("infer")[batch == size])
        outside.append(_outside(joined))
        wakes.append(joined.part("batch_wait"))
    times = {size: np.concatenate(parts) for size, parts in sorted(infer.items())}
    times = {size: taken for size, taken in times.items() if len(taken) >= FEWEST_RUNS}
    if not times:
        raise BadInput(f"no batch size was seen {FEWEST_RUNS} times in these runs; measure for longer")
    typical = {size: float(np.median(taken)) for size, taken in times.items()}
    residuals = np.concatenate([taken / typical[size] for size, taken in times.items()])
    quiet = np.concatenate(outside)
    return BatchCosts(
        sizes=tuple(typical),
        busy_ns=tuple([tuple(_rising(list(typical.values())))] * busy),
        residuals=residuals[:MOST_RESIDUALS],
        outside_ns=np.maximum(quiet, 0.0)[:MOST_RESIDUALS],
        wake_ns=float(np.median(np.concatenate(wakes))),
        runs=int(sum(len(taken) for taken in times.values())),
        source="what the server told of each request",
    )


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
    """Give runs and nanoseconds of compute_infer by batch size; of the first model in the answer."""
    models = statistics.get("model_stats", [])
    entry = models[0] if isinstance(models, list) and models else {}
    found: dict[int, tuple[int, int]] = {}
    for one in entry.get("batch_stats", []) if isinstance(entry, Mapping) else []:
        infer = one.get("compute_infer", {})
        found[int(one["batch_size"])] = (int(infer.get("count", 0)), int(infer.get("ns", 0)))
    return found


def _rising(times: list[float]) -> list[float]:
    """More rows never take less time: where noise says so, the larger time stands."""
    return [float(one) for one in np.maximum.accumulate(times)]
