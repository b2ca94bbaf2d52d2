"""Reading in bursts while a model is behind: who yields, since when, and that nobody inherits it."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from hasten.deployment import Serving
from hasten.errors import DeadlineExceeded, ModelNotReady
from hasten.protocol.messages import InferResponse
from hasten.serve import model, scheduling
from hasten.serve.app import Listening, Open, serve
from hasten.serve.bursts import LONGEST_SLICE_NS, SLICES, Bursts
from hasten.serve.repository import open_repository
from hasten.serve.runner import Runner
from hasten.serve.scheduling import TICK_NS, OwnThreads, Unchanged, own_threads, schedule, slice_of
from hasten.serve.service import Service
from hasten.serve.step_threads import StepThreads
from hasten.serve.turns import Turns
from hasten.serve.warm import Warm, Warming, warm
from serve import faulty
from serve.bundles import bundle, request, rows, run
from serve.faulty import HANGS
from serve.schedulers import Told
from serve.served import served

batch_only = pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="this system has no SCHED_BATCH")


MS = 1_000_000


@pytest.fixture(autouse=True)
def left_as_it_was() -> Iterator[None]:
    """What a test sets of a thread must not stay with the one that the tests run in."""
    yield
    if hasattr(os, "SCHED_BATCH"):
        assert os.sched_getscheduler(0) != os.SCHED_BATCH


def as_usual() -> None:
    """Whoever runs the tests may have given them another policy."""
    try:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    except OSError:
        pytest.skip("this sandbox forbids to set a policy")


def with_slices() -> int:
    """Give the length of the usual slices."""
    as_usual()
    usual_ns = slice_of()
    if not usual_ns:
        pytest.skip("slices have no length that could be set: before Linux 6.12, or a sandbox forbids it")
    return usual_ns


def in_a_thread(work: Callable[[], object]) -> object:
    """What a policy is set for must not be the thread that the tests run in."""
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(work).result()


def test_the_thread_yields_from_the_first_model_that_is_behind_to_the_last_that_catches_up() -> None:
    told, turns = Told(), Turns()
    bursts = Bursts(turns, told)
    bursts.runs(1, 30 * MS)
    bursts.begin()
    bursts.begin()
    bursts.end()
    assert (told.said, turns.unseen_ns) == ([LONGEST_SLICE_NS], told.waits_ns)
    bursts.end()
    assert (told.said, turns.unseen_ns) == ([LONGEST_SLICE_NS, "no more"], 0)


def test_slices_are_as_long_as_a_run_and_as_what_the_most_pressed_model_affords_behind_or_not() -> None:
    told = Told()
    bursts = Bursts(Turns(), told)
    bursts.runs(1, 30 * MS)
    bursts.runs(2, 6 * MS)
    bursts.runs(3, 1 * MS)
    assert told.given_ns == {1: LONGEST_SLICE_NS, 2: 6 * MS}, "short runs have the usual slices"
    bursts.begin()
    bursts.knows("patient", None)
    bursts.knows("usual", 5 * MS * SLICES)
    bursts.runs(4, 30 * MS)
    assert told.given_ns == {1: 5 * MS, 2: 5 * MS, 4: 5 * MS}
    bursts.knows("pressed", 16 * MS)
    assert told.given_ns == {1: 0, 2: 0, 4: 0}, "an eighth of it is no longer than the system's own"
    bursts.rests(2)
    bursts.forgets("pressed")
    bursts.forgets("usual")
    bursts.forgets("patient")
    assert told.given_ns == {1: LONGEST_SLICE_NS, 2: 0, 4: LONGEST_SLICE_NS}, "who has ended is left alone"
    assert told.said == [LONGEST_SLICE_NS, 5 * MS, 0, 5 * MS, LONGEST_SLICE_NS]
    bursts.end()
    bursts.rests(1)
    bursts.rests(4)
    bursts.begin()
    assert told.said[-1] == 0, "nobody runs for long: it waits for the end of a usual slice"


def test_where_the_system_forbids_it_nothing_is_assumed_to_have_waited() -> None:
    told, turns = Told(waits_ns=0), Turns()
    bursts = Bursts(turns, told)
    bursts.runs(1, 30 * MS)
    bursts.begin()
    assert turns.unseen_ns == 0
    bursts.end()
    assert told.said == [LONGEST_SLICE_NS], "nothing was changed, and nothing is changed back"


def test_a_loop_that_could_not_be_set_back_is_tried_again_and_known_to_wait() -> None:
    told, turns = Told(insists=False), Turns()
    bursts = Bursts(turns, told)
    bursts.runs(1, 30 * MS)
    bursts.begin()
    bursts.end()
    assert turns.unseen_ns == told.waits_ns
    told.works = True
    with bursts.paused():
        assert turns.unseen_ns == 0
    assert told.said == [LONGEST_SLICE_NS, "no more", "no more"]


def test_a_second_change_that_fails_leaves_it_yielding_until_the_last_has_caught_up() -> None:
    told, turns = Told(), Turns()
    bursts = Bursts(turns, told)
    bursts.runs(1, 30 * MS)
    bursts.begin()
    told.waits_ns = 0
    bursts.knows("pressed", 5 * MS)
    assert turns.unseen_ns > 0
    bursts.end()
    assert told.said[-1] == "no more"
    assert turns.unseen_ns == 0


def test_an_instance_is_started_as_usual_while_a_model_is_behind(tmp_path: Path) -> None:
    told = Told()

    async def work() -> None:
        service = Service(open_repository(bundle(tmp_path / "net")), scheduler=told)
        await service.start()
        assert service._around is not None
        service._around.bursts.begin()
        service.models()[0].pool._start_one()
        assert told.said == [0, "no more", 0]
        await service.stop()

    run(work())


@batch_only
def test_a_server_with_a_process_of_its_own_schedules_its_threads_and_one_within_another_program_does_not(
    tmp_path: Path,
) -> None:
    if os.sched_getscheduler(0) != os.SCHED_OTHER:
        pytest.skip("whoever runs the tests has given them another policy, which is left as it is")
    path, seen = bundle(tmp_path / "net"), []
    listening = Listening(port=0, grpc_port=None, drain_s=0.0)

    def look(opened: Open) -> None:
        seen.append(opened.service._scheduler)
        os.kill(os.getpid(), signal.SIGTERM)

    before_s = sys.getswitchinterval()
    assert serve(path, listening, look)
    sys.setswitchinterval(before_s)
    with served(path, listening) as opened:
        seen.append(opened.service._scheduler)
    assert [type(scheduler) for scheduler in seen] == [OwnThreads, type(None)]


@batch_only
def test_a_thread_yields_and_then_no_more_and_those_that_it_starts_never_do() -> None:
    def scheduled() -> tuple[int, int]:
        return os.sched_getscheduler(0), slice_of()

    def work() -> None:
        as_usual()
        usual = scheduled()
        bursts = Bursts(Turns(), own_threads())
        bursts.begin()
        yielding = scheduled()
        assert yielding[0] == os.SCHED_BATCH
        with bursts.paused():
            assert in_a_thread(scheduled) == usual
        assert scheduled() == yielding
        bursts.end()
        with bursts.paused():
            assert in_a_thread(scheduled) == usual
        assert scheduled() == usual

    in_a_thread(work)


@batch_only
def test_a_thread_for_steps_that_is_started_while_a_model_is_behind_is_scheduled_as_usual() -> None:
    def work() -> int:
        as_usual()
        bursts = Bursts(Turns(), own_threads())
        bursts.begin()
        threads, found = StepThreads("net", 1, starting=bursts.paused), Future[int]()
        threads.put(lambda: found.set_result(os.sched_getscheduler(0)))
        scheduled = found.result(60)
        threads.close()
        return scheduled

    assert in_a_thread(work) == os.SCHED_OTHER


@batch_only
def test_a_policy_that_somebody_else_has_set_is_left_as_it_is() -> None:
    def idle() -> tuple[int, bool]:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        before = slice_of()
        OwnThreads(os.SCHED_OTHER).gives(threading.get_native_id(), 2 * LONGEST_SLICE_NS)
        return own_threads().yields(0), slice_of() == before

    assert in_a_thread(idle) == (0, True)
    assert isinstance(in_a_thread(lambda: (idle(), own_threads())[1]), Unchanged)


@batch_only
def test_a_loop_that_yields_knows_how_long_it_may_have_to_wait_for_the_end_of_a_slice() -> None:
    def work() -> None:
        usual_ns = with_slices()
        scheduler, batch = own_threads(), os.SCHED_BATCH
        if usual_ns > TICK_NS:
            pytest.skip(f"the usual slices here have {usual_ns / 1e6:g} ms")
        for wanted_ns, ticks in ((0, 1), (TICK_NS + 1, 2), (2 * TICK_NS, 2)):
            assert scheduler.yields(wanted_ns) == ticks * TICK_NS
            assert (os.sched_getscheduler(0), slice_of()) == (batch, wanted_ns or usual_ns)
        assert scheduler.insists()
        assert (os.sched_getscheduler(0), slice_of()) == (os.SCHED_OTHER, usual_ns)

    in_a_thread(work)


@batch_only
def test_slices_of_ones_own_and_the_nice_value_stay_what_they_were() -> None:
    def work() -> None:
        with_slices()
        thread, own_ns = threading.get_native_id(), 3 * LONGEST_SLICE_NS
        os.setpriority(os.PRIO_PROCESS, thread, 7)
        schedule(thread, os.SCHED_OTHER, own_ns)
        scheduler = own_threads()
        assert scheduler.yields(LONGEST_SLICE_NS) >= own_ns
        scheduler.gives(thread, LONGEST_SLICE_NS)
        assert slice_of() == own_ns
        assert scheduler.insists()
        assert (slice_of(), os.getpriority(os.PRIO_PROCESS, thread)) == (own_ns, 7)

    in_a_thread(work)


@batch_only
@pytest.mark.parametrize(("run_ms", "slice_ms"), [(1, None), (6, 6), (30, 10)])
@pytest.mark.parametrize("isolation", ["thread", "process"])
def test_who_runs_a_model_has_slices_of_a_run_and_the_loop_has_the_usual_ones(
    tmp_path: Path, isolation: str, run_ms: int, slice_ms: int | None, inside: pytest.MonkeyPatch
) -> None:
    def slow(runner: Runner, warming: Warming) -> Warm:
        return replace(warm(runner, warming), least_ns=run_ms * MS)

    inside.setattr(model, "warm", slow)

    def work() -> None:
        usual_ns = with_slices()

        async def looks() -> None:
            path = bundle(tmp_path / "net", serving=Serving(instances=1, isolation=isolation))
            service = Service(open_repository(path), scheduler=own_threads())
            await service.start()
            (instance,) = service.models()[0].pool._ready
            assert (instance.thread in [each.native_id for each in threading.enumerate()]) == (isolation == "thread")
            assert slice_of(instance.thread) == (usual_ns if slice_ms is None else slice_ms * MS)
            assert slice_of() == usual_ns
            await service.stop()

        run(looks())

    in_a_thread(work)


@pytest.mark.parametrize("ends", ["told to", "killed"])
def test_nothing_is_given_any_more_to_who_has_ended(tmp_path: Path, ends: str, inside: pytest.MonkeyPatch) -> None:
    """The system may have given its number to somebody else."""

    def slow(runner: Runner, warming: Warming) -> Warm:
        return replace(warm(runner, warming), least_ns=30 * MS)

    inside.setattr(model, "warm", slow)

    async def work() -> None:
        told, path = Told(), bundle(tmp_path / "net", serving=Serving(instances=1, isolation="process"))
        service = Service(open_repository(path), scheduler=told)
        await service.start()
        pool = service.models()[0].pool
        (instance,) = pool._ready
        assert told.given_ns.pop(instance.thread) == LONGEST_SLICE_NS
        if ends == "killed":
            os.kill(instance.thread, signal.SIGKILL)
            while instance.alive():
                await asyncio.sleep(0)
            pool.look(time.perf_counter_ns())
        else:
            await service.unload("net")
            await pool.over()
        assert service._around is not None
        service._around.bursts.knows("pressed", 16 * MS)
        assert instance.thread not in told.given_ns
        await service.stop()

    run(work())


@pytest.mark.parametrize(
    ("serving", "slice_ns"),
    [
        ({}, LONGEST_SLICE_NS),
        ({"objective_ms": 48}, 6 * MS),
        ({"timeout_ms": 40}, 5 * MS),
        ({"timeout_ms": 48, "objective_ms": 40}, 5 * MS),
        ({"objective_ms": 1000}, LONGEST_SLICE_NS),
    ],
)
def test_a_server_yields_for_an_eighth_of_the_shortest_objective_or_timeout_of_its_models_that_are_there(
    tmp_path: Path, serving: dict[str, float], slice_ns: int
) -> None:
    told = Told()
    bundle(tmp_path / "one" / "1", serving=Serving(instances=1, **serving))
    bundle(tmp_path / "two" / "1", serving=Serving(instances=1))

    async def work() -> None:
        service = Service(open_repository(tmp_path), scheduler=told)
        await service.start()
        assert service._around is not None
        service._around.bursts.runs(1, 30 * MS)
        service._around.bursts.begin()
        await service.unload("one")
        service._around.bursts.end()
        service._around.bursts.begin()
        await service.stop()

    run(work())
    assert (told.said[0], told.said[-1]) == (slice_ns, LONGEST_SLICE_NS)


@batch_only
def test_a_sandbox_that_forbids_it_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def forbidden(*words: object) -> None:
        asked.append(words)
        raise PermissionError(1, "not permitted")

    def work() -> None:
        as_usual()
        scheduler, thread = own_threads(), threading.get_native_id()
        with monkeypatch.context() as sandbox:
            sandbox.setattr(scheduling, "schedule", forbidden)
            assert scheduler.yields(LONGEST_SLICE_NS) == 0
            assert not scheduler.insists()
            if slice_of():
                scheduler.gives(thread, LONGEST_SLICE_NS)
                assert len(asked) == 3
            sandbox.setattr(os, "sched_getscheduler", forbidden)
            scheduler.gives(thread, LONGEST_SLICE_NS)
            assert isinstance(own_threads(), Unchanged)
        assert os.sched_getscheduler(0) == os.SCHED_OTHER

    in_a_thread(work)


@batch_only
def test_where_slices_have_no_length_a_loop_yields_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before Linux 6.12, on other machines, and where a sandbox knows no sched_setattr."""

    def work() -> None:
        as_usual()
        monkeypatch.setattr(scheduling, "_GET", 0)
        monkeypatch.setattr(scheduling, "_SET", 0)
        scheduler = own_threads()
        assert scheduler.yields(LONGEST_SLICE_NS) == TICK_NS
        assert os.sched_getscheduler(0) == os.SCHED_BATCH
        assert scheduler.insists()
        assert os.sched_getscheduler(0) == os.SCHED_OTHER

    in_a_thread(work)


