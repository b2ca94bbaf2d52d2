"""Compare two or more contenders, interleaved block by block, so that what drifts on the machine drifts for all."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from hasten.errors import HastenError, InvalidSetting, UnknownName, Untrusted
from hasten.isolation import Progress
from hasten.measure.latency import Nanoseconds, latency_of, medians_of
from hasten.measure.statistics import across_launches, bootstrap_ratio
from hasten.measurement import WIN, Latency, Ratio

FEWEST_BLOCKS = 2
"""Run even where the budget is too small for them: one block has no interval."""

LOOK_GROWTH = 1.25
"""Blocks between two looks at the intervals grow so: who looks after every block stops at the luckiest one."""

CERTAINTY = 2.0
"""A screening is decided when the interval, so many times as wide, is clear of the threshold: 4 standard errors."""

Stopped = Literal["precise", "decided", "asked", "budget", "failed"]


class Contender(Protocol):
    """Something to be timed: ``IsolatedSession``, or anything that does the same."""

    @property
    def name(self) -> str:
        """What the comparison calls it; no two may have the same."""

    @property
    def first_run_ns(self) -> float:
        """Time of the very first run after loading."""

    def warm_up(self) -> bool:
        """Run until warm. False: it never settled."""

    def slice(self, seconds: float) -> Nanoseconds:
        """Run for ``seconds``, at least once, and give the time of each run in nanoseconds, [runs]."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What a comparison saw: ``slices[name][block]`` holds the times of single runs in nanoseconds, [runs]."""

    names: tuple[str, ...]
    slices: Mapping[str, tuple[Nanoseconds, ...]]
    first_run_ns: Mapping[str, float]
    settled: Mapping[str, bool]
    """Whether each contender's warm-up settled."""
    failures: Mapping[str, HastenError]
    """The contenders that dropped out, and why."""
    precision: float
    seed: int
    seconds: float
    """How long the blocks took."""
    stopped: Stopped | None
    """Why it ended; None while it runs."""

    def medians_ns(self, name: str) -> tuple[float, ...]:
        """Give a contender's median in each block."""
        return medians_of(self._of(name))

    def ratio(self, baseline: str, candidate: str) -> Ratio:
        """Give time of the baseline over time of the candidate: above 1, the candidate is faster.

        Raises:
            HastenError: one of them dropped out; the error is its own. Untrusted: fewer than two blocks.
        """
        for name in (baseline, candidate):
            if name in self.failures:
                raise self.failures[name]
        slow, fast = np.array(self.medians_ns(baseline)), np.array(self.medians_ns(candidate))  # [blocks] each
        with np.errstate(divide="ignore", invalid="ignore"):  # a time of zero is told below as what it is
            logs = np.log(slow / fast)
        ratio = bootstrap_ratio(logs, seed=self.seed, asked=self.precision)
        return ratio if baseline == candidate else across_launches(ratio)

    def latency(self, name: str, *, limit_ns: float | None = None) -> Latency:
        """Describe a contender's single runs; those over ``limit_ns`` are counted as misses.

        Raises:
            HastenError: it dropped out; the error is its own.
        """
        slices = self._of(name)
        if name in self.failures:
            raise self.failures[name]
        return latency_of(slices, first_run_ns=self.first_run_ns[name], settled=self.settled[name], limit_ns=limit_ns)

    def _of(self, name: str) -> tuple[Nanoseconds, ...]:
        if name not in self.slices:
            raise UnknownName("contender", name, self.slices)
        return self.slices[name]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """When a comparison ends. ``over``: the contenders whose ratio to every other must be known."""

    precision: float
    budget_s: float
    min_blocks: int
    over: tuple[str, ...]
    decide: bool
    stop_when: Callable[[Comparison], bool] | None

    def reached(self, state: Comparison) -> Stopped | None:
        """Say whether every wanted ratio is known well enough, and how; None: not yet."""
        wanted = [
            state.ratio(base, name)
            for base in self.over
            for name in state.names
            if name != base and not {base, name} & state.failures.keys()
        ]
        if all(ratio.settled for ratio in wanted):
            return "precise"
        if self.decide and all(ratio.settled or is_decided(ratio) for ratio in wanted):
            return "decided"
        return None


