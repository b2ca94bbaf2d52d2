"""A worker process has two slots: the next whole batch waits in one while the other runs."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from hasten.deployment import Serving, read_deployment
from hasten.errors import ChildCrashed, ServerFault
from hasten.protocol.messages import InferResponse
from hasten.serve.child import ChildRunner
from hasten.serve.costs import CostCurve
from hasten.serve.news import Begun
from hasten.serve.repository import open_repository
from hasten.serve.service import Service
from hasten.serve.worker import Instance
from serve.bundles import bundle, request, rows, run

LARGEST = 4
SERVING = Serving(instances=1, isolation="process", batch_sizes=(1, LARGEST), run_limit_ms=60_000)


async def started(folder: Path) -> tuple[Service, Instance, ChildRunner]:
    """Serve from a child that was stopped: what it is given stays where it is."""
    service = Service(open_repository(bundle(folder, serving=SERVING)))
    await service.start()
    assert service.ready(), service.index()
    (instance,) = service.models()[0].pool._ready
    runner = instance._runner
    assert isinstance(runner, ChildRunner)
    costs = CostCurve((1, LARGEST))  # whole batches are worth it, whatever the warm-up on a busy machine said
    costs.update(1, 1_000_000)
    costs.update(LARGEST, 2_000_000)
    service.models()[0].line.batcher.costs = costs
    os.kill(runner.pid, signal.SIGSTOP)
    return service, instance, runner


async def asked(service: Service, count: int) -> list[asyncio.Task[InferResponse]]:
    """Ask for ``count`` rows that the worker finds all at once."""
    line = service.models()[0].line
    while not line.idle():  # it comes to wait at its line after it has told that it is ready
        await asyncio.sleep(0.001)
    held = threading.RLock()  # one that waits looks by itself now and then: it must not see the first rows alone
    with held:
        with line.lock:
            line.lock = held  # type: ignore[assignment]
        tasks = [asyncio.create_task(service.infer(request(rows(1, seed=seed)))) for seed in range(count)]
        while line.batcher.rows < count:
            await asyncio.sleep(0)
    line.ring()
    return tasks


async def until_two_are_in(instance: Instance) -> None:
    deadline = time.monotonic() + 30
    while len(instance.batches) < 2:
        assert time.monotonic() < deadline, instance.batches
        await asyncio.sleep(0.001)


def test_the_next_whole_batch_waits_in_the_child_and_each_request_gets_its_own_rows(tmp_path: Path) -> None:
    async def work() -> None:
        service, instance, runner = await started(tmp_path / "net")
        model = service.models()[0]
        tasks = await asked(service, 3 * LARGEST + 1)
        await until_two_are_in(instance)
        assert [batch.rows for batch in instance.batches] == [LARGEST, LARGEST]
        assert model.line.batcher.rows == LARGEST + 1, "a child has two slots"
        ns = model.line.batcher.costs.ns(LARGEST)
        assert ns < model.pool.free_ns(instance.began_ns) <= 2 * ns, "both are in the way of who comes now"
        os.kill(runner.pid, signal.SIGCONT)
        answers = await asyncio.gather(*tasks)
        alone = [await service.infer(request(rows(1, seed=seed))) for seed in range(3 * LARGEST + 1)]
        for answer, other in zip(answers, alone, strict=True):
            np.testing.assert_allclose(answer.outputs[0].data, other.outputs[0].data, rtol=1e-5, atol=1e-6)
        assert not instance.batches
        await service.stop()

    run(work())


def test_what_is_less_than_a_whole_batch_is_not_taken_ahead(tmp_path: Path) -> None:
    async def work() -> None:
        service, instance, runner = await started(tmp_path / "net")
        before = runner._at
        tasks = await asked(service, 2 * LARGEST - 1)
        while runner._begun or runner._at == before:  # until it has begun one, and waits for it
            await asyncio.sleep(0.001)
        assert [batch.rows for batch in instance.batches] == [LARGEST]
        os.kill(runner.pid, signal.SIGCONT)
        await asyncio.gather(*tasks)
        await service.stop()

    run(work())


@pytest.mark.parametrize("ended", ["killed", "hanging"])
def test_a_child_that_is_lost_fails_the_batch_that_it_ran_and_not_the_one_that_waited_in_it(
    tmp_path: Path, ended: str
) -> None:
    async def work() -> None:
        service, instance, runner = await started(tmp_path / "net")
        tasks = await asked(service, 3 * LARGEST)
        await until_two_are_in(instance)
        running = {id(piece.call) for piece in instance.batches[0].entries}
        assert len(running) == LARGEST
        if ended == "killed":
            os.kill(runner.pid, signal.SIGKILL)
        else:
            for seconds in (61, 63):
                service.models()[0].pool.look(time.perf_counter_ns() + seconds * 10**9)
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        failed = [outcome for outcome in outcomes if isinstance(outcome, ServerFault)]
        why = {"killed": ("died of SIGKILL", "its pipe broke"), "hanging": ("did not answer within 60 s",)}[ended]
        assert len(failed) == LARGEST
        assert all(any(words in str(error) for words in why) for error in failed)
        assert sum(isinstance(outcome, InferResponse) for outcome in outcomes) == 2 * LARGEST
        assert service.models()[0].statistics.restarts == 1
        await service.stop()

    run(work())


def test_time_in_the_slot_is_waiting_and_no_part_of_the_run(tmp_path: Path) -> None:
    async def work() -> None:
        service, instance, runner = await started(tmp_path / "net")
        tasks = await asked(service, 2 * LARGEST)
        await until_two_are_in(instance)
        batch = instance.batches[1]
        begun = Begun(batch, batch.closed_ns, batch.closed_ns + 5)
        held = begun.behind(batch.closed_ns + 105)
        assert (held.joined_ns, held.batch.closed_ns) == (batch.closed_ns + 105, batch.closed_ns + 100)
        assert begun.behind(batch.closed_ns) == Begun(batch, batch.closed_ns, batch.closed_ns + 5)
        os.kill(runner.pid, signal.SIGCONT)
        await asyncio.gather(*tasks)
        await service.stop()

    run(work())


def test_what_a_lost_child_had_not_begun_fails_where_its_model_was_unloaded_meanwhile(tmp_path: Path) -> None:
    async def work() -> None:
        service, instance, runner = await started(tmp_path / "net")
        tasks = await asked(service, 2 * LARGEST)
        await until_two_are_in(instance)
        service.models()[0].line.close()
        os.kill(runner.pid, signal.SIGKILL)
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(outcome, ServerFault) for outcome in outcomes)
        assert sum("before this request was run" in str(outcome) for outcome in outcomes) == LARGEST
        await service.stop()

    run(work())


def test_a_child_that_cannot_be_started_leaves_no_file_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deployment, artifact = read_deployment(bundle(tmp_path / "net", serving=SERVING))

    def none_left(*_: object, **__: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", none_left)
    before = len([*Path("/proc/self/fd").iterdir()])
    for _ in range(3):
        with pytest.raises(ChildCrashed, match="no process can be started: Resource temporarily unavailable"):
            ChildRunner.start(deployment, artifact, largest=LARGEST)
    assert len([*Path("/proc/self/fd").iterdir()]) == before
