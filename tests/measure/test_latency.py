"""When a model is warm, and what is said of its latency."""

import gc
import itertools

import numpy as np
import pytest

from hasten.errors import InvalidSetting, Untrusted
from hasten.measure.latency import WarmUp, latency_of, timed_runs, warm_up

MS = 1_000_000
RULE = WarmUp(min_runs=10, min_s=1.0, max_s=30.0, agree=0.02)


class Model:
    """Its runs take what the iterator says, in milliseconds; nobody waits for them."""

    def __init__(self, times_ms):
        self._times = iter(times_ms)
        self.runs = 0
        self.total_ms = 0.0

    def __call__(self):
        self.runs += 1
        taken = next(self._times)
        self.total_ms += taken
        return int(taken * MS)


def test_a_steady_model_is_warm_after_one_second():
    model = Model(itertools.repeat(10))
    assert warm_up(model, RULE)
    assert model.runs == 100


def test_a_slow_steady_model_is_warm_after_ten_runs():
    model = Model(itertools.repeat(400))
    assert warm_up(model, RULE)
    assert model.runs == 10


def test_a_model_that_gets_faster_is_warm_only_when_it_no_longer_does():
    falling = [100 * 0.97**i for i in range(100)]
    model = Model([*falling, *itertools.repeat(falling[-1], 1000)])
    assert warm_up(model, RULE)
    assert model.runs > 100


def test_a_model_that_never_settles_is_said_not_to_have():
    model = Model(10 * 1.01**i for i in itertools.count())
    assert not warm_up(model, RULE)
    assert 30_000 <= model.total_ms < 31_000


def test_one_slow_run_in_a_window_does_not_keep_a_model_cold():
    model = Model(itertools.cycle([10] * 30 + [200]))
    assert warm_up(model, RULE)


def test_a_model_whose_runs_take_a_minute_ends_its_warm_up_with_the_first():
    model = Model(itertools.repeat(60_000))
    assert not warm_up(model, RULE)
    assert model.runs == 1


def test_a_shorter_rule_is_kept():
    model = Model(itertools.repeat(10))
    assert warm_up(model, WarmUp(min_runs=4, min_s=0.1, max_s=1))
    assert model.runs == 10


@pytest.mark.parametrize("wrong", [{"min_runs": 1}, {"min_s": -1}, {"min_s": 2, "max_s": 1}])
def test_an_impossible_rule_is_refused(wrong):
    with pytest.raises(InvalidSetting):
        WarmUp(**wrong)


def test_a_slice_runs_once_even_without_time():
    assert len(timed_runs(lambda: None, 0)) == 1


def test_a_slice_runs_without_garbage_collection_and_restores_it():
    seen = []
    timed_runs(lambda: seen.append(gc.isenabled()), 0.001)
    assert seen
    assert not any(seen)
    assert gc.isenabled()


def test_latency_holds_the_median_of_each_slice_in_order():
    slices = [np.array([1, 2, 9]), np.array([5]), np.array([3, 4])]
    latency = latency_of(slices, first_run_ns=70, settled=True)
    assert latency.slices_ns == (2, 5, 3.5)
    assert (latency.median_ns, latency.runs, latency.first_run_ns, latency.settled) == (3.5, 6, 70, True)
    assert latency.misses is None


@pytest.mark.parametrize(("runs", "p90", "p99"), [(43, None, None), (44, 40, None), (458, 413, None), (459, 414, 455)])
def test_a_percentile_is_told_only_of_enough_runs(runs, p90, p99):
    latency = latency_of([np.arange(1, runs + 1)], first_run_ns=0, settled=True)
    assert (latency.p90_ns, latency.p99_ns) == (p90, p99)


def test_runs_over_the_limit_are_misses():
    assert latency_of([np.array([9, 10, 11, 12])], first_run_ns=0, settled=True, limit_ns=10).misses == 2


def test_no_runs_are_no_latency():
    with pytest.raises(Untrusted):
        latency_of([np.array([], np.int64)], first_run_ns=0, settled=True)
