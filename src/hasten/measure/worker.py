"""A built model in a child process of its own: timed there, and driven from here."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec
import numpy as np

from hasten.artifact import Artifact, Json
from hasten.engine import Engine, Session
from hasten.errors import BadInput, InvalidSetting, SignatureMismatch, Unsupported
from hasten.isolation import Child, Limits, Reply
from hasten.measure import resources
from hasten.measure.latency import NS, Nanoseconds, WarmUp, timed_runs, warm_up, without_gc
from hasten.measurement import Operator, Resources
from hasten.plan import Part, load_part
from hasten.samples import Samples
from hasten.store import Store
from hasten.tensors import Array, Feed, Signature

FEEDS = 8
"""Different feeds that the runs take in turn, so that no run finds its input in the cache for being the last one."""

FEEDS_BYTES = 64 << 20
"""Memory for the feeds; one is made in any case."""

SPARE_RUNS = 10
"""A slice that has time for so many runs begins with one that is not timed: the other contenders had the caches."""


class SessionWorker:
    """What runs in the child: one open session, and a few feeds of ``batch`` rows, drawn with ``seed``.

    ``engine`` is the JSON of a ``plan.Part``, ``artifact`` the digest of what it built, ``store`` and ``samples``
    are folders (``Store.root``, ``Samples.save``).

    Raises:
        SignatureMismatch: the samples do not fit the model, or its fixed batch is another one.
        StoreError, BuildFailed, MissingDependency: as ``Store.get``, ``Engine.open`` and ``load_part`` say.
    """

    def __init__(self, *, engine: str, artifact: str, store: str, samples: str, batch: int = 1, seed: int = 0) -> None:
        self._engine: Engine = load_part("engine", msgspec.json.decode(engine, type=Part))
        self._built = Store(Path(store)).get(artifact)
        self._samples = Samples.load(Path(samples))
        self._samples.check(self._built.signature)
        self._feeds = _feeds(self._samples, batch, seed)
        self._next: Iterator[Feed] = itertools.cycle(self._feeds)
        resources.forget_peak()
        before = resources.rss_bytes()
        start = time.perf_counter_ns()
        self._session: Session = self._engine.open(self._built)
        loaded = time.perf_counter_ns()
        self._session.signature.check(self._feeds[0])
        first = time.perf_counter_ns()
        self._run()
        self._first_run_ns = self._run_ns = time.perf_counter_ns() - first
        self._load_ns = loaded - start
        self._rss_before, self._rss_after = before, resources.rss_bytes()

    def about(self) -> Json:
        """Give the session's signature and the time of its first run."""
        return {"signature": msgspec.to_builtins(self._session.signature), "first_run_ns": self._first_run_ns}

    def warm_up(self, *, min_runs: int, min_s: float, max_s: float, agree: float) -> bool:
        """Warm up by this rule (``WarmUp``)."""
        with without_gc():
            return warm_up(self._timed_run, WarmUp(min_runs=min_runs, min_s=min_s, max_s=max_s, agree=agree))

    def slice(self, seconds: float) -> Reply:
        """Run for ``seconds``; array "ns" [runs] is the time of each run."""
        if self._run_ns * SPARE_RUNS < seconds * NS:
            self._run()
        times = timed_runs(self._run, seconds)
        self._run_ns = int(np.median(times))
        return Reply(len(times), {"ns": times})

    def outputs(self, start: int, stop: int, batch: int) -> Reply:
        """Run rows ``start`` to ``stop`` of the samples, ``batch`` at a time; arrays are outputs [stop - start, ...].

        A session of fixed batch runs at its own. Where a last batch is short for it, the last row fills it up, and
        what comes of that is cut off. Values that are not finite are passed on: ``quality`` judges them.

        Raises:
            BadInput: there are no such rows. Unsupported: an output has no row for each sample.
        """
        if not 0 <= start < stop <= len(self._samples) or batch < 1:
            raise BadInput(
                f"rows {start} to {stop} in batches of {batch} cannot be run: there are {len(self._samples)} samples"
            )
        fixed = fixed_batch(self._session.signature)
        parts = []
        for low in range(start, stop, fixed or batch):
            rows = np.arange(low, min(low + (fixed or batch), stop))
            filled = np.pad(rows, (0, (fixed or len(rows)) - len(rows)), mode="edge")
            made = self._session.run(_take(self._samples, filled))
            parts.append({name: _rows(name, value, rows, filled) for name, value in made.items()})
        return Reply(stop - start, {name: np.concatenate([part[name] for part in parts]) for name in parts[0]})

    def resources(self) -> dict[str, int]:
        """Give what ``measurement.Resources`` holds; memory is over this process's before the model was opened."""
        return {
            "file_bytes": self._built.size_bytes,
            "load_ns": self._load_ns,
            "rss_bytes": max(0, self._rss_after - self._rss_before),
            "peak_rss_bytes": max(0, resources.peak_rss_bytes() - self._rss_before),
        }

    def operators(self, runs: int) -> Json:
        """Give the operators that the engine really runs (``Engine.operators``) as plain values."""
        return msgspec.to_builtins(self._engine.operators(self._built, self._feeds[0], runs=runs))

    def threads_now(self) -> int:
        """Count this process's threads."""
        return resources.threads_now()

    def _run(self) -> dict[str, Array]:
        return self._session.run(next(self._next))

    def _timed_run(self) -> int:
        start = time.perf_counter_ns()
        self._run()
        return time.perf_counter_ns() - start


