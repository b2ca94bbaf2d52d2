"""The simulation agrees with queueing theory where there is one, and does what the real batcher decides."""

from __future__ import annotations

import numpy as np
import planted
import pytest

from hasten.analyse.batch_costs import BatchCosts
from hasten.analyse.simulate import LATE, OK, REFUSED, Setup, closed, poisson, simulate
from hasten.deployment import Serving
from hasten.errors import InvalidSetting

MS = 1_000_000


def plain(*, sizes: tuple[int, ...] = (1,), each_ns: float = MS, outside_ns: float = 0.0, busy: int = 1) -> BatchCosts:
    return BatchCosts(
        sizes=sizes,
        busy_ns=tuple(tuple(each_ns * (1 + 0.25 * k) for _ in sizes) for k in range(busy)),
        residuals=np.ones(1),
        outside_ns=np.array([outside_ns]),
    )


@pytest.mark.parametrize("load", [0.3, 0.7])
def test_one_instance_without_batching_waits_as_a_queue_of_constant_service_does(load: float) -> None:
    """M/D/1: mean wait = rho / (2 (1 - rho)) services (Pollaczek, Khinchine)."""
    found = simulate(
        Setup(costs=plain(), instances=1, cores=1, sizes=(1,)), poisson(1000 * load, 40_000, seed=3), seed=0
    )
    assert found.queue_ns.mean() / MS == pytest.approx(load / (2 * (1 - load)), rel=0.06)


def test_two_instances_wait_as_a_queue_of_two_servers_does() -> None:
    """M/M/2 at rho = 0.6: Erlang's C is 0.45, the mean wait C / (2 (1 - rho)) services."""
    costs = BatchCosts(
        sizes=(1,),
        busy_ns=((MS,), (MS,)),
        residuals=np.random.default_rng(0).permutation(-np.log(1 - (np.arange(4000) + 0.5) / 4000)),
        outside_ns=np.zeros(1),
    )
    found = simulate(Setup(costs=costs, instances=2, cores=2, sizes=(1,)), poisson(1200, 40_000, seed=1), seed=0)
    assert found.queue_ns.mean() / MS == pytest.approx(0.45 / (2 * (1 - 0.6)), rel=0.08)


def test_instances_that_share_cores_slow_each_other() -> None:
    setup = Setup(costs=plain(busy=2), instances=2, cores=2, sizes=(1,))
    found = simulate(setup, closed(2, 2000), seed=0)
    assert np.median(found.infer_ns) == pytest.approx(1.25 * MS, rel=0.01)


def test_a_closed_loop_never_has_more_inside_than_its_clients() -> None:
    found = simulate(planted.service(), closed(4, 2000), seed=0)
    events = np.concatenate(
        [np.stack([found.due_ns, np.ones(2000)]), np.stack([found.done_ns, -np.ones(2000)])], axis=1
    )
    order = np.lexsort((events[1], events[0]))
    assert np.cumsum(events[1][order]).max() == 4
    assert found.batch_rows.max() <= 4


def test_batches_grow_with_the_load() -> None:
    few = simulate(planted.service(), poisson(200, 3000, seed=0), seed=0)
    many = simulate(planted.service(), poisson(1800, 3000, seed=0), seed=0)
    assert few.batch_rows.mean() < 1.2
    assert many.batch_rows.mean() > 4


def test_the_event_loops_work_bounds_what_a_tiny_model_carries() -> None:
    costs = BatchCosts(
        sizes=(1, 2, 4, 8), busy_ns=((1e3, 1e3, 1e3, 1e3),), residuals=np.ones(1), outside_ns=np.zeros(1), loop_ns=1e5
    )
    found = simulate(Setup(costs=costs, instances=1, cores=2, sizes=costs.sizes), closed(16, 4000), seed=0)
    assert 4000 / (found.done_ns.max() / 1e9) == pytest.approx(10_000, rel=0.02)


def test_work_of_the_event_loop_takes_time_from_a_run_where_no_core_is_left() -> None:
    alone = BatchCosts(sizes=(1,), busy_ns=((MS,),), residuals=np.ones(1), outside_ns=np.zeros(1), loop_ns=0.2 * MS)
    crowded = simulate(Setup(costs=alone, instances=1, cores=1, sizes=(1,)), closed(4, 1000), seed=0)
    roomy = simulate(Setup(costs=alone, instances=1, cores=2, sizes=(1,)), closed(4, 1000), seed=0)
    assert np.median(roomy.infer_ns) == MS
    assert np.median(crowded.infer_ns) == pytest.approx(1.2 * MS, rel=0.02)


def test_a_full_queue_refuses_as_the_real_one_does() -> None:
    setup = planted.service(serving=Serving(queue_rows=5))
    found = simulate(setup, poisson(20_000, 2000, seed=0), seed=0)
    assert (found.outcome == REFUSED).sum() > 1000
    assert ((found.outcome == OK) | (found.outcome == REFUSED)).all()


def test_requests_whose_time_is_over_end_as_late() -> None:
    setup = planted.service(serving=Serving(timeout_ms=5.0))
    found = simulate(setup, poisson(4000, 2000, seed=0), seed=0)
    inside = found.outcome == OK
    assert (found.outcome == LATE).any() or (found.outcome == REFUSED).any()
    assert (found.response_ns[inside] <= 5.5 * MS).all()


def test_a_request_beyond_the_largest_size_runs_in_pieces() -> None:
    setup = planted.service(largest=4)
    found = simulate(setup, poisson(10, 20, seed=0, rows=(10,)), seed=0)
    assert (found.outcome == OK).all()
    assert (found.done_ns - found.due_ns > 4 * MS).all()


def test_the_same_seed_gives_the_same_answer() -> None:
    arrivals = poisson(800, 2000, seed=4)
    one, two = (simulate(planted.service(), arrivals, seed=5) for _ in range(2))
    assert np.array_equal(one.done_ns, two.done_ns)


def test_a_service_without_instances_is_refused() -> None:
    with pytest.raises(InvalidSetting, match="1 or more"):
        Setup(costs=plain(), instances=0, cores=1, sizes=(1,))
