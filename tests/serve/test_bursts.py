"""Reading in bursts while a model is behind: who yields, since when, and that nobody inherits it."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from hasten.deployment import Serving
from hasten.errors import DeadlineExceeded, ModelNotReady
from hasten.protocol.messages import InferResponse
from hasten.serve.app import Listening, Open, serve
from hasten.serve.bursts import SLICE_NS, Bursts, never, thread_yields
from hasten.serve.repository import open_repository
from hasten.serve.service import Service
from hasten.serve.step_threads import StepThreads
from hasten.serve.turns import Turns
from serve import faulty
from serve.bundles import bundle, request, rows, run
from serve.faulty import HANGS
from serve.served import served

batch_only = pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="this system has no SCHED_BATCH")


def yielding(told: list[bool], *, works: bool = True) -> Callable[[bool], bool]:
    def yields(on: bool) -> bool:
        told.append(on)
        return works

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
    told: list[bool] = []
    turns = Turns()
    bursts = Bursts(turns, yielding(told))
    bursts.begin()
    bursts.begin()
    bursts.end()
    assert (told, turns.unseen_ns) == ([True], SLICE_NS)
    bursts.end()
    assert (told, turns.unseen_ns) == ([True, False], 0)


def test_where_the_system_forbids_it_nothing_is_assumed_to_have_waited() -> None:
    told: list[bool] = []
    turns = Turns()
    bursts = Bursts(turns, yielding(told, works=False))
    bursts.begin()
    assert turns.unseen_ns == 0
    bursts.end()
    assert told == [True], "nothing was changed, and nothing is changed back"


def test_an_instance_is_started_as_usual_while_a_model_is_behind(tmp_path: Path) -> None:
    told: list[bool] = []

    async def work() -> None:
        service = Service(open_repository(bundle(tmp_path / "net")), yields=yielding(told))
        await service.start()
        assert service._around is not None
        service._around.bursts.begin()
        service.models()[0].pool._start_one()
        assert told == [True, False, True]
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
        bursts.begin()
        found.append(scheduled())
        with bursts.paused():
            found.append(in_a_thread(scheduled))
        found.append(scheduled())
        bursts.end()
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
        bursts.begin()
        threads, found = StepThreads("net", 1, starting=bursts.paused), Future[int]()
        threads.put(lambda: found.set_result(os.sched_getscheduler(0)))
        scheduled = found.result(60)
        threads.close()
        return scheduled

    assert in_a_thread(work) == os.SCHED_OTHER


@batch_only
def test_a_policy_that_somebody_else_has_set_is_left_as_it_is() -> None:
    def work() -> tuple[bool, int]:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        return thread_yields()(True), os.sched_getscheduler(0)

    assert in_a_thread(work) == (False, os.SCHED_IDLE)


@batch_only
def test_a_sandbox_that_forbids_it_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def forbidden(*_: object) -> None:
        asked.append(1)
        raise PermissionError(1, "not permitted")

    def work() -> tuple[bool, bool]:
        as_usual()
        yields = thread_yields()
        with monkeypatch.context() as sandbox:
            sandbox.setattr(os, "sched_setscheduler", forbidden)
            first = yields(True)
            sandbox.setattr(os, "sched_getscheduler", forbidden)
            return first, thread_yields()(True)

    assert in_a_thread(work) == (False, False)
    assert len(asked) == 2


@pytest.mark.parametrize("ends", ["answered", "stopped", "expired"])
@pytest.mark.usefixtures("faulty_engine")
def test_a_model_is_behind_while_more_waits_than_its_next_batch(tmp_path: Path, ends: str) -> None:
    told: list[bool] = []
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
        assert told == [True]
        if ends == "stopped":
            stopping = asyncio.create_task(service.stop(0.0))
            with pytest.raises(ModelNotReady):
                await waiting[-1]
            assert told == [True, False], "one that is gone is not behind"
            faulty.release.set()
            await stopping
        elif ends == "expired":
            for late in waiting:
                with pytest.raises(DeadlineExceeded):
                    await late
            assert told == [True, False], "nothing waits, though its instance hangs"
        faulty.release.set()
        outcomes = await asyncio.gather(hung, *waiting, return_exceptions=True)
        if ends == "answered":
            assert all(isinstance(outcome, InferResponse) for outcome in outcomes)
            assert told == [True, False]
        await service.stop()
        assert told == [True, False]

    run(work())
