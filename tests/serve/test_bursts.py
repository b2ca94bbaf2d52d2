"""Reading in bursts while a model is behind: who yields, since when, and that nobody inherits it."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from hasten.deployment import Serving
from hasten.errors import DeadlineExceeded, ModelNotReady
from hasten.protocol.messages import InferResponse
from hasten.serve import scheduling
from hasten.serve.app import Listening, Open, serve
from hasten.serve.bursts import LONGEST_SLICE_NS, TICK_NS, Bursts, lengthen_slices, never, thread_yields
from hasten.serve.repository import open_repository
from hasten.serve.scheduling import slice_ns
from hasten.serve.service import Service
from hasten.serve.step_threads import StepThreads
from hasten.serve.turns import Turns
from serve import faulty
from serve.bundles import bundle, request, rows, run
from serve.faulty import HANGS
from serve.served import served

batch_only = pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="this system has no SCHED_BATCH")


def yielding(told: list[int], *, works: bool = True) -> Callable[[int], int]:
    def yields(slice_ns: int) -> int:
        told.append(slice_ns)
        return 2 * slice_ns if works else 0

    return yields


def as_usual() -> None:
    """Whoever runs the tests may have given them another policy."""
    try:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    except OSError:
        pytest.skip("this sandbox forbids to set a policy")


def in_a_thread(work: Callable[[], object]) -> object:
    """What a policy is set for must not be the thread that the tests run in."""
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(work).result()


def test_the_thread_yields_from_the_first_model_that_is_behind_to_the_last_that_catches_up() -> None:
    told: list[int] = []
    turns = Turns()
    bursts = Bursts(turns, yielding(told))
    bursts.begin(5)
    bursts.begin(5)
    bursts.end(5)
    assert (told, turns.unseen_ns) == ([5], 10)
    bursts.end(5)
    assert (told, turns.unseen_ns) == ([5, 0], 0)


def test_it_yields_for_as_long_as_the_most_pressed_of_the_models_that_are_behind_can_afford() -> None:
    told: list[int] = []
    bursts = Bursts(Turns(), yielding(told))
    for wanted_ns in (5, 3, 4):
        bursts.begin(wanted_ns)
    for wanted_ns in (4, 3, 5):
        bursts.end(wanted_ns)
    assert told == [5, 3, 5, 0]
    bursts.begin(2)
    with bursts.paused():
        assert told.pop() == 0
    assert told == [5, 3, 5, 0, 2, 2]


def test_where_the_system_forbids_it_nothing_is_assumed_to_have_waited() -> None:
    told: list[int] = []
    turns = Turns()
    bursts = Bursts(turns, yielding(told, works=False))
    bursts.begin(5)
    assert turns.unseen_ns == 0
    bursts.end(5)
    assert told == [5], "nothing was changed, and nothing is changed back"


def test_an_instance_is_started_as_usual_while_a_model_is_behind(tmp_path: Path) -> None:
    told: list[int] = []

    async def work() -> None:
        service = Service(open_repository(bundle(tmp_path / "net")), yields=yielding(told))
        await service.start()
        assert service._around is not None
        service._around.bursts.begin(5)
        service.models()[0].pool._start_one()
        assert told == [5, 0, 5]
        await service.stop()

    run(work())


@batch_only
def test_a_server_with_a_process_of_its_own_yields_and_one_within_another_program_does_not(tmp_path: Path) -> None:
    if os.sched_getscheduler(0) != os.SCHED_OTHER:
        pytest.skip("whoever runs the tests has given them another policy, which is left as it is")
    path, seen = bundle(tmp_path / "net"), []
    listening = Listening(port=0, grpc_port=None, drain_s=0.0)

    def look(opened: Open) -> None:
        seen.append(opened.service._yields)
        os.kill(os.getpid(), signal.SIGTERM)

    before_s = sys.getswitchinterval()
    assert serve(path, listening, look)
    sys.setswitchinterval(before_s)
    with served(path, listening) as opened:
        seen.append(opened.service._yields)
    assert [yields is never for yields in seen] == [False, True]


@batch_only
def test_a_thread_yields_and_then_no_more_and_those_that_it_starts_never_do() -> None:
    def scheduled() -> int:
        return os.sched_getscheduler(0)

    def work() -> list[object]:
        as_usual()
        bursts = Bursts(Turns(), thread_yields())
        found: list[object] = []
        bursts.begin(5)
        found.append(scheduled())
        with bursts.paused():
            found.append(in_a_thread(scheduled))
        found.append(scheduled())
        bursts.end(5)
        with bursts.paused():
            found.append(in_a_thread(scheduled))
        found.append(scheduled())
        return found

    batch, usual = os.SCHED_BATCH, os.SCHED_OTHER
    assert in_a_thread(work) == [batch, usual, batch, usual, usual]


@batch_only
def test_a_thread_for_steps_that_is_started_while_a_model_is_behind_is_scheduled_as_usual() -> None:
    def work() -> int:
        as_usual()
        bursts = Bursts(Turns(), thread_yields())
        bursts.begin(5)
        threads, found = StepThreads("net", 1, starting=bursts.paused), Future[int]()
        threads.put(lambda: found.set_result(os.sched_getscheduler(0)))
        scheduled = found.result(60)
        threads.close()
        return scheduled

    assert in_a_thread(work) == os.SCHED_OTHER


@batch_only
def test_a_policy_that_somebody_else_has_set_is_left_as_it_is() -> None:
    def work() -> tuple[int, int]:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        lengthen_slices()
        return thread_yields()(5), os.sched_getscheduler(0)

    assert in_a_thread(work) == (0, os.SCHED_IDLE)


def with_slices() -> None:
    as_usual()
    if not slice_ns():
        pytest.skip("slices have no length that could be set: before Linux 6.12, or a sandbox forbids it")


@batch_only
def test_a_loop_that_yields_leaves_runs_slices_of_the_length_of_one_and_knows_how_long_it_may_wait() -> None:
    def work() -> list[object]:
        with_slices()
        usual_ns, yields = slice_ns(), thread_yields()
        found: list[object] = []
        for wanted_ns in (TICK_NS + 1, 2 * TICK_NS, 1, 0):
            waits_ns = yields(wanted_ns)
            found.append((waits_ns // TICK_NS, os.sched_getscheduler(0), slice_ns() - usual_ns))
        batch = os.SCHED_BATCH
        assert found == [
            *((2, batch, TICK_NS + 1 - usual_ns), (2, batch, 2 * TICK_NS - usual_ns)),
            *((1, batch, 0), (0, os.SCHED_OTHER, 0)),
        ]
        return found

    in_a_thread(work)


@batch_only
def test_the_nice_value_of_a_thread_stays_what_it_was() -> None:
    def work() -> int:
        with_slices()
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, 7)
        thread_yields()(2 * TICK_NS)
        lengthen_slices()
        return os.getpriority(os.PRIO_PROCESS, thread)

    assert in_a_thread(work) == 7


@batch_only
def test_runs_have_long_slices_and_the_loop_has_the_usual_ones(tmp_path: Path) -> None:
    def work() -> None:
        with_slices()
        usual_ns = slice_ns()

        async def looks() -> None:
            service = Service(open_repository(bundle(tmp_path / "net", serving=Serving(isolation="thread"))))
            await service.start()
            runs = [each.native_id for each in threading.enumerate() if each.name.startswith("hasten net")]
            assert [slice_ns(number) for number in runs if number] == [LONGEST_SLICE_NS] * len(runs)
            assert runs
            assert slice_ns() == usual_ns
            await service.stop()

        run(looks())

    in_a_thread(work)


@pytest.mark.parametrize(
    ("objective_ms", "run_ms", "slice_ms"), [(None, 3.0, 3.0), (None, 30.0, 10.0), (16.0, 3.0, 2.0), (80.0, 3.0, 3.0)]
)
def test_a_model_affords_a_run_and_an_eighth_of_its_objective(
    tmp_path: Path, objective_ms: float | None, run_ms: float, slice_ms: float
) -> None:
    path = bundle(tmp_path / "net", serving=Serving(instances=1, isolation="thread", objective_ms=objective_ms))

    async def work() -> None:
        service = Service(open_repository(path))
        await service.start()
        pool = service.models()[0].pool
        costs = pool.line.batcher.costs
        costs._ns = dict.fromkeys(costs.sizes, run_ms * 1000000.0)
        costs.update(costs.largest, int(run_ms * 1e6))
        assert pool._afforded_ns() == slice_ms * 1e6
        await service.stop()

    run(work())


@batch_only
def test_a_sandbox_that_forbids_it_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def forbidden(*_: object) -> None:
        asked.append(1)
        raise PermissionError(1, "not permitted")

    def work() -> tuple[int, int]:
        as_usual()
        yields = thread_yields()
        with monkeypatch.context() as sandbox:
            sandbox.setattr(scheduling, "CALLS", {})
            sandbox.setattr(os, "sched_setscheduler", forbidden)
            first = yields(1)
            sandbox.setattr(os, "sched_getscheduler", forbidden)
            lengthen_slices()
            return first, thread_yields()(1)

    assert in_a_thread(work) == (0, 0)
    assert len(asked) >= 2


@pytest.mark.parametrize("ends", ["answered", "stopped", "expired"])
@pytest.mark.usefixtures("faulty_engine")
def test_a_model_is_behind_while_more_waits_than_its_next_batch(tmp_path: Path, ends: str) -> None:
    told: list[int] = []
    path = bundle(tmp_path / "net", engine="faulty", batch=4, serving=Serving(instances=1))

    async def work() -> None:
        service = Service(open_repository(path), yields=yielding(told))
        await service.start()
        largest = service.models()[0].pool.line.batcher.costs.largest
        hangs = rows(1)
        hangs[0, 0] = HANGS
        hung = asyncio.create_task(service.infer(request(hangs)))
        await asyncio.to_thread(faulty.hanging.wait)
        terms = {"timeout_us": 100_000} if ends == "expired" else {}
        waiting = [asyncio.create_task(service.infer(request(rows(1), **terms))) for _ in range(largest)]
        await asyncio.sleep(0)
        assert told == [], "the next batch takes them all"
        waiting.append(asyncio.create_task(service.infer(request(rows(1), **terms))))
        await asyncio.sleep(0)
        assert len(told) == 1
        if ends == "stopped":
            stopping = asyncio.create_task(service.stop(0.0))
            with pytest.raises(ModelNotReady):
                await waiting[-1]
            assert told[1:] == [0], "one that is gone is not behind"
            faulty.release.set()
            await stopping
        elif ends == "expired":
            for late in waiting:
                with pytest.raises(DeadlineExceeded):
                    await late
            assert told[1:] == [0], "nothing waits, though its instance hangs"
        faulty.release.set()
        outcomes = await asyncio.gather(hung, *waiting, return_exceptions=True)
        if ends == "answered":
            assert all(isinstance(outcome, InferResponse) for outcome in outcomes)
            assert told[1:] == [0]
        await service.stop()
        assert told[1:] == [0]

    run(work())
