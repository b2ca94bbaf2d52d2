"""Workers that raise, hang and die: who gets what answer, and what comes after."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest

from hasten.deployment import Serving
from hasten.errors import DeadlineExceeded, ModelNotReady, Overloaded, ServerFault, TooLarge, Unsupported
from hasten.protocol.messages import InferResponse
from hasten.serve import child, gate
from hasten.serve.batching import NEVER
from hasten.serve.child import ChildRunner, part_bytes
from hasten.serve.pool import Pool
from hasten.serve.reading import read_bundle
from hasten.serve.repository import open_repository
from hasten.serve.service import Service
from hasten.serve.ticket import Marks
from hasten.tensors import Array, TensorSpec
from hasten.testing.models import Builder
from serve import faulty
from serve.bundles import bundle, request, rows, run
from serve.faulty import HANGS, RAISES

pytestmark = pytest.mark.usefixtures("faulty_engine")


def wide() -> onnx.ModelProto:
    """x [batch, any] -> y [batch, 1], the sum of each row."""
    net = Builder(0)
    net.add("ReduceSum", "x", net.constant(np.array([1], np.int64)))
    return net.model(("x", ("batch", "any")), ("y", ("batch", 1)))


def marked(value: float) -> Array:
    x = rows(1)
    x[0, 0] = value
    return x


async def started(path: Path) -> Service:
    service = Service(open_repository(path))
    await service.start()
    assert service.ready(), service.index()
    return service


async def until(what: object, holds: object) -> None:
    """Let the loop run until ``holds()``."""
    assert callable(holds)
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.001)


@pytest.mark.parametrize("isolation", ["thread", "process"])
def test_a_model_without_a_batch_axis_takes_any_number_of_rows_wherever_they_lie(
    tmp_path: Path, isolation: str
) -> None:
    serving = Serving(instances=1, isolation=isolation, slot_bytes=4096)  # type: ignore[arg-type]
    net = Builder(0)
    net.add("ReduceSum", "x", net.constant(np.array([1], np.int64)))
    model = net.model(("x", ("rows", 16)), ("y", ("others", 1)))  # nothing says that a row of y is one of x
    path = bundle(tmp_path / "net", model=model, serving=serving)

    async def work() -> None:
        service = await started(path)
        for n in (1, 3, 5):
            x = rows(n)
            unaligned = np.frombuffer(b"?" + x.tobytes(), np.float32, offset=1).reshape(x.shape)
            for sent in (x, unaligned):
                answer = await service.infer(request(sent))
                np.testing.assert_allclose(answer.outputs[0].data, x.sum(1, keepdims=True), rtol=1e-5)
        await service.stop()

    run(work())


@pytest.mark.parametrize("isolation", ["thread", "process"])
def test_a_session_that_raises_fails_its_batch_and_goes_on(tmp_path: Path, isolation: str) -> None:
    serving = Serving(instances=1, isolation=isolation)  # type: ignore[arg-type]
    path = bundle(tmp_path / "net", engine="faulty", serving=serving)

    async def work() -> None:
        service = await started(path)
        with pytest.raises(ServerFault, match="ValueError: this session raises"):
            await service.infer(request(marked(RAISES)))
        assert isinstance(await service.infer(request(rows(1))), InferResponse)
        assert service.models()[0].statistics.restarts == 0
        await service.stop()

    run(work())


def test_a_session_that_hangs_fails_its_requests_and_is_replaced(tmp_path: Path) -> None:
    path = bundle(tmp_path / "net", engine="faulty", serving=Serving(instances=1, run_limit_ms=60_000))

    async def work() -> None:
        service = await started(path)
        hung = asyncio.create_task(service.infer(request(marked(HANGS))))
        await asyncio.to_thread(faulty.hanging.wait)
        waiting = asyncio.create_task(service.infer(request(rows(2))))
        await asyncio.sleep(0)
        model = service.models()[0]
        model.pool.look(time.perf_counter_ns() + 59 * 10**9)
        assert not hung.done()
        model.pool.look(time.perf_counter_ns() + 61 * 10**9)
        assert service.ready(), "the process may have been stopped: another look"
        model.pool.look(time.perf_counter_ns() + 63 * 10**9)
        assert not service.ready(), "its only worker is being replaced"
        with pytest.raises(ServerFault, match="did not answer within 60 s"):
            await hung
        assert isinstance(await waiting, InferResponse)
        assert service.ready()
        assert model.statistics.restarts == 1
        faulty.release.set()
        await service.stop()

    run(work())


def test_a_hanging_child_is_killed(tmp_path: Path) -> None:
    serving = Serving(instances=1, isolation="process", run_limit_ms=1000)
    path = bundle(tmp_path / "net", engine="faulty", serving=serving)

    async def work() -> None:
        service = await started(path)
        (worker,) = children(service)
        with pytest.raises(ServerFault, match="was replaced"):
            await service.infer(request(marked(HANGS)))
        assert isinstance(await service.infer(request(rows(1))), InferResponse)
        await until("the old child is gone", lambda: not Path(f"/proc/{worker.pid}").exists())
        await service.stop()

    run(work())


def test_a_killed_child_fails_only_what_it_ran(tmp_path: Path) -> None:
    path = bundle(
        tmp_path / "net", engine="faulty", serving=Serving(instances=1, isolation="process", batch_sizes=(1,))
    )

    async def work() -> None:
        service = await started(path)
        (worker,) = children(service)
        running = asyncio.create_task(service.infer(request(marked(HANGS))))
        await until("it runs", lambda: any(i.running for i in service.models()[0].pool._ready))
        waiting = [asyncio.create_task(service.infer(request(rows(1, seed=s)))) for s in range(5)]
        await asyncio.sleep(0)
        os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(ServerFault, match="SIGKILL"):
            await running
        assert len(await asyncio.gather(*waiting)) == 5
        assert service.ready()
        assert service.models()[0].statistics.restarts == 1
        await service.stop()

    run(work())


def test_a_child_that_was_killed_while_idle_costs_no_request(tmp_path: Path) -> None:
    path = bundle(tmp_path / "net", serving=Serving(instances=1, isolation="process"))

    async def work() -> None:
        service = await started(path)
        (worker,) = children(service)
        os.kill(worker.pid, signal.SIGKILL)
        await until("its pipe is closed", lambda: not worker.alive())
        assert isinstance(await service.infer(request(rows(1))), InferResponse)
        await service.stop()

    run(work())


def test_readiness_tells_of_a_dead_idle_child(tmp_path: Path) -> None:
    path = bundle(tmp_path / "net", serving=Serving(instances=1, isolation="process"))

    async def work() -> None:
        service = await started(path)
        (worker,) = children(service)
        os.kill(worker.pid, signal.SIGKILL)
        await until("its pipe is closed", lambda: not worker.alive())
        assert not service.ready()
        await until("it is replaced", service.ready)
        await service.stop()

    run(work())


def test_no_request_waits_for_a_worker_that_cannot_be_started_and_readiness_says_so(tmp_path: Path) -> None:
    path = bundle(tmp_path / "net", serving=Serving(instances=1, isolation="process"))

    async def work() -> None:
        service = await started(path)
        model, kept = path.parent / "model" / "model.onnx", tmp_path / "kept"
        model.rename(kept)
        (worker,) = children(service)
        os.kill(worker.pid, signal.SIGKILL)
        await until("it is seen", lambda: not service.ready())
        for _ in range(3):
            with pytest.raises(ModelNotReady, match="no worker of model 'net'"):
                await service.infer(request(rows(1)))
        assert service.models()[0].pool.calls == 0
        assert not service.ready()
        assert not service.model_ready("net")
        assert service.index()[0]["state"] == "UNAVAILABLE"
        kept.rename(model)
        await until("it comes back", service.ready)
        assert isinstance(await service.infer(request(rows(1))), InferResponse)
        await service.stop()

    run(work())


def test_a_request_whose_worker_does_not_come_back_is_told_so_after_a_while(tmp_path: Path) -> None:
    serving = Serving(instances=1, isolation="thread", run_limit_ms=60_000)
    path = bundle(tmp_path / "net", engine="faulty", serving=serving)

    async def work() -> None:
        service = await started(path)
        hung = asyncio.create_task(service.infer(request(marked(HANGS))))
        await asyncio.to_thread(faulty.hanging.wait)
        waiting = asyncio.create_task(service.infer(request(rows(2))))
        await asyncio.sleep(0)
        faulty.may_open.clear()
        pool = service.models()[0].pool
        for seconds in (61, 63):
            pool.look(time.perf_counter_ns() + seconds * 10**9)
        with pytest.raises(ServerFault):
            await hung
        assert not waiting.done(), "another worker may come"
        pool.look(time.perf_counter_ns() + 121 * 10**9)
        with pytest.raises(ModelNotReady, match="was ready within 120 s"):
            await waiting
        faulty.may_open.set()
        faulty.release.set()
        await service.stop()

    run(work())


def test_a_request_whose_time_is_over_is_told_so_though_its_worker_hangs(tmp_path: Path) -> None:
    path = bundle(tmp_path / "net", engine="faulty", serving=Serving(instances=1))

    async def work() -> None:
        service = await started(path)
        hung = asyncio.create_task(service.infer(request(marked(HANGS))))
        await asyncio.to_thread(faulty.hanging.wait)
        with pytest.raises((DeadlineExceeded, Overloaded)):
            await service.infer(request(rows(1), timeout_us=20_000))
        faulty.release.set()
        assert isinstance(await hung, InferResponse)
        await service.stop()

    run(work())


def test_a_full_queue_refuses_and_says_when_to_come_again(tmp_path: Path) -> None:
    path = bundle(tmp_path / "net", engine="faulty", serving=Serving(instances=1, queue_rows=4))

    async def work() -> None:
        service = await started(path)
        hung = asyncio.create_task(service.infer(request(marked(HANGS))))
        await asyncio.to_thread(faulty.hanging.wait)
        waiting = [asyncio.create_task(service.infer(request(rows(1)))) for _ in range(4)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded) as refused:
            await service.infer(request(rows(1)))
        assert refused.value.reason == "queue_full"
        assert refused.value.retry_after_s > 0
        with pytest.raises(Overloaded, match="4 rows wait"):  # and one that was not read yet
            service.check_room("net", None)
        assert service.models()[0].statistics.refused["queue_full"] == 2
        service.check_room("net", None, unless=lambda: True)  # which is not counted as refused
        assert service.models()[0].statistics.refused["queue_full"] == 2
        faulty.release.set()
        await asyncio.gather(hung, *waiting)
        service.check_room("net", None)
        await service.stop()

    run(work())


def test_answers_that_come_later_than_predicted_make_admission_stricter(
    tmp_path: Path, inside: pytest.MonkeyPatch
) -> None:
    inside.setattr(gate, "queued_ns", lambda batcher, rows, priority, instances: 6_999)
    inside.setattr(Pool, "free_ns", lambda pool, now_ns: 1)
    path = bundle(tmp_path / "net", engine="faulty", serving=Serving(instances=1, objective_ms=0.01))

    async def work() -> None:
        service = await started(path)
        margin = service.models()[0].pool.gate.margin
        hung = asyncio.create_task(service.infer(request(marked(HANGS))))
        await asyncio.to_thread(faulty.hanging.wait)
        late = asyncio.create_task(service.infer(request(rows(1))))  # 7 us are within the objective
        await asyncio.sleep(0)
        assert margin.factor == 1.0
        margin.factor = 1.5
        with pytest.raises(Overloaded) as refused:
            await service.infer(request(rows(1)))
        assert refused.value.reason == "predicted_wait"
        faulty.release.set()
        await asyncio.gather(hung, late)
        assert margin.factor > 1.5, "both took longer than 1.5 times 7 us"
        await service.stop()

    run(work())


def test_under_overload_the_next_is_refused_without_being_looked_at_unless_it_has_a_time_of_its_own(
    tmp_path: Path, inside: pytest.MonkeyPatch
) -> None:
    path = bundle(tmp_path / "net", engine="faulty", serving=Serving(instances=1, objective_ms=100))

    async def work() -> None:
        service = await started(path)
        statistics = service.models()[0].statistics
        hung = asyncio.create_task(service.infer(request(marked(HANGS))))
        await asyncio.to_thread(faulty.hanging.wait)
        waits = asyncio.create_task(service.infer(request(rows(1))))
        await asyncio.sleep(0)
        inside.setattr(Pool, "free_ns", lambda pool, now_ns: 10**9)
        with pytest.raises(Overloaded) as first:
            await service.infer(request(rows(1)))
        with inside.context() as without:
            without.setattr(gate, "refusal", None)
            with pytest.raises(Overloaded) as again:
                await service.infer(request(rows(1)))
            with pytest.raises(TypeError):  # one with a timeout is looked at
                await service.infer(request(rows(1), timeout_us=1))
        assert str(again.value) == str(first.value)
        assert again.value.reason == "predicted_wait"
        with pytest.raises(Overloaded) as unread:
            service.check_room("net", None)
        assert len({id(told.value) for told in (first, again, unread)}) == 3, "an error that is raised is one request's"
        assert statistics.refused["predicted_wait"] == 3, "all are counted"
        unseen = service.shut("net", "1")
        assert unseen is not None
        assert str(unseen) == str(first.value)
        assert service.shut("net", "another version") is None
        assert statistics.refused["predicted_wait"] == 3, "it may be taken in all the same"
        service.turned_away("net", unseen)
        assert statistics.refused["predicted_wait"] == 4
        faulty.release.set()
        await asyncio.gather(hung, waits)
        inside.setattr(Pool, "free_ns", lambda pool, now_ns: 0)
        assert service.shut("net", None) is None
        assert isinstance(await service.infer(request(rows(1))), InferResponse)
        await service.stop()

    run(work())


@pytest.mark.parametrize("isolation", ["thread", "process", "auto"])
def test_once_something_was_answered_nobody_is_refused_for_what_was_before(tmp_path: Path, isolation: str) -> None:
    """Wherever runs are done: ``auto`` is the event loop's thread here."""
    path = bundle(tmp_path / "net", serving=Serving(instances=1, isolation=isolation, objective_ms=10_000))

    async def work() -> None:
        service = await started(path)
        shut = gate.Shut("full", 1.0, 1, NEVER, 0, 0)
        service.models()[0].pool.gate._shut = shut
        with pytest.raises(Overloaded, match="full"):
            await service.infer(request(rows(1)))
        assert isinstance(await service.infer(request(rows(1), timeout_us=10_000_000)), InferResponse)
        assert isinstance(await service.infer(request(rows(1))), InferResponse)
        await service.stop()

    run(work())


