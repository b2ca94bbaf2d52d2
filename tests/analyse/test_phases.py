"""The parts of a response add up to it, to the nanosecond, and their shares to one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import planted
import pytest

from hasten.analyse.phases import PARTS, bands, join_phases
from hasten.analyse.server_runs import server_runs
from hasten.errors import BadInput
from hasten.load.run import OUTCOMES


def test_the_parts_of_every_request_add_up_to_the_clients_response() -> None:
    run, _ = planted.late_client(0)
    joined = join_phases(run)
    assert np.array_equal(joined.response_ns, run.requests.latency_ns[joined.row])
    assert joined.parts_ns.shape[1] == len(PARTS)


def test_shares_at_each_quantile_add_up_to_one_and_means_to_the_response() -> None:
    run, _ = planted.slow_network(0)
    for band in bands(join_phases(run)):
        assert sum(share.share for share in band.shares) == pytest.approx(1.0)
        assert sum(share.mean_ns.value for share in band.shares) == pytest.approx(band.response_ns)
        assert all(share.mean_ns.n == band.n for share in band.shares)
        assert all(0 <= share.mean_ns.low <= share.mean_ns.value for share in band.shares), "no time is below nothing"


def test_a_band_around_the_99th_percentile_needs_five_requests() -> None:
    simulated = planted.simulate(planted.service(), planted.poisson(100, 300, seed=0), seed=0)
    assert [band.q for band in bands(join_phases(planted.record(simulated)))] == [0.5]


def test_a_server_that_tells_nothing_leaves_one_part_for_itself_and_the_way() -> None:
    simulated = planted.simulate(planted.service(), planted.poisson(100, 1000, seed=0), seed=0)
    joined = join_phases(planted.record(simulated, phases=False))
    assert joined.told == ("issue_delay", "transfer", "transfer_back")
    assert np.array_equal(joined.response_ns, simulated.done_ns - simulated.due_ns)


def test_phases_longer_than_the_clients_wait_are_told() -> None:
    run, _ = planted.slow_network(0)
    run.requests.phases_ns[10, 5] += 10 * run.requests.latency_ns[10]
    assert join_phases(run).unfitting > 5


def test_a_run_without_an_answer_has_no_phases() -> None:
    run, _ = planted.slow_network(0)
    run.requests.outcome[:] = OUTCOMES.index("error")
    with pytest.raises(BadInput, match="none of the 3000 requests"):
        join_phases(run)


def test_requests_of_one_batch_are_found_to_be_one_run() -> None:
    costs = replace(planted.costs(), residuals=np.exp(np.random.default_rng(0).normal(0, 0.03, 100_000)))
    setup = replace(planted.service(), costs=costs)
    simulated = planted.simulate(setup, planted.poisson(1500, 3000, seed=0), seed=0)
    run = planted.record(simulated)
    runs = server_runs(run, join_phases(run))
    assert runs is not None
    together = np.unique(np.column_stack([simulated.infer_ns, simulated.batch_rows]), axis=0)
    assert len(runs.start_ns) == pytest.approx(len(together), rel=0.005)  # two runs in a thousand are equal by chance
    assert (runs.batch_rows[runs.run_of] == simulated.batch_rows).all()
    assert (np.diff(runs.start_ns) >= 0).all()
