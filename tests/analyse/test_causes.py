"""A cause that was planted is named; what cannot be known is not made up."""

from __future__ import annotations

import planted
import pytest

from hasten.analyse.causes import CAUSES, explain
from hasten.errors import InvalidSetting


@pytest.mark.parametrize("cause", sorted(planted.PLANTED))
def test_the_planted_cause_is_named_in_nine_of_ten_cases(cause: str) -> None:
    named = []
    for seed in range(10):
        run, host = planted.PLANTED[cause](seed)
        named.append(explain(run, host=host).main)
    assert named.count(cause) >= 9, named


def test_causes_have_shares_with_intervals_and_examples() -> None:
    run, host = planted.large_mates(0)
    found = explain(run, host=host)
    assert {one.cause for one in found.causes} >= {"large_batch_mate", "own_rows"}
    assert sum(one.requests for one in found.causes) == found.explained
    assert sum(one.lost_share for one in found.causes) == pytest.approx(1.0)
    for one in found.causes:
        assert one.cause in CAUSES
        assert one.share.low <= one.share.value <= one.share.high
        assert one.share.n == found.explained
        assert one.examples[0].response_ns > found.threshold_ns


def test_a_standstill_is_seen_without_the_servers_host_where_the_network_stood_still_with_it() -> None:
    run, _ = planted.stopped(0)
    assert explain(run).main == "throttled"


@pytest.mark.parametrize(("busy", "main"), [(1.0, "waited_for_instance"), (0.4, "throttled")])
def test_threads_that_wait_for_each_other_are_the_servers_own_load_and_for_others_are_not(
    busy: float, main: str
) -> None:
    run, _ = planted.crowded(0)
    seen = planted.host([], 60_000 * planted.MS, busy=busy, waits=0.9)
    assert explain(run, host=seen).main == main


def test_a_server_that_tells_nothing_is_not_accused_of_anything_particular() -> None:
    simulated = planted.simulate(planted.service(), planted.poisson(700, 3000, seed=0), seed=0)
    found = explain(planted.record(simulated, phases=False))
    assert found.main == "untold"


def test_only_requests_over_the_limit_are_explained() -> None:
    run, _ = planted.slow_network(0)
    found = explain(run, limit_ns=20e6)
    assert found.slow == int((run.requests.latency_ns > 20e6).sum())
    assert found.threshold_ns == 20e6


def test_a_run_in_which_nothing_was_over_the_limit_has_no_cause() -> None:
    run, _ = planted.slow_network(0)
    found = explain(run, limit_ns=1e12)
    assert found.causes == ()
    assert found.main is None


def test_a_limit_of_nothing_is_refused() -> None:
    run, _ = planted.slow_network(0)
    with pytest.raises(InvalidSetting, match="none"):
        explain(run, limit_ns=0.0)