def test_a_request_that_waited_in_its_socket_for_longer_than_the_objective_is_refused(tmp_path: Path) -> None:
    path = bundle(tmp_path / "net", engine="faulty", serving=Serving(instances=1, objective_ms=10_000))

    async def work() -> None:
        service = await started(path)
        hung = asyncio.create_task(service.infer(request(marked(HANGS))))
        await asyncio.to_thread(faulty.hanging.wait)
        late = asyncio.create_task(service.infer(request(rows(1))))
        await asyncio.sleep(0)
        service.turns.reads(time.perf_counter_ns() - 11 * 10**9)  # a turn that has gone on for eleven seconds
        with pytest.raises(Overloaded) as refused:
            await service.infer(request(rows(1)))
        assert refused.value.reason == "predicted_wait"
        faulty.release.set()
        await asyncio.gather(hung, late)
        await service.stop()

    run(work())


def test_stopping_with_a_worker_that_hangs_fails_its_requests_and_ends(tmp_path: Path) -> None:
    path = bundle(tmp_path / "net", engine="faulty", serving=Serving(instances=1))

    async def work() -> None:
        service = await started(path)
        hung = asyncio.create_task(service.infer(request(marked(HANGS))))
        await asyncio.to_thread(faulty.hanging.wait)
        stopping = asyncio.create_task(service.stop(drain_s=0.01))
        with pytest.raises(ModelNotReady, match="unloaded"):
            await hung
        faulty.release.set()
        assert not await stopping

    run(work())


