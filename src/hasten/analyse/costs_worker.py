"""t(n) of a deployment, measured in a process of its own: runs of every size, by how many sessions run at once."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from hasten.analyse.batch_costs import BatchCosts
from hasten.deployment import Deployment, read_deployment
from hasten.engine import CPU, Engine, Session, device_of
from hasten.errors import Unsupported
from hasten.isolation import Child, Limits, Progress, Reply, report_progress
from hasten.plan import Part, load_part
from hasten.serve.intake import batch_axis
from hasten.tensors import Array

WARM_RUNS = 3
FEWEST_RUNS, MOST_RUNS = 8, 4000
MOST_ON_GPU = 3
"""Sessions of one GPU that are tried: what more of them gain is little, and each takes memory there."""
OUTSIDE_NS = 200_000.0
"""What surrounds a run where no server was asked yet: about what a request of little data takes on one host."""


class CostsWorker:
    """Opens sessions of one deployment with so many threads each, and times them."""

    def __init__(self, path: str, threads: int) -> None:
        self._deployment, artifact = read_deployment(Path(path))
        settings = {**self._deployment.settings, "threads": threads}
        self._engine: Engine = load_part("engine", Part(self._deployment.engine, settings))
        self._artifact = artifact
        self._sessions: list[Session] = []

    def measure(self, sizes: list[int], most_busy: int, seconds: float, arrays: dict[str, Array]) -> Reply:
        """Time every size with 1 to ``most_busy`` sessions at work; ``arrays`` is a row of each input, [1, ...]."""
        while len(self._sessions) < most_busy:
            self._sessions.append(self._engine.open(self._artifact))
        found: dict[str, Array] = {}
        total = len(sizes) * most_busy
        for place, size in enumerate(sizes):
            feed = {name: np.repeat(row[:1], size, axis=0) for name, row in arrays.items()}
            for busy in range(1, most_busy + 1):
                report_progress(f"runs of {size}, {busy} at once", (place * most_busy + busy - 1) / total)
                found[f"{size}/{busy}"] = _timed(self._sessions[:busy], feed, seconds)
        return Reply(None, found)


def measure_costs(
    path: Path,
    row: dict[str, Array],
    *,
    threads: int,
    cores: int,
    sizes: tuple[int, ...],
    seconds: float = 0.25,
    progress: Progress | None = None,
) -> BatchCosts:
    """Measure t(n) of a deployment on this host, with as many sessions at once as ``cores`` have room for.

    Args:
        path: Its deployment.toml.
        row: One row of each input, [1, ...].
        threads: Of each session.
        cores: That the service may use.
        sizes: Rows of a run.
        seconds: Of runs for each size and number of sessions.
        progress: Told how far it is.

    Raises:
        HastenError: it cannot be read or opened, or its child failed.
    """
    most_busy = max(1, cores // threads)
    with Child.start(
        "hasten.analyse.costs_worker:CostsWorker", limits=Limits(), path=str(path), threads=threads
    ) as child:
        reply = child.call(
            "measure", arrays=row, progress=progress, sizes=list(sizes), most_busy=most_busy, seconds=seconds
        )
    times = {key: array.astype(np.float64) for key, array in reply.arrays.items()}
    typical = [[float(np.median(times[f"{size}/{busy}"])) for size in sizes] for busy in range(1, most_busy + 1)]
    residuals = [
        times[f"{size}/{busy}"] / typical[busy - 1][k]
        for busy in range(1, most_busy + 1)
        for k, size in enumerate(sizes)
    ]
    return BatchCosts(
        sizes=sizes,
        busy_ns=tuple(tuple(np.maximum.accumulate(row_ns).tolist()) for row_ns in typical),
        residuals=np.concatenate(residuals),
        outside_ns=np.array([OUTSIDE_NS]),
        runs=int(sum(len(one) for one in residuals)),
        source="sessions timed on this host",
    )


def sizes_for(deployment: Deployment, path: Path, wanted: tuple[int, ...]) -> tuple[int, ...]:
    """Give the batch sizes that a deployment can run, of those wanted. Raises Unsupported: it can run none of them."""
    _, artifact = read_deployment(path)
    axis = batch_axis(artifact.signature, deployment.batch)
    if axis is None:
        return (1,)
    if isinstance(axis, int):
        return (axis,)
    if not wanted:
        raise Unsupported(deployment.name, "no batch size is left to try")
    return tuple(sorted(set(wanted)))


def cores_for(deployment: Deployment, cores: int) -> int:
    """Give how many of ``cores`` have room for a session: of a GPU's each waits for the same GPU."""
    return cores if _device(deployment) == CPU else min(cores, MOST_ON_GPU)


def threads_for(deployment: Deployment, cores: int) -> tuple[int, ...]:
    """Give the threads that a session may have on ``cores``: powers of two, all of them, and its own.

    On a GPU they make no difference.
    """
    if _device(deployment) != CPU:
        return (1,)
    found = {1 << k for k in range(cores.bit_length()) if 1 << k <= cores} | {cores}
    own = deployment.settings.get("threads")
    return tuple(sorted(found | ({own} if isinstance(own, int) and own <= cores else set())))


def _device(deployment: Deployment) -> str:
    return device_of(load_part("engine", Part(deployment.engine, deployment.settings)))


def _timed(sessions: list[Session], feed: dict[str, Array], seconds: float) -> Any:
    """Time runs of all sessions at once, each in a thread, and give the times, [runs] in nanoseconds."""
    for session in sessions:
        for _ in range(WARM_RUNS):
            session.run(feed)
    end_ns = time.perf_counter_ns() + int(seconds * 1e9)

    def work(session: Session) -> list[int]:
        mine: list[int] = []
        while len(mine) < MOST_RUNS:
            begun = time.perf_counter_ns()
            if begun > end_ns and len(mine) >= FEWEST_RUNS:
                break
            session.run(feed)
            mine.append(time.perf_counter_ns() - begun)
        return mine

    with ThreadPoolExecutor(len(sessions)) as pool:
        return np.array([ns for mine in pool.map(work, sessions) for ns in mine], np.int64)
