"""Cancellations, timeouts, swaps and killed workers under load: no request is lost, none is told twice."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

from hasten.deployment import Serving
from hasten.errors import ServeError, ServerFault
from hasten.protocol.messages import InferResponse
from hasten.serve.child import ChildRunner
from hasten.serve.repository import open_repository
from hasten.serve.service import Service
from hasten.serve.ticket import Marks
from hasten.testing.models import mlp
from serve.bundles import bundle, instances_left, request, rows, run


async def started(path: Path) -> Service:
    service = Service(open_repository(path))
    await service.start()
    assert service.ready(), service.index()
    return service


def said_by(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    """Give what ONNX Runtime itself says."""
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(["y"], {"x": x})[0]


def test_each_request_is_told_once_and_a_cancelled_one_at_most_before(tmp_path: Path) -> None:
    path = bundle(tmp_path / "net", serving=Serving(instances=2, batch_sizes=(1, 4), objective_ms=1000))
    random = np.random.default_rng(0)

    async def work() -> None:
        service = await started(path)
        told: Counter[int] = Counter()
        cancelled: set[int] = set()
        for number in range(600):
            asked = request(
                rows(int(random.integers(1, 7))),
                priority=int(random.integers(0, 3)),
                timeout_us=int(random.choice([0, 200, 2_000, 10_000_000])),
            )
            ticket = service.submit(asked, Marks(), lambda outcome, number=number: told.update([number]))
            if random.random() < 0.3 and not told[number]:
                ticket.cancel()
                cancelled.add(number)
            if random.random() < 0.2:
                await asyncio.sleep(0)
        model = service.models()[0]
        await model.pool.emptied()
        assert all(told[number] == (number not in cancelled) for number in range(600))
        assert (model.pool.calls, model.line.batcher.rows, model.line.batcher.n_bytes) == (0, 0, 0)
        figures = model.statistics
        assert figures.spans["success"].count + figures.spans["fail"].count == 600
        assert figures.refused["cancelled"] == len(cancelled)
        await service.stop()

    run(work())


def test_swaps_under_load_lose_nothing_and_leave_no_thread(tmp_path: Path) -> None:
    home = tmp_path / "models"
    bundle(home / "net" / "1")
    bundle(home / "net" / "2", model=mlp(seed=1))

    async def work() -> None:
        service = await started(home)
        over, answered = asyncio.Event(), Counter[str]()

        async def client(x: np.ndarray) -> None:
            right = {version: said_by(mlp(seed=seed), x) for seed, version in enumerate("12")}
            assert not np.isclose(right["1"], right["2"]).all(axis=1).any(), "every row tells the versions apart"
            while not over.is_set():
                answer = await service.infer(request(x))
                np.testing.assert_allclose(answer.outputs[0].data, right[answer.version], rtol=1e-4, atol=1e-5)
                answered[answer.version] += 1

        clients = [asyncio.create_task(client(rows(n))) for n in (1, 2, 3, 4)]
        for version in ("1", "2") * 4:
            await service.load("net", version)
            await service.infer(request(rows(1)))
        over.set()
        await asyncio.gather(*clients)
        assert set(answered) == {"1", "2"}
        await service.stop()
        assert not instances_left()

    run(work())


def test_killed_workers_under_load_fail_only_their_own_batch(tmp_path: Path) -> None:
    path = bundle(tmp_path / "net", serving=Serving(instances=2, isolation="process"))

    async def work() -> None:
        service = await started(path)
        over, outcomes = asyncio.Event(), Counter[str]()

        async def client() -> None:
            while not over.is_set():
                try:
                    outcome: InferResponse | ServeError = await service.infer(request(rows(1)))
                except ServerFault as error:
                    outcome = error
                outcomes[type(outcome).__name__] += 1

        clients = [asyncio.create_task(client()) for _ in range(4)]
        pool = service.models()[0].pool
        for _ in range(3):
            before = service.models()[0].statistics.restarts
            runner = next(i._runner for i in pool._ready if isinstance(i._runner, ChildRunner) and i._runner.alive())
            os.kill(runner.pid, signal.SIGKILL)
            while service.models()[0].statistics.restarts == before or pool.ready < 2:
                service.ready()
                await asyncio.sleep(0.005)
        over.set()
        await asyncio.gather(*clients)
        assert outcomes["InferResponse"] > 0
        assert outcomes["ServerFault"] <= 3 * 4
        assert service.ready()
        await service.stop()

    run(work())