def test_text_cannot_go_to_a_child(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="holds text"):
        part_bytes((TensorSpec("s", "string", ("n",)),), rows=1, told=None)
    np.testing.assert_equal(part_bytes((TensorSpec("x", "float32", ("n", 16)),), rows=4, told=None), 256 + 64)


def children(service: Service) -> list[ChildRunner]:
    found = [instance._runner for instance in service.models()[0].pool._ready]
    return [runner for runner in found if isinstance(runner, ChildRunner)]


def test_rows_that_do_not_fit_a_childs_memory_are_refused_alone(tmp_path: Path) -> None:
    serving = Serving(instances=1, isolation="process", batch_sizes=(1, 4), slot_bytes=1024)
    path = bundle(tmp_path / "net", model=wide(), serving=serving)

    async def work() -> None:
        service = await started(path)
        with pytest.raises(TooLarge, match="slot has 1024"):
            await service.infer(request(np.zeros((1, 100), np.float32)))
        answer = await service.infer(request(np.ones((1, 8), np.float32)))
        np.testing.assert_array_equal(answer.outputs[0].data, [[8.0]])
        await service.stop()

    run(work())


def test_an_objective_makes_requests_ride_together_and_none_is_lost(tmp_path: Path) -> None:
    path = bundle(tmp_path / "net", serving=Serving(instances=2, objective_ms=10_000))

    async def work() -> None:
        service = await started(path)
        answers = await asyncio.gather(*[service.infer(request(rows(1, seed=s))) for s in range(200)])
        assert len(answers) == 200
        await service.stop()

    run(work())


