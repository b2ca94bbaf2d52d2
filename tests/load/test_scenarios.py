"""MLPerf's scenarios: how load arrives in each, their figures, and the rules that make them valid."""

from __future__ import annotations

import numpy as np
import pytest

from hasten.errors import InvalidSetting, UnknownName
from hasten.load.arrivals import Closed, Poisson, read_arrivals
from hasten.load.objective import read_objective
from hasten.load.scenarios import arrivals_for, batch_for, early_estimate_ns, judge, scenario_of
from hasten.measure.statistics import percentile_holds
from load.runs import ERROR, OK, run_of

MS = 1e6


@pytest.mark.parametrize(
    ("name", "asked", "line"),
    [
        ("single-stream", None, "closed:concurrency=1"),
        ("multi-stream", None, "closed:concurrency=1"),
        ("offline", None, "closed:concurrency=16"),
        ("offline", Closed(concurrency=4), "closed:concurrency=4"),
        ("server", Poisson(rate=50), "poisson:rate=50"),
    ],
)
def test_load_arrives_as_the_scenario_says(name: str, asked: object, line: str) -> None:
    assert str(arrivals_for(scenario_of(name), asked)) == line  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("server", None),
        ("server", "closed:concurrency=1"),
        ("offline", "poisson:rate=3"),
        ("single-stream", "poisson:rate=3"),
    ],
)
def test_arrivals_that_a_scenario_has_not_are_refused(name: str, line: str | None) -> None:
    with pytest.raises(InvalidSetting):
        arrivals_for(scenario_of(name), None if line is None else read_arrivals(line))


def test_a_query_of_several_streams_has_eight_samples() -> None:
    assert [batch_for(scenario_of(name), 1) for name in ("single-stream", "multi-stream", "offline")] == [1, 8, 1]
    assert batch_for(scenario_of("offline"), 32) == 32
    with pytest.raises(InvalidSetting, match="8 samples"):
        batch_for(scenario_of("multi-stream"), 4)


def test_an_unknown_scenario_names_the_nearest() -> None:
    with pytest.raises(UnknownName, match="did you mean 'offline'"):
        scenario_of("ofline")


@pytest.mark.parametrize(("n", "q"), [(64, 0.9), (1000, 0.9), (662, 0.99), (5000, 0.99)])
def test_the_early_estimate_is_the_least_time_that_is_proven(n: int, q: float) -> None:
    times = np.random.default_rng(n).lognormal(0, 1, n)
    found = early_estimate_ns(times, q)
    assert found is not None
    assert percentile_holds(n, int((times > found).sum()), q)
    below = float(np.sort(times)[np.searchsorted(np.sort(times), found) - 1])
    assert not percentile_holds(n, int((times > below).sum()), q)
    assert found >= np.quantile(times, q)


def test_too_few_queries_have_no_early_estimate() -> None:
    assert early_estimate_ns(np.ones(43), 0.9) is None
    assert early_estimate_ns(np.ones(44), 0.9) == 1


def test_a_run_that_keeps_every_rule_is_valid_and_a_short_one_is_not() -> None:
    long = run_of([5 * MS] * 61_000, gap_s=0.01, arrivals="closed:concurrency=1")
    assert judge(long, scenario_of("single-stream")).valid
    found = judge(run_of([5 * MS] * 1000), scenario_of("single-stream"))
    assert (found.value, found.valid) == (5 * MS, False)
    assert [rule.rule for rule in found.rules if not rule.kept] == ["at least 600 s"]


def test_the_servers_figure_is_its_rate_where_the_objective_is_proven() -> None:
    run = run_of([5 * MS] * 61_000, gap_s=0.01)
    found = judge(run, scenario_of("server"), read_objective("p99 <= 15ms"))
    assert (found.valid, found.value) == (True, pytest.approx(100))
    assert not judge(run, scenario_of("server"), read_objective("p99 <= 4ms")).valid
    with pytest.raises(InvalidSetting, match="objective"):
        judge(run, scenario_of("server"))


def test_an_objective_changes_no_figure_but_the_servers_which_has_its_own_percentile() -> None:
    run = run_of([5 * MS] * 61_000, gap_s=0.01, arrivals="closed:concurrency=1")
    plain, asked = (judge(run, scenario_of("single-stream"), slo) for slo in (None, read_objective("p99 <= 15ms")))
    assert asked == plain
    with pytest.raises(InvalidSetting, match="judged by its p99"):
        judge(run_of([5 * MS] * 61_000), scenario_of("server"), read_objective("p50 <= 15ms"))


def test_offline_counts_samples_and_wants_enough_of_them() -> None:
    run = run_of([5 * MS] * 61_000, gap_s=0.01)
    found = judge(run, scenario_of("offline"))
    assert (found.valid, found.value) == (True, pytest.approx(200, rel=0.01))
    few = judge(run_of([5 * MS] * 100, gap_s=10.0), scenario_of("offline"))
    assert [rule.rule for rule in few.rules if not rule.kept] == ["at least 24576 samples"]


def test_a_query_without_an_answer_makes_a_run_invalid() -> None:
    run = run_of([5 * MS] * 61_000, outcomes=[OK] * 60_999 + [ERROR], gap_s=0.01)
    assert not judge(run, scenario_of("single-stream")).valid