def compare(
    contenders: Sequence[Contender],
    *,
    budget_s: float,
    precision: float = 0.01,
    min_blocks: int = 10,
    slice_s: float = 0.2,
    seed: int = 0,
    over: Sequence[str] | None = None,
    decide: bool = False,
    stop_when: Callable[[Comparison], bool] | None = None,
    clock: Callable[[], float] = time.monotonic,
    progress: Progress | None = None,
) -> Comparison:
    """Warm every contender up, then time all of them in each block, in random order, until enough is known.

    A contender that raises a ``HastenError`` is recorded in ``failures``, and the others go on.

    Args:
        contenders: At least one, each with its own name.
        budget_s: Seconds for the blocks, without the warm-up. No block is begun that would probably end later;
            but ``FEWEST_BLOCKS`` are always run.
        precision: Half-width of a ratio's interval, as a share of the ratio, at which it is settled.
        min_blocks: Blocks before the intervals are looked at, unless the budget ends first.
        slice_s: Seconds of each contender's turn in a block; one run at least, however long it takes.
        seed: Of the order in the blocks, and of the bootstrap.
        over: Names of the baselines; the first contender by default.
        decide: Stop as well where a ratio is clear of 1.02, above or below, in a way that will not turn.
        stop_when: Asked after each block; True ends the comparison.
        clock: Gives seconds.
        progress: Told of each block, with the share of the budget that is spent.

    Raises:
        InvalidSetting: no contender, two of one name, or numbers that cannot be. UnknownName: of ``over``.
    """
    names = tuple(contender.name for contender in contenders)
    bases = tuple(over) if over is not None else names[:1]
    _check(names, bases, budget_s=budget_s, precision=precision, min_blocks=min_blocks, slice_s=slice_s)
    rule = Rule(
        precision=precision,
        budget_s=budget_s,
        min_blocks=min_blocks,
        over=bases,
        decide=decide,
        stop_when=stop_when,
    )
    race = _Race(contenders, rule=rule, seed=seed, clock=clock)
    race.warm_up(progress)
    return race.run(slice_s, progress)


def is_decided(ratio: Ratio) -> bool:
    """Say whether a ratio's interval, ``CERTAINTY`` times as wide, lies wholly on one side of ``WIN``."""
    low = ratio.value - (ratio.value - ratio.low) * CERTAINTY
    high = ratio.value + (ratio.high - ratio.value) * CERTAINTY
    return low > WIN or high < WIN


class _Race:
    """A comparison while it runs."""

    def __init__(self, contenders: Sequence[Contender], *, rule: Rule, seed: int, clock: Callable[[], float]) -> None:
        self._rule = rule
        self._clock = clock
        self._seed = seed
        self._random = np.random.default_rng(seed)
        self._running = {contender.name: contender for contender in contenders}
        self._slices: dict[str, list[Nanoseconds]] = {name: [] for name in self._running}
        self._first: dict[str, float] = {}
        self._settled: dict[str, bool] = {}
        self._failures: dict[str, HastenError] = {}
        self._seconds = 0.0

    def warm_up(self, progress: Progress | None) -> None:
        for name, contender in list(self._running.items()):
            if progress:
                progress(f"warming up {name}", 0.0)
            try:
                self._settled[name] = contender.warm_up()
                self._first[name] = float(contender.first_run_ns)
            except HastenError as error:
                self._drop(name, error)

    def run(self, slice_s: float, progress: Progress | None) -> Comparison:
        start = self._clock()
        block, next_look, longest_s = 0, max(self._rule.min_blocks, FEWEST_BLOCKS), 0.0
        while self._running:
            self._block(slice_s)
            block += 1
            spent = self._clock() - start
            longest_s, self._seconds = max(longest_s, spent - self._seconds), spent
            if progress:
                progress(f"comparing, block {block}", min(1.0, spent / self._rule.budget_s))
            state = self.state(None)
            if self._rule.stop_when is not None and self._rule.stop_when(state):
                return self.state("asked")
            if block >= next_look and self._running:
                if (reason := self._rule.reached(state)) is not None:
                    return self.state(reason)
                next_look = math.ceil(block * LOOK_GROWTH)
            if block >= FEWEST_BLOCKS and spent + longest_s > self._rule.budget_s:
                return self.state("budget")
        return self.state("failed")

    def state(self, stopped: Stopped | None) -> Comparison:
        return Comparison(
            names=tuple(self._slices),
            slices={name: tuple(slices) for name, slices in self._slices.items()},
            first_run_ns=dict(self._first),
            settled=dict(self._settled),
            failures=dict(self._failures),
            precision=self._rule.precision,
            seed=self._seed,
            seconds=self._seconds,
            stopped=stopped,
        )

    def _block(self, slice_s: float) -> None:
        names = list(self._running)
        for index in self._random.permutation(len(names)):
            name = names[index]
            try:
                times = self._running[name].slice(slice_s)
                if not len(times):
                    raise Untrusted(f"{name} timed no run in a slice of {slice_s} s")
            except HastenError as error:
                self._drop(name, error)
            else:
                self._slices[name].append(times)

    def _drop(self, name: str, error: HastenError) -> None:
        self._failures[name] = error
        del self._running[name]


def _check(
    names: tuple[str, ...],
    bases: tuple[str, ...],
    *,
    budget_s: float,
    precision: float,
    min_blocks: int,
    slice_s: float,
) -> None:
    if not names or len(set(names)) < len(names):
        raise InvalidSetting(f"a comparison needs contenders with names of their own; got {list(names)}")
    for base in bases:
        if base not in names:
            raise UnknownName("contender", base, names)
    if min(budget_s, precision, slice_s) <= 0 or min_blocks < 1:
        raise InvalidSetting(
            f"budget_s = {budget_s}, precision = {precision} and slice_s = {slice_s} must be above 0, "
            f"and min_blocks = {min_blocks} at least 1"
        )
