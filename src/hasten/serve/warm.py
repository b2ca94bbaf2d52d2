"""What is done to a model before it may answer: every allowed batch size run and timed, its answers checked."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from hasten.errors import BuildFailed, HastenError, Untrusted
from hasten.golden import Golden
from hasten.serve.batching import Batch, Entry
from hasten.serve.costs import CostCurve
from hasten.serve.joining import join, split
from hasten.serve.pace import Pace
from hasten.serve.runner import Clock, Runner
from hasten.tensors import DTYPES, Array, Feed, Signature, TensorSpec

TIMED_RUNS, MOST_RUNS, ENOUGH_NS = 3, 30, 20_000_000
"""Undisturbed runs of each size whose shortest is the first t(n); the first run is not counted. Where others disturb
them, there are no more than so many runs, or so many nanoseconds of them."""

DISTURBED, DISTURBED_NS = 1.25, 10_000
"""A run that took so many times its thread's own time, and this long, waited for the interpreter or a processor."""

OPEN_LENGTHS = (8, 1, 32, 224)
"""What a symbolic axis is tried with where no golden sample tells its length."""


@dataclass(frozen=True, kw_only=True)
class Warming:
    """How a model is warmed. ``axis`` is its batch axis, as ``intake.batch_axis`` gives it."""

    signature: Signature
    axis: str | int | None
    sizes: Sequence[int]
    golden: Golden | None
    precision: str
    clock_ns: Clock
    spent_ns: Clock = time.thread_time_ns
    """What the calling thread has computed."""
    pace: Pace = field(default_factory=Pace)
    """How the runs rest where requests are served meanwhile."""


@dataclass(frozen=True)
class Warm:
    """What warming found: t(n) in nanoseconds by size, and the probes with their answers."""

    costs: dict[int, int]
    probes: Feed
    answers: Feed
    least_ns: int
    """The shortest run of the largest size: what it takes where nobody interrupts it."""
    beside: bool = False
    """Requests were served meanwhile: no two runs followed each other closely, so the caches were cold."""


def warm(runner: Runner, warming: Warming) -> Warm:
    """Run and time every size, then check the golden answers.

    Raises:
        BuildFailed: it does not run, or its outputs do not have a row for each row.
        Untrusted: it does not give the golden answers, or gives what is not finite.
    """
    warming.pace.rest()  # the model was opened just now
    since_ns = warming.clock_ns()
    row = _probe(runner, warming)
    _rest(warming, since_ns)
    costs: dict[int, int] = {}
    for size in warming.sizes:
        feed = row if warming.axis is None else {n: np.repeat(a[:1], size, axis=0) for n, a in row.items()}
        costs[size] = _timed(runner, feed, size, warming)
    least_ns = costs[warming.sizes[-1]]
    for more, fewer in pairwise(reversed(warming.sizes)):
        costs[fewer] = min(costs[fewer], costs[more])  # fewer rows could run as more of them, with padding
    golden = warming.golden
    probes = row if golden is None else golden.inputs
    since_ns = warming.clock_ns()
    got = answers(runner, probes, warming)
    _rest(warming, since_ns)
    if golden is not None:
        precision = warming.precision if warming.precision in ("float16", "bfloat16") else None
        golden.check(got, precision=precision)
    return Warm(costs, probes, got, least_ns, beside=warming.pace.beside())


def _timed(runner: Runner, feed: Feed, size: int, warming: Warming) -> int:
    """Check the rows of one run, then give the time of an undisturbed one in nanoseconds, or of the least disturbed.

    A busy event loop takes the interpreter away in the middle of a run: that must not be what is learnt, or a version
    that is loaded under load would be taken for a slow one. Where another thread or process computes, a run cannot be
    told from one that waits, and the shortest of many counts.
    """
    since_ns = warming.clock_ns()
    _check_rows(runner.run(feed), size, warming)
    times: list[int] = []
    whole: list[int] = []
    wanted = 2 if warming.pace.beside() else TIMED_RUNS  # every run takes the interpreter from the requests
    while len(whole) < wanted and len(times) < MOST_RUNS:
        if len(times) >= TIMED_RUNS and sum(times) >= ENOUGH_NS:
            break
        spent, begun = warming.spent_ns(), warming.clock_ns()
        runner.run(feed)
        took = warming.clock_ns() - begun
        times.append(took)
        if took <= DISTURBED * (warming.spent_ns() - spent) + DISTURBED_NS:
            whole.append(took)
        if len(times) % TIMED_RUNS == 0:  # a run right behind another finds the caches warm
            since_ns = _rest(warming, since_ns)
    if len(times) % TIMED_RUNS:
        _rest(warming, since_ns)
    return min(whole or times)


def _rest(warming: Warming, since_ns: int) -> int:
    """Rest as what was done since then asks for; give the time."""
    warming.pace.rest((warming.clock_ns() - since_ns) / 1e9)
    return warming.clock_ns()


def answers(runner: Runner, feed: Feed, warming: Warming) -> dict[str, Array]:
    """Run ``feed`` [n, ...] in allowed sizes and give the outputs [n, ...]."""
    if warming.axis is None:
        return runner.run(feed)
    curve = CostCurve(warming.sizes)
    rows, parts = len(next(iter(feed.values()))), []
    for at in range(0, rows, curve.largest):
        some = {name: array[at : at + curve.largest] for name, array in feed.items()}
        n = min(curve.largest, rows - at)
        batch = Batch([Entry(some, n, key=None, arrived_ns=0)], n, curve.padded(n), 0)
        outputs = runner.run(join(batch, runner.buffer, copy=runner.copies))
        parts.append({name: np.array(array) for name, array in split(outputs, batch)[0].items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _probe(runner: Runner, warming: Warming) -> Feed:
    """Give one row that the model takes: of the golden samples, else seeded noise of the first shape that runs."""
    if warming.golden is not None:
        golden = warming.golden.inputs
        return golden if warming.axis is None else {name: array[:1] for name, array in golden.items()}
    rows = warming.axis if isinstance(warming.axis, int) else 1
    failed: HastenError | None = None
    for length in OPEN_LENGTHS:
        feed = {spec.name: _noise(spec, rows, length, warming.axis) for spec in warming.signature.inputs}
        try:
            runner.run(feed)
        except HastenError as error:
            failed = error
        else:
            return feed
    raise BuildFailed(
        "warm-up", f"it runs with none of the lengths {OPEN_LENGTHS} for its open axes ({failed}); add golden samples"
    )


def _noise(spec: TensorSpec, rows: int, length: int, axis: str | int | None) -> Array:
    shape = tuple(dim if isinstance(dim, int) else length for dim in spec.shape)
    if axis is not None:
        shape = (rows, *shape[1:])
    if spec.dtype == "string":
        return np.full(shape, "", object)
    if DTYPES[spec.dtype].kind in "biu":
        return np.zeros(shape, DTYPES[spec.dtype])  # 0 is an index of every table
    return np.random.default_rng(0).standard_normal(shape).astype(DTYPES[spec.dtype])


def _check_rows(outputs: Feed, size: int, warming: Warming) -> None:
    for spec in warming.signature.outputs:
        got = outputs[spec.name]
        if warming.axis is not None and (not got.ndim or len(got) != size):
            raise BuildFailed("warm-up", f"output {spec.name!r} has shape {list(got.shape)} for {size} rows")
        if got.dtype.kind == "f" and not np.isfinite(got).all():
            raise Untrusted(f"output {spec.name!r} is not finite on a probe; this model cannot be served")