def test_a_thread_that_is_gone_is_no_failure() -> None:
    assert slice_of(2**22 + 1) == 0
    OwnThreads(0).gives(2**22 + 1, LONGEST_SLICE_NS)


@pytest.mark.parametrize("ends", ["answered", "stopped", "expired"])
@pytest.mark.usefixtures("faulty_engine")
def test_a_model_is_behind_while_more_waits_than_its_next_batch(tmp_path: Path, ends: str) -> None:
    told = Told()
    path = bundle(tmp_path / "net", engine="faulty", batch=4, serving=Serving(instances=1))

    async def work() -> None:
        service = Service(open_repository(path), scheduler=told)
        await service.start()
        largest = service.models()[0].pool.line.batcher.costs.largest
        hangs = rows(1)
        hangs[0, 0] = HANGS
        hung = asyncio.create_task(service.infer(request(hangs)))
        await asyncio.to_thread(faulty.hanging.wait)
        terms = {"timeout_us": 100_000} if ends == "expired" else {}
        waiting = [asyncio.create_task(service.infer(request(rows(1), **terms))) for _ in range(largest)]
        await asyncio.sleep(0)
        assert told.said == [], "the next batch takes them all"
        waiting.append(asyncio.create_task(service.infer(request(rows(1), **terms))))
        await asyncio.sleep(0)
        assert told.said == [0]
        if ends == "stopped":
            stopping = asyncio.create_task(service.stop(0.0))
            with pytest.raises(ModelNotReady):
                await waiting[-1]
            assert told.said[1:] == ["no more"], "one that is gone is not behind"
            faulty.release.set()
            await stopping
        elif ends == "expired":
            for late in waiting:
                with pytest.raises(DeadlineExceeded):
                    await late
            assert told.said[1:] == ["no more"], "nothing waits, though its instance hangs"
        faulty.release.set()
        outcomes = await asyncio.gather(hung, *waiting, return_exceptions=True)
        if ends == "answered":
            assert all(isinstance(outcome, InferResponse) for outcome in outcomes)
            assert told.said[1:] == ["no more"]
        await service.stop()
        assert told.said[1:] == ["no more"]

    run(work())