@dataclass(frozen=True, kw_only=True)
class IsolatedSession:
    """A ``SessionWorker`` seen from the parent: a ``Contender``. Use as a context manager. One thread at a time.

    Every method raises as ``Child.call`` does; the limit of seconds is for one call.
    """

    name: str
    child: Child
    signature: Signature
    """Of the open session."""
    first_run_ns: float
    warm_up_rule: WarmUp

    def warm_up(self) -> bool:
        """Run until warm. False: it never settled."""
        rule = self.warm_up_rule
        told = self.child.call("warm_up", min_runs=rule.min_runs, min_s=rule.min_s, max_s=rule.max_s, agree=rule.agree)
        return bool(told.value)

    def slice(self, seconds: float) -> Nanoseconds:
        """Run for ``seconds``, at least once, and give the time of each run in nanoseconds, [runs]."""
        return self.child.call("slice", seconds=seconds).arrays["ns"].astype(np.int64, copy=False)

    def outputs(self, start: int, stop: int, batch: int) -> dict[str, Array]:
        """Give the outputs [stop - start, ...] for these rows of the samples. Raises as ``SessionWorker.outputs``."""
        return self.child.call("outputs", start=start, stop=stop, batch=batch).arrays

    def resources(self) -> Resources:
        """Give what the model takes."""
        return msgspec.convert(self.child.call("resources").value, Resources)

    def operators(self, runs: int) -> tuple[Operator, ...]:
        """Give the operators that the engine really runs, timed over ``runs`` runs."""
        return msgspec.convert(self.child.call("operators", runs=runs).value, tuple[Operator, ...])

    def threads_now(self) -> int:
        """Count the child's threads."""
        return int(self.child.call("threads_now").value)

    def close(self) -> None:
        """End the child. Closing twice is fine."""
        self.child.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def open_isolated(
    engine: Part,
    built: Artifact,
    store: Store,
    samples_folder: Path,
    *,
    batch: int,
    limits: Limits,
    seed: int,
    name: str | None = None,
    warm_up: WarmUp | None = None,
) -> IsolatedSession:
    """Open what an engine built, in a child process.

    Args:
        engine: The engine and its settings.
        built: What it built, in ``store``.
        store: Where the child finds it.
        samples_folder: What to feed it with (``Samples.save``).
        batch: Rows of a timed run.
        limits: Seconds a call, memory, and the processors it is pinned to (``cpus_for``).
        seed: Of the rows that are drawn for the feeds.
        name: What a comparison calls it; by default the engine's part, with the process id, which no other has.
        warm_up: The rule; that of ``WarmUp()`` by default.

    Raises:
        HastenError: as ``SessionWorker`` and ``Child.start`` say.
    """
    child = Child.start(
        "hasten.measure.worker:SessionWorker",
        limits=limits,
        engine=msgspec.json.encode(engine).decode(),
        artifact=built.digest,
        store=str(store.root),
        samples=str(samples_folder),
        batch=batch,
        seed=seed,
    )
    try:
        about = child.call("about").value
        return IsolatedSession(
            name=name or f"{engine} in process {child.pid}",
            child=child,
            signature=msgspec.convert(about["signature"], Signature),
            first_run_ns=float(about["first_run_ns"]),
            warm_up_rule=warm_up or WarmUp(),
        )
    except BaseException:
        child.close()
        raise


def cpus_for(threads: int) -> tuple[int, ...]:
    """Give the last ``threads`` of the processors that this process may use: the first ones serve interrupts.

    Raises:
        InvalidSetting: there are not so many.
    """
    usable = sorted(os.sched_getaffinity(0))
    if not 1 <= threads <= len(usable):
        raise InvalidSetting(f"{threads} threads cannot be pinned: this process may use {len(usable)} processors")
    return tuple(usable[-threads:])


def fixed_batch(signature: Signature) -> int | None:
    """Give the batch that a model is fixed at, or None where any will do.

    Raises:
        SignatureMismatch: its inputs want different ones.
    """
    lengths = {spec.shape[0] for spec in signature.inputs if spec.shape and isinstance(spec.shape[0], int)}
    if len(lengths) > 1:
        raise SignatureMismatch(f"the model's inputs have first axes of different lengths {sorted(lengths)}")
    return int(lengths.pop()) if lengths else None


def _feeds(samples: Samples, batch: int, seed: int) -> tuple[dict[str, Array], ...]:
    if batch < 1:
        raise InvalidSetting(f"batch = {batch}: a run takes one row at least")
    row_bytes = sum(array.nbytes // len(array) for array in samples.inputs.values())
    count = max(1, min(FEEDS, FEEDS_BYTES // max(1, row_bytes * batch)))
    drawn = np.random.default_rng(seed).permutation(len(samples))
    rows = np.resize(drawn, (count, batch))  # wraps around where there are too few
    return tuple(_take(samples, chosen) for chosen in rows)


def _take(samples: Samples, rows: Array) -> dict[str, Array]:
    return {name: np.ascontiguousarray(array[rows]) for name, array in samples.inputs.items()}


def _rows(name: str, value: Array, rows: Array, filled: Array) -> Array:
    """Check that an output has a row for each sample, and cut off those that only filled the batch up."""
    if value.ndim == 0 or len(value) != len(filled):
        raise Unsupported("measure", f"output {name!r} has shape {list(value.shape)} for a batch of {len(filled)}")
    return value[: len(rows)].astype(str) if value.dtype.kind == "O" else value[: len(rows)]
