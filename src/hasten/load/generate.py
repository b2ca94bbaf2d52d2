"""The generator: runs a plan against a target, from processes of its own that are pinned away from the server.

    with open_load(target, payloads) as load:
        run = load.run(LoadPlan(arrivals=read_arrivals("poisson:rate=200"), duration_s=30.0))

Several processes share one plan: each takes every k-th request of it, and their columns are joined again.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import msgspec
import numpy as np

from hasten.artifact import Json
from hasten.errors import InvalidSetting
from hasten.host import load_since, this_host, ticks, versions
from hasten.isolation import Child, Limits, Reply
from hasten.load.arrivals import MOST_REQUESTS, Closed
from hasten.load.cores import away_from_server, cores_for
from hasten.load.payloads import Payload
from hasten.load.record import COLUMNS
from hasten.load.run import Ints, LoadRun, Requests
from hasten.load.target import LoadPlan, Target
from hasten.load.worker import pack, write_target

LEAD_S = 0.05
"""Between the order to run and the first request: the plan must be in every process by then."""
LEAD_FOR_REQUEST_S = 2e-7
SPARE_S = 120.0
"""What a run may take beyond its plan and its last timeout."""
SPARE_FOR_REQUEST_S = 5e-4
"""And for each request: reading what the server told of it, on a busy machine."""
FASTEST_CLOSED = 30_000
"""Requests a second that no closed loop of one process goes beyond."""
OPEN_S = 300.0
"""What reaching a target may take: a session is opened there, and run once."""

Progress = Callable[[int, int, float], None]
"""Called now and then with the answers, the misses, and the share of the run that is over."""


@dataclass(frozen=True, kw_only=True)
class OpenLoad:
    """Generators that have reached a target. A context manager; one run at a time."""

    target: Target
    payloads: tuple[Payload, ...]
    cpus: tuple[int, ...] | None
    """The processors that the generators are pinned to; None: there are too few to be away from the server."""
    _children: tuple[Child, ...]
    _pool: ThreadPoolExecutor

    def run(self, plan: LoadPlan, *, progress: Progress | None = None) -> LoadRun:
        """Run a plan, and give its record. An interruption (Ctrl-C) ends it early and keeps what was measured.

        Raises:
            InvalidSetting: the plan has too many requests. BadInput: its trace cannot be used.
            ChildCrashed, ChildHung, OutOfMemory: a generator failed.
        """
        parts = self._parts(plan)
        since = ticks()
        lead_s = LEAD_S + LEAD_FOR_REQUEST_S * sum(len(part["due_ns"]) for part, _ in parts)
        began_ns = time.perf_counter_ns() + int(lead_s * 1e9)
        began_unix_ns = time.time_ns() + int(lead_s * 1e9)
        told = _Told(progress, len(parts))
        closed_most = min(MOST_REQUESTS, int(FASTEST_CLOSED * plan.duration_s))
        most = closed_most if isinstance(plan.arrivals, Closed) else sum(len(part["due_ns"]) for part, _ in parts)
        limit_s = plan.duration_s + plan.timeout_s + SPARE_S + SPARE_FOR_REQUEST_S * most
        calls = [
            self._pool.submit(self._call, number, plan, (began_ns, limit_s), arrays, concurrency, told)
            for number, (arrays, concurrency) in enumerate(parts)
        ]
        replies = self._wait(calls)
        conditions: dict[str, Json] = {
            "host": msgspec.to_builtins(this_host()),
            "load": msgspec.to_builtins(load_since(since)),
            "versions": dict(versions()),
            "generator": {"processes": len(parts), "cpus": None if self.cpus is None else list(self.cpus)},
            "payloads": {"distinct": len(self.payloads), "bytes": sum(p.n_bytes for p in self.payloads)},
            "errors": _reasons(replies),
        }
        cuts = [reply.value["cut_short"] for reply in replies if reply.value["cut_short"]]
        return LoadRun(
            url=self.target.url,
            protocol=self.target.protocol,
            model=self.target.model,
            version=self.target.version,
            arrivals=str(plan.arrivals),
            seed=plan.seed,
            duration_s=plan.duration_s,
            timeout_s=plan.timeout_s,
            began_unix_ns=began_unix_ns,
            requests=_joined([reply.arrays for reply in replies]),
            conditions=conditions,
            cut_short=cuts[0] if cuts else None,
        )

    def close(self) -> None:
        """End the generators. Closing twice is fine."""
        for child in self._children:
            child.close()
        self._pool.shutdown(wait=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _parts(self, plan: LoadPlan) -> list[tuple[dict[str, Ints], int]]:
        """Share a plan out: to each process the arrays of its course, and its part of a closed loop's concurrency."""
        count, closed = len(self._children), isinstance(plan.arrivals, Closed)
        due = plan.arrivals.due_ns(plan.duration_s, plan.seed)
        order = np.random.default_rng((plan.seed, 1)).permutation(len(self.payloads)).astype(np.int64)
        samples = np.resize(order, len(order) if closed else len(due))
        parts = []
        for number in range(count):
            share = 0
            if isinstance(plan.arrivals, Closed):
                share = plan.arrivals.concurrency // count + (number < plan.arrivals.concurrency % count)
                if not share:
                    continue
            chosen = np.roll(samples, number) if closed else samples[number::count]
            parts.append(({"due_ns": due[number::count], "samples": chosen}, share))
        return parts

    def _call(
        self,
        number: int,
        plan: LoadPlan,
        clock: tuple[int, float],
        arrays: dict[str, Ints],
        concurrency: int,
        told: _Told,
    ) -> Reply:
        began_ns, limit_s = clock
        return self._children[number].call(
            "run",
            arrays=arrays,
            timeout_s=limit_s,
            progress=lambda text, share: told.take(number, text, share),
            concurrency=concurrency,
            duration_ns=int(plan.duration_s * 1e9),
            timeout_ns=int(plan.timeout_s * 1e9),
            began_ns=began_ns,
        )

    def _wait(self, calls: list[Future[Reply]]) -> list[Reply]:
        try:
            return [call.result() for call in calls]
        except KeyboardInterrupt:
            for child in self._children:
                os.kill(child.pid, signal.SIGINT)
            return [call.result() for call in calls]


