"""The highest rate that a service carries under an objective, by measurement: doubling, bisection, confirmation.

A rate holds when so few responses were over the limit that chance explains it in one of a hundred repeats at most, and
fails by the same test turned (``measure.statistics``). In a queue slow responses come in crowds, so the counts are
first divided by how much neighbours resemble each other. A rate that can be called neither in its time is undecided,
and the search goes on as if it failed. What was found is confirmed with other arrivals, and gives way until it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from hasten.errors import BadInput, InvalidSetting
from hasten.isolation import Progress
from hasten.load.figures import State, judged
from hasten.load.objective import Objective
from hasten.measure.statistics import runs_needed

Floats = npt.NDArray[np.float64]

Word = Literal["holds", "fails", "undecided", "late generator"]

WORDS: dict[State, Word] = {"MEETS": "holds", "MISSES": "fails"}

FIRST_SHARE = 0.25
"""The search begins at this share of the rate that single requests, one after the other, would give."""

STEP = 1.25
"""Where a first rate is told, it is near: it is gone up or down from by so much."""

MOST_RATE = 1e6

LATE_AT_MOST = 3
"""Runs of one rate, or rates in a row, with a late generator, before it is held to be at its end."""

CONFIRMATIONS = 3

BACK_OFF = 0.96
"""A rate that is not confirmed gives way to this share of it."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What one run of load gave: response times [n] in order of arrival, infinite where no answer came.

    ``late``: the generator itself was late, so it says nothing of the service.
    """

    times_ns: Floats
    late: bool = False


Measure = Callable[[float, float, int], Seen]
"""(rate, seconds, seed): send that load, and say what came."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How the search goes. ``least_s`` lets a queue that grows be seen; ``most_s`` bounds one rate's run."""

    budget_s: float = 150.0
    least_s: float = 2.0
    most_s: float = 20.0
    precision: float = 0.05
    first: float | None = None
    """The rate to begin with, where something is known; None: a quarter of what single requests would give."""
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Step:
    """One rate that was tried: how many responses, how many over the limit, and what that proves."""

    rate: float
    seconds: float
    seed: int
    n: int
    misses: int
    value_ns: float | None
    """The objective's percentile in this run, whether or not it can be claimed."""
    word: Word


@dataclass(frozen=True, kw_only=True)
class Found:
    """The highest rate that was seen to hold, requests a second; 0: none was. ``fails_at``: the lowest that failed.

    ``confirmed`` counts the runs with other arrivals that held, of ``CONFIRMATIONS``.
    """

    objective: Objective
    rate: float
    fails_at: float | None
    confirmed: int
    bare_ns: float
    seconds: float
    steps: tuple[Step, ...]
    why: str = ""

    @property
    def settled(self) -> bool:
        """Every confirmation held."""
        return self.confirmed == CONFIRMATIONS


def check_objective(objective: Objective, bare_ns: float) -> None:
    """Refuse an objective that no load at all could meet.

    Raises:
        InvalidSetting: a single request on an idle service takes longer.
    """
    if bare_ns > objective.limit_ns:
        raise InvalidSetting(
            f"the objective {objective} cannot be met: one request on the idle service takes {bare_ns / 1e6:.2f} ms "
            "already; allow more than that"
        )


def find_highest_rate(
    measure: Measure,
    objective: Objective,
    *,
    bare_ns: float,
    rules: Rules | None = None,
    progress: Progress | None = None,
) -> Found:
    """Search for the highest rate under ``objective``.

    Args:
        measure: Sends load.
        objective: What has to hold.
        bare_ns: Time of one request on the idle service.
        rules: How to search.
        progress: Told what is being tried, and the share of the budget that is spent.

    Raises:
        InvalidSetting: the objective is below the bare time: said before any load. BadInput: no response came at all.
    """
    check_objective(objective, bare_ns)
    search = _Search(measure, objective, rules or Rules(), progress)
    search.bracket(search.rules.first or FIRST_SHARE * 1e9 / bare_ns)
    search.bisect()
    confirmed = search.confirm()
    return Found(
        objective=objective,
        rate=search.low,
        fails_at=None if math.isinf(search.high) else search.high,
        confirmed=confirmed,
        bare_ns=bare_ns,
        seconds=search.spent_s,
        steps=tuple(search.steps),
        why=search.why,
    )


def judge(times_ns: Floats, objective: Objective) -> Word:
    """Say what the responses [n], in order of arrival, prove."""
    return WORDS.get(judged(times_ns, objective, None).state, "undecided")