def test_a_session_that_cannot_be_warmed_fails_the_load_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = bundle(tmp_path / "net", engine="faulty")

    def broken(self: faulty.FaultySession, feed: object) -> dict[str, Array]:
        raise ValueError("no run at all")

    monkeypatch.setattr(faulty.FaultySession, "_run", broken)

    async def work() -> None:
        service = Service(open_repository(path))
        await service.start()
        assert not service.ready()
        assert "no run at all" in service.index()[0]["reason"]
        await service.stop()

    run(work())


def test_a_child_whose_answer_lies_in_the_pipe_is_alive(tmp_path: Path) -> None:
    read = read_bundle(open_repository(bundle(tmp_path / "net")).find("net"))
    runner = ChildRunner.start(read.deployment, read.artifact, largest=8)
    try:
        runner.buffer("x", (1, 16), np.dtype(np.float32))[...] = rows(1)
        asked = [where for where, _ in runner._placed.values()]
        child._send(runner._to_child, msgspec.msgpack.encode(child.Run(0, asked)))
        assert child._events(runner._from_child, 30.0)
        assert runner.alive()
        runner.kill()
        runner._process.wait()
        assert not runner.alive(), "dead, though an answer is still there to be read"
    finally:
        runner.close()
        runner.close()


def test_a_request_that_is_cancelled_while_it_runs_is_never_answered(tmp_path: Path) -> None:
    path = bundle(tmp_path / "net", engine="faulty", serving=Serving(instances=1))

    async def work() -> None:
        service = await started(path)
        heard: list[object] = []
        ticket = service.submit(request(marked(HANGS)), Marks(), heard.append)
        await asyncio.to_thread(faulty.hanging.wait)
        ticket.cancel()
        faulty.release.set()
        await service.infer(request(rows(1)))
        model = service.models()[0]
        assert heard == []
        assert model.pool.calls == 0
        assert (model.statistics.rows, model.statistics.refused) == (1, {"cancelled": 1})
        await service.stop()

    run(work())
