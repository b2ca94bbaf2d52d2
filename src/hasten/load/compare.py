"""Two services side by side: live, interleaved block by block under equal arrivals; or two recorded runs.

Ratios are of A over B for times and of B over A for throughput, so above 1 it is B that does better, as everywhere in
hasten. A percentile's ratio is of all requests; its interval is a bootstrap over blocks, never over single requests,
which resemble their neighbours. Blocks of live targets are drawn in pairs: what drifts, drifts for both. Two runs that
were recorded apart share nothing: their stretches are drawn each by themselves, and no interval holds what changed on
the machine between them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from hasten.errors import BadInput, Untrusted
from hasten.load.figures import span_of, times_of
from hasten.load.generate import OpenLoad
from hasten.load.recorder import OK, UNSENT
from hasten.load.run import LoadRun
from hasten.load.target import LoadPlan
from hasten.measure.statistics import RESAMPLES, across_launches, bootstrap_tail, quantile, runs_needed
from hasten.measurement import WIN, Ratio

FEWEST_BLOCKS = 6
STRETCHES = 20
"""Into so many a recorded run is cut."""
QUANTILES = {"p50": 0.5, "p99": 0.99}
PRECISION = 0.05
"""Half-width at which a ratio counts as settled."""

Floats = npt.NDArray[np.float64]
Better = Literal["A", "B", "EQUAL", "INCONCLUSIVE"]


@dataclass(frozen=True, kw_only=True)
class Block:
    """One stretch of one service: response times [n], infinite without a good answer; good answers a second."""

    times_ns: Floats
    rate: float


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One figure of both; above 1, B does better."""

    name: str
    a: float | None
    b: float | None
    """Nanoseconds, or answers a second; None: it cannot be told."""
    ratio: Ratio | None
    better: Better
    why: str = ""


@dataclass(frozen=True, kw_only=True)
class Sides:
    """What was measured of both, block by block. ``paired``: block k of both ran side by side."""

    a: tuple[Block, ...]
    b: tuple[Block, ...]
    paired: bool
    seed: int = 0


def run_sides(
    a: OpenLoad,
    b: OpenLoad,
    plan: LoadPlan,
    *,
    blocks: int,
    progress: Callable[[str, float | None], None] | None = None,
) -> tuple[Sides, tuple[list[LoadRun], list[LoadRun]]]:
    """Run both, ``blocks`` times ``plan``, in random order within each pair, with the same arrivals in both.

    Raises:
        BadInput: too few blocks, or a service that went away: its run was cut short.
    """
    if blocks < FEWEST_BLOCKS:
        raise BadInput(f"{blocks} blocks are too few for an interval; {FEWEST_BLOCKS} at least are needed")
    random = np.random.default_rng(plan.seed)
    runs: tuple[list[LoadRun], list[LoadRun]] = ([], [])
    for number in range(blocks):
        of_block = replace(plan, seed=plan.seed + number)
        for side in random.permutation(2).tolist():
            if progress is not None:
                progress(f"block {number + 1} of {blocks}, {'AB'[side]}", number / blocks)
            run = (a, b)[side].run(of_block)
            if run.cut_short is not None:
                raise BadInput(f"{'AB'[side]}, {run.url}, was cut short in block {number + 1}: {run.cut_short}")
            runs[side].append(run)
    sides = Sides(a=tuple(map(block_of, runs[0])), b=tuple(map(block_of, runs[1])), paired=True, seed=plan.seed)
    return sides, runs


def recorded_sides(a: LoadRun, b: LoadRun, *, seed: int = 0) -> Sides:
    """Cut two recorded runs into stretches. Raises BadInput: one has too few requests for that, or was cut short."""
    for name, run in (("A", a), ("B", b)):
        if run.cut_short is not None:
            raise BadInput(f"{name}, {run.url}, was cut short: {run.cut_short}; record it again")
    return Sides(a=stretches_of(a, "A"), b=stretches_of(b, "B"), paired=False, seed=seed)


def block_of(run: LoadRun) -> Block:
    """Give a whole run as one block."""
    requests = run.requests
    in_time = (requests.outcome == OK) & (requests.done_ns <= span_of(run) * 1e9)
    return Block(times_ns=times_of(run), rate=float(in_time.sum()) / span_of(run))


def stretches_of(run: LoadRun, name: str) -> tuple[Block, ...]:
    """Cut a run into stretches of equal time."""
    requests, span_ns = run.requests, span_of(run) * 1e9
    sent = requests.outcome != UNSENT
    if int(sent.sum()) < STRETCHES * 5:
        raise BadInput(f"{name} has {int(sent.sum())} requests; a comparison needs {STRETCHES * 5} at least")
    edges = np.linspace(0, span_ns, STRETCHES + 1)
    ok = requests.outcome == OK
    times, place = times_of(run), np.clip(np.searchsorted(edges, requests.scheduled_ns[sent], "right") - 1, 0, 19)
    done = np.histogram(requests.done_ns[ok], bins=edges)[0] / (span_ns / 1e9 / STRETCHES)
    return tuple(Block(times_ns=times[place == at], rate=float(done[at])) for at in range(STRETCHES))


