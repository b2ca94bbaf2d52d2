"""The search for the highest rate: it brackets the true one, confirms it, and knows when it cannot."""

from __future__ import annotations

import numpy as np
import planted
import pytest

from hasten.analyse.capacity import Load, highest_rate
from hasten.analyse.highest_rate import Rules, Seen, find_highest_rate, judge
from hasten.analyse.simulate import poisson, simulate
from hasten.errors import InvalidSetting
from hasten.load.objective import Objective, read_objective

SETUP = planted.service()
LIMIT = read_objective("p99 <= 10ms")


def measure(rate: float, seconds: float, seed: int) -> Seen:
    arrivals = poisson(rate, max(int(rate * seconds), 1), seed=1000 + seed)
    return Seen(times_ns=simulate(SETUP, arrivals, seed=seed).response_ns)


@pytest.mark.parametrize("seed", [0, 100])
def test_it_finds_the_rate_at_which_the_service_breaks(seed: int) -> None:
    true = highest_rate(SETUP, LIMIT, Load(requests=8_000)).rate
    found = find_highest_rate(measure, LIMIT, bare_ns=SETUP.costs.bare_ns, rules=Rules(seed=seed))
    assert found.settled
    assert found.rate == pytest.approx(true, rel=0.12)
    assert found.fails_at is not None
    assert found.seconds < 180


def test_a_first_rate_that_is_told_saves_time() -> None:
    blind = find_highest_rate(measure, LIMIT, bare_ns=SETUP.costs.bare_ns, rules=Rules())
    told = find_highest_rate(measure, LIMIT, bare_ns=SETUP.costs.bare_ns, rules=Rules(first=1500.0))
    assert len(told.steps) < len(blind.steps)
    assert told.rate == pytest.approx(blind.rate, rel=0.1)


def test_an_objective_below_the_bare_time_is_refused_before_any_load() -> None:
    def never(rate: float, seconds: float, seed: int) -> Seen:
        raise AssertionError("load was sent")

    with pytest.raises(InvalidSetting, match=r"one request on the idle service takes 1\.2"):
        find_highest_rate(never, read_objective("p99 <= 1ms"), bare_ns=1.2e6)


def test_a_service_that_holds_at_no_rate_says_so() -> None:
    def slow(rate: float, seconds: float, seed: int) -> Seen:
        return Seen(times_ns=np.full(max(int(rate * seconds), 1), 50e6))

    found = find_highest_rate(slow, LIMIT, bare_ns=1e6, rules=Rules(budget_s=60))
    assert found.rate == 0.0
    assert found.why
    assert not found.settled


def test_a_late_generator_is_not_taken_for_the_service() -> None:
    def late(rate: float, seconds: float, seed: int) -> Seen:
        took = 50e6 if rate > 1000 else 1e6
        return Seen(times_ns=np.full(max(int(rate * seconds), 1), took), late=rate > 1000)

    found = find_highest_rate(late, LIMIT, bare_ns=1e6)
    assert found.rate == 1000
    assert "generator itself was late" in found.why
    assert next(step.word for step in found.steps if step.rate > 1000) == "late generator"


def test_what_holds_in_spite_of_a_late_generator_holds_and_more_is_not_claimed() -> None:
    def late(rate: float, seconds: float, seed: int) -> Seen:
        return Seen(times_ns=np.full(max(int(rate * seconds), 1), 1e6), late=rate > 1000)

    found = find_highest_rate(late, LIMIT, bare_ns=1e6)
    assert found.rate == 8000  # the third rate in a row at which it was late
    assert "more may hold" in found.why


def test_the_budget_bounds_the_search() -> None:
    found = find_highest_rate(measure, LIMIT, bare_ns=SETUP.costs.bare_ns, rules=Rules(budget_s=8.0))
    assert found.seconds <= 8.0 + Rules().most_s
    assert not found.settled


def test_crowds_of_slow_requests_prove_less_than_scattered_ones() -> None:
    scattered = np.full(3000, 1e6)
    scattered[::200] = 50e6
    crowd = np.full(3000, 1e6)
    crowd[1000:1015] = 50e6
    objective = Objective(q=0.99, limit_ns=10e6)
    assert judge(scattered, objective) == "holds"
    assert judge(crowd, objective) == "undecided"