class _Search:
    def __init__(self, measure: Measure, objective: Objective, rules: Rules, progress: Progress | None) -> None:
        self.measure, self.objective, self.rules, self.progress = measure, objective, rules, progress
        self.low, self.high = 0.0, math.inf
        self.spent_s = 0.0
        self.steps: list[Step] = []
        self.why = ""
        self.late = False
        self.seed = rules.seed

    def bracket(self, first: float) -> None:
        """Double from ``first`` until a rate fails, or halve until one holds."""
        rate, late = first, 0
        while self.left() and math.isinf(self.high):
            if rate > MOST_RATE:
                self.why = f"{rate:.4g}/s was not tried: no generator here sends so many"
                return
            if self.try_rate(rate) == "holds":
                late = late + 1 if self.late else 0
                if late == LATE_AT_MOST:
                    self.why = f"the generator itself was late at {rate:.4g}/s, which holds all the same: more may hold"
                    return
                rate *= 2 if self.rules.first is None else STEP
            elif self.steps[-1].word == "late generator" and self.low:
                self.why = f"the generator itself was late at {rate:.4g}/s: more may hold"
                return
        while self.left() and not self.low and self.high > first / 1000:
            self.try_rate(self.high / (2 if self.rules.first is None else STEP))

    def bisect(self) -> None:
        """Narrow it down."""
        while self.left() and self.low and self.high - self.low > self.rules.precision * self.low:
            if math.isinf(self.high):
                return
            self.try_rate(math.sqrt(self.low * self.high))

    def confirm(self) -> int:
        """Try what was found with other arrivals; give how many of them held."""
        while self.low:
            held = 0
            for _ in range(CONFIRMATIONS):
                if not self.left():
                    self.why = self.why or f"the {self.rules.budget_s:g} s were over before it was confirmed"
                    return held
                rate = self.low
                if self.try_rate(rate) != "holds":
                    self.low = rate * BACK_OFF
                    break
                held += 1
            if held == CONFIRMATIONS:
                return held
        self.why = self.why or "no rate that was tried held"
        return 0

    def left(self) -> bool:
        return self.spent_s < self.rules.budget_s

    def try_rate(self, rate: float) -> Word:
        """Send a rate until the test decides or its time is over."""
        rules, objective = self.rules, self.objective
        needed_s = 1.2 * runs_needed(objective.q, 0) / rate
        seconds = min(max(rules.least_s, 20 * objective.limit_ns / 1e9, needed_s), rules.most_s)
        parts: list[Floats] = []
        late: list[Floats] = []
        spent, word = 0.0, "undecided"
        while word == "undecided" and spent < rules.most_s and self.left():
            self.tell(f"{rate:.4g} requests/s")
            self.seed += 1
            seen = self.measure(rate, seconds, self.seed)
            spent += seconds
            self.spent_s += seconds
            self.late = seen.late
            word = judge(np.concatenate([*parts, seen.times_ns]), objective)
            if seen.late and word != "holds":  # what holds in spite of its delay, which counts as the service's, holds
                late.append(seen.times_ns)  # whatever disturbed it may be over: it is sent again
                word = "late generator" if len(late) >= LATE_AT_MOST else "undecided"
            else:
                parts.append(seen.times_ns)
        if not parts and late:
            word = "late generator"
        times = np.concatenate(parts or late) if parts or late else np.empty(0)
        self.note(rate, spent, times, word)
        return self.steps[-1].word

    def note(self, rate: float, spent_s: float, times: Floats, word: str) -> None:
        if not len(times):
            raise BadInput(f"no request was due in {spent_s:g} s at {rate:.4g}/s; allow more time")
        value = float(np.quantile(times, self.objective.q, method="inverted_cdf"))
        words: dict[str, Word] = {"holds": "holds", "fails": "fails", "late generator": "late generator"}
        step = Step(
            rate=rate,
            seconds=spent_s,
            seed=self.seed,
            n=len(times),
            misses=int((times > self.objective.limit_ns).sum()),
            value_ns=None if math.isinf(value) else value,
            word=words.get(word, "undecided"),
        )
        self.steps.append(step)
        if step.word == "holds":
            self.low = max(self.low, rate)
        else:
            self.high = min(self.high, rate)
        if self.low > self.high:  # a lower rate failed after a higher one had held: chance, so the lower one stands
            self.low = self.high * BACK_OFF

    def tell(self, text: str) -> None:
        if self.progress is not None:
            self.progress(text, min(self.spent_s / self.rules.budget_s, 1.0))