class _Told:
    """Adds up what several generators tell of their progress."""

    def __init__(self, progress: Progress | None, count: int) -> None:
        self._progress = progress
        self._counts = [(0, 0)] * count

    def take(self, number: int, text: str, share: float | None) -> None:
        answered, _, missed = text.partition(" ")
        self._counts[number] = (int(answered), int(missed))
        if self._progress is not None:
            self._progress(sum(n for n, _ in self._counts), sum(n for _, n in self._counts), share or 0.0)


def open_load(target: Target, payloads: tuple[Payload, ...], *, processes: int = 1) -> OpenLoad:
    """Start the generators and reach the target from each.

    Raises:
        InvalidSetting: there are no payloads, or ``processes`` is below 1.
        NoAnswer: nobody is there. MissingDependency: what the protocol needs is not installed.
    """
    if processes < 1 or not payloads:
        raise InvalidSetting(f"load needs one process and one payload at least, not {processes} and {len(payloads)}")
    cpus = cores_for(processes, target)
    alone = cpus is not None and away_from_server(cpus, target)
    packed, rows = pack(payloads), payloads[0].rows
    with ExitStack() as stack:
        children = []
        for number in range(processes):
            limits = Limits(seconds=OPEN_S, cpus=None if cpus is None else (cpus[number],))
            told = write_target(target)
            child = Child.start("hasten.load.worker:LoadWorker", limits=limits, target=told, alone=alone)
            children.append(stack.enter_context(child))
            child.call("reach", arrays=packed, rows=rows)
        stack.pop_all()
    pool = ThreadPoolExecutor(processes, thread_name_prefix="hasten-load")
    return OpenLoad(target=target, payloads=payloads, cpus=cpus, _children=tuple(children), _pool=pool)


def generate(
    target: Target,
    plan: LoadPlan,
    payloads: tuple[Payload, ...],
    *,
    processes: int = 1,
    progress: Progress | None = None,
) -> LoadRun:
    """Run one plan against a target. Raises as ``open_load`` and ``OpenLoad.run`` do."""
    with open_load(target, payloads, processes=processes) as load:
        return load.run(plan, progress=progress)


def _joined(parts: list[dict[str, Any]]) -> Requests:
    """Join the columns of several generators in the order of the schedule."""
    columns = {name: np.concatenate([part[name] for part in parts]) for name in COLUMNS}
    order = np.argsort(columns["scheduled_ns"], kind="stable")
    return Requests(**{name: column[order] for name, column in columns.items()})


def _reasons(replies: list[Reply]) -> dict[str, Json]:
    found: dict[str, int] = {}
    for reply in replies:
        for reason, count in reply.value["reasons"].items():
            found[reason] = found.get(reason, 0) + count
    return dict(sorted(found.items(), key=lambda item: -item[1]))
