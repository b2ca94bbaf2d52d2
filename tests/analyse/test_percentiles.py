"""Percentiles carry intervals that cover, counts that know about queues, and reasons where there are none."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.errors import BadInput
from hasten.measure.percentiles import effective_count, percentile, percentiles, quantile_interval


def test_a_percentile_that_has_too_few_requests_says_how_many_it_needs() -> None:
    found = percentile(np.arange(1, 401, dtype=float), 0.99)
    assert found.value_ns is None
    assert found.why == "400 requests; 459 are needed to claim it"


def test_requests_without_an_answer_are_slower_than_any() -> None:
    times = np.concatenate([np.full(990, 5.0), np.full(20, np.inf)])
    p50, p99 = percentiles(times, (0.5, 0.99))
    assert p50.value_ns == 5.0
    assert p99.value_ns is None
    assert p99.why == "20 of 1010 requests got no answer"


def test_an_interval_that_reaches_into_lost_requests_has_no_upper_end() -> None:
    times = np.random.default_rng(0).permutation(np.concatenate([np.linspace(1, 2, 995), np.full(5, np.inf)]))
    found = percentile(times, 0.99)
    assert found.value_ns is not None
    assert found.high_ns is None


@pytest.mark.parametrize("q", [0.5, 0.9, 0.99])
def test_intervals_of_independent_times_cover_the_true_percentile_about_as_often_as_they_say(q: float) -> None:
    random = np.random.default_rng(1)
    true = -np.log(1 - q)
    covered = 0
    for _ in range(300):
        found = percentile(random.exponential(1.0, 1000), q)
        assert found.low_ns is not None
        covered += found.low_ns <= true and (found.high_ns is None or true <= found.high_ns)
    assert covered >= 276  # 95 % of 300 is 285; 276 and fewer come in one of a hundred repeats


def test_intervals_in_a_queue_cover_where_those_for_independent_times_do_not() -> None:
    """An autoregressive course: neighbours resemble each other with 0.95."""
    covered = naive = 0
    for seed in range(200):
        times = np.exp(_course(2000, seed))
        found = percentile(times, 0.5)
        assert found.low_ns is not None
        assert found.high_ns is not None
        covered += found.low_ns <= 1.0 <= found.high_ns
        places = quantile_interval(2000, 0.5)
        assert places is not None
        assert places[1] is not None
        ordered = np.sort(times)
        naive += ordered[places[0] - 1] <= 1.0 <= ordered[places[1] - 1]
    assert covered >= 170
    assert naive <= 100


def _course(n: int, seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).standard_normal(n)
    found = np.empty(n)
    value = noise[0]
    for k in range(n):
        value = 0.95 * value + np.sqrt(1 - 0.95**2) * noise[k]
        found[k] = value
    return found


def test_independent_requests_keep_their_count() -> None:
    counts = [effective_count(np.random.default_rng(seed).random(3000) > 0.9, 0.1) for seed in range(40)]
    assert np.median(counts) == 3000


def test_slow_requests_that_come_in_crowds_count_for_few() -> None:
    slow = np.zeros(3000, bool)
    slow[1000:1300] = True
    assert effective_count(slow, 0.1) < 100


def test_a_run_without_requests_is_an_error() -> None:
    with pytest.raises(BadInput, match="no request was due"):
        percentiles(np.empty(0))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(1, 1e9), min_size=8, max_size=600), st.sampled_from([0.5, 0.9, 0.99]))
def test_an_interval_encloses_its_percentile(times: list[float], q: float) -> None:
    found = percentile(np.array(times), q)
    if found.value_ns is None:
        assert found.why
        return
    assert found.low_ns is None or found.low_ns <= found.value_ns
    assert found.high_ns is None or found.value_ns <= found.high_ns