def compared(sides: Sides) -> tuple[Compared, ...]:
    """Compare both: p50, p99, throughput, each with its 95 % interval and who does better."""
    found = [_compared_quantile(sides, name, q) for name, q in QUANTILES.items()]
    return (*found, _compared_rate(sides))


def _compared_quantile(sides: Sides, name: str, q: float) -> Compared:
    pools = [np.concatenate([block.times_ns for block in side]) for side in (sides.a, sides.b)]
    a, b = (quantile(pool, q) if len(pool) else math.inf for pool in pools)
    told_a, told_b = (value if math.isfinite(value) else None for value in (a, b))
    fewest = min(len(pool) for pool in pools)
    if fewest < runs_needed(q, 0):
        why = f"{fewest} requests; {runs_needed(q, 0)} are needed to claim it"
        return Compared(name=name, a=None, b=None, ratio=None, better="INCONCLUSIVE", why=why)
    if not math.isfinite(a) or not math.isfinite(b):
        who = "both have" if not (math.isfinite(a) or math.isfinite(b)) else f"{'B' if math.isfinite(a) else 'A'} has"
        return Compared(
            name=name, a=told_a, b=told_b, ratio=None, better="INCONCLUSIVE", why=f"{who} too many without an answer"
        )
    try:
        ratio = _ratio(sides, lambda one, other: math.log(_pooled(one, q)) - math.log(_pooled(other, q)))
    except Untrusted as error:
        return Compared(name=name, a=told_a, b=told_b, ratio=None, better="INCONCLUSIVE", why=str(error))
    return Compared(name=name, a=told_a, b=told_b, ratio=ratio, better=better_of(ratio))


def _compared_rate(sides: Sides) -> Compared:
    a, b = (float(np.mean([block.rate for block in side])) for side in (sides.a, sides.b))
    if not a or not b:
        why = "one of them gave no good answer"
        return Compared(name="throughput", a=a, b=b, ratio=None, better="INCONCLUSIVE", why=why)
    try:
        ratio = _ratio(sides, lambda one, other: math.log(_mean_rate(other) / _mean_rate(one)))
    except Untrusted as error:
        return Compared(name="throughput", a=a, b=b, ratio=None, better="INCONCLUSIVE", why=str(error))
    return Compared(name="throughput", a=a, b=b, ratio=ratio, better=better_of(ratio))


def better_of(ratio: Ratio) -> Better:
    """Say who does better: beyond doubt only where the whole interval is beyond 2 %."""
    if ratio.wins:
        return "B"
    if ratio.loses:
        return "A"
    return "EQUAL" if ratio.low >= 1 / WIN and ratio.high <= WIN else "INCONCLUSIVE"


Logs = Callable[[Sequence[Block], Sequence[Block]], float]


def _ratio(sides: Sides, log_ratio: Logs) -> Ratio:
    """Bootstrap a ratio over blocks. Raises Untrusted: so many draws have no finite ratio that it has no interval."""
    middle = log_ratio(sides.a, sides.b)
    random = np.random.default_rng(sides.seed)
    n_a, n_b = len(sides.a), len(sides.b)
    logs = []
    for _ in range(RESAMPLES // 2):
        first = random.integers(0, n_a, n_a)
        second = first if sides.paired else random.integers(0, n_b, n_b)
        logs.append(log_ratio([sides.a[k] for k in first], [sides.b[k] for k in second]))
    if not np.isfinite(logs).all():
        raise Untrusted("in some blocks too many requests had no good answer; a longer run would tell")
    tail = bootstrap_tail(min(n_a, n_b))
    low, high = np.quantile(logs, (tail, 1 - tail))
    low, high = min(low, middle), max(high, middle)
    settled = (math.exp(high) - math.exp(low)) / 2 <= PRECISION * math.exp(middle)
    found = Ratio(value=math.exp(middle), low=math.exp(low), high=math.exp(high), n=min(n_a, n_b), settled=settled)
    return across_launches(found)


def _pooled(blocks: Sequence[Block], q: float) -> float:
    """Give a percentile of all requests of some blocks; a block that is there twice counts twice."""
    return quantile(np.concatenate([block.times_ns for block in blocks]), q)


def _mean_rate(blocks: Sequence[Block]) -> float:
    return max(float(np.mean([block.rate for block in blocks])), 1e-9)
