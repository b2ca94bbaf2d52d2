"""Runs on the event loop's thread: which models get them, that they are right, and what ends one that hangs."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

pytest.importorskip("httptools", reason="needs the extra 'serve'")

from hasten.deployment import Serving
from hasten.errors import DeadlineExceeded
from hasten.protocol.messages import InferResponse
from hasten.serve import pool as pools
from hasten.serve.intake import batch_axis
from hasten.serve.pace import LEAST_S, SHARE, Pace
from hasten.serve.reading import Read, read_bundle
from hasten.serve.repository import Bundle, open_repository
from hasten.serve.runner import Clock, LocalRunner, Outputs
from hasten.serve.service import Service
from hasten.serve.warm import Warming, warm
from hasten.serve.worker import HUNG_EXIT
from hasten.tensors import Feed
from hasten.testing.models import convnet
from serve.bundles import bundle, request, rows, run

Isolation = Literal["auto", "thread", "process"]


@pytest.fixture
def ran_on(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collect the threads of runs; the model counts as tiny however busy this machine is."""
    monkeypatch.setattr(pools, "INLINE_NS", 10**12)
    found: list[str] = []
    whole = LocalRunner.run

    def noted(self: LocalRunner, feed: Feed) -> Outputs:
        found.append(threading.current_thread().name)
        return whole(self, feed)

    monkeypatch.setattr(LocalRunner, "run", noted)
    return found


async def started(path: Path) -> Service:
    service = Service(open_repository(path))
    await service.start()
    assert service.ready(), service.index()
    (model,) = service.models()
    while model.line.idle() < model.pool.ready:  # they wait a moment after they said that they are ready
        await asyncio.sleep(0)
    return service


def test_requests_of_a_tiny_model_ride_together_on_the_loops_own_thread(tmp_path: Path, ran_on: list[str]) -> None:
    path = bundle(tmp_path / "net", serving=Serving(instances=2))

    async def work() -> None:
        service = await started(path)
        ran_on.clear()
        asked = [rows(1 + seed % 3, seed=seed) for seed in range(60)]
        answers = await asyncio.gather(*[service.infer(request(x)) for x in asked])
        assert set(ran_on) == {threading.current_thread().name}
        assert len(ran_on) < 60, "they were batched"
        for x, answer in zip(asked, answers, strict=True):
            alone = await service.infer(request(x))
            np.testing.assert_allclose(answer.outputs[0].data, alone.outputs[0].data, rtol=1e-4, atol=1e-5)
        await service.stop()

    run(work())


@pytest.mark.parametrize("why", ["told", "slow", "open axes"])
def test_other_models_are_run_by_their_instances(
    tmp_path: Path, ran_on: list[str], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    isolation: Isolation = "thread" if why == "told" else "auto"
    path = bundle(tmp_path / "net", serving=Serving(instances=1, isolation=isolation))
    if why == "slow":
        monkeypatch.setattr(pools, "INLINE_NS", 1)
    if why == "open axes":
        path = bundle(tmp_path / "open", model=convnet(size="side"), serving=Serving(instances=1))  # type: ignore[arg-type]

    async def work() -> None:
        service = await started(path)
        ran_on.clear()
        x = rows(2) if why != "open axes" else np.zeros((1, 3, 16, 16), np.float32)
        await service.infer(request(x))
        assert ran_on[-1].startswith("hasten")
        await service.stop()

    run(work())


def test_a_model_that_turns_slow_is_handed_over_from_then_on(
    tmp_path: Path, ran_on: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = bundle(tmp_path / "net", serving=Serving(instances=3))

    async def work() -> None:
        service = await started(path)
        (model,) = service.models()
        assert model.pool.ready == 1, "the others would have nothing to do"
        monkeypatch.setattr(pools, "INLINE_NS", 1)
        ran_on.clear()
        await service.infer(request(rows(1)))
        assert not ran_on[0].startswith("hasten")
        while model.pool.ready < 3:  # now they have
            await asyncio.sleep(0.001)
        ran_on.clear()
        for _ in range(2):
            await service.infer(request(rows(1)))
        assert all(name.startswith("hasten") for name in ran_on)
        await service.stop()

    run(work())


def test_a_request_whose_time_is_over_is_told_so(tmp_path: Path, ran_on: list[str]) -> None:
    path = bundle(tmp_path / "net")

    async def work() -> None:
        service = await started(path)
        with pytest.raises(DeadlineExceeded):
            await service.infer(request(rows(1), timeout_us=1))
        assert isinstance(await service.infer(request(rows(1), timeout_us=10**7)), InferResponse)
        await service.stop()

    run(work())


HANGING = """
import sys, time
from pathlib import Path
from hasten.serve import pool, runner
pool.INLINE_NS = 10**12
whole = runner.LocalRunner.run
def run(self, feed):
    if float(feed["x"].ravel()[0]) == 2000.0:
        time.sleep(1000)
    return whole(self, feed)
runner.LocalRunner.run = run
from hasten.serve.app import Listening, serve
serve(Path(sys.argv[1]), Listening(port=0, grpc_port=None), lambda opened: print(opened.http, flush=True))
"""


def test_a_run_that_hangs_on_the_loops_thread_ends_the_process_and_says_why(tmp_path: Path) -> None:
    path = bundle(tmp_path / "net", serving=Serving(instances=1, run_limit_ms=300))
    words = [sys.executable, "-c", HANGING, str(path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        tensor = {"name": "x", "shape": [1, 16], "datatype": "FP32", "data": [2000.0] * 16}
        body = json.dumps({"inputs": [tensor]})
        asked = ["curl", "-s", "-m", "30", "-d", body, f"{url}/v2/models/net/infer"]
        assert subprocess.run(asked, check=False, env={**os.environ}).returncode != 0
        _, said = process.communicate(timeout=60)
    assert process.returncode == HUNG_EXIT
    assert "did not end within 0.3 s" in said


def warming_by(clock_ns: Clock, read: Read, **more: Any) -> Warming:
    """Warm one row and four, by a clock of the test's own."""
    signature = read.artifact.signature
    axis = batch_axis(signature, read.deployment.batch)
    return Warming(
        signature=signature, axis=axis, sizes=(1, 4), golden=None, precision="float32", clock_ns=clock_ns, **more
    )


def test_a_tiny_model_that_is_warmed_beside_a_busy_loop_is_still_known_as_tiny(tmp_path: Path) -> None:
    """Three of four runs lose the interpreter for 600 us in their middle: what is learnt is what a run takes."""
    now_ns, runs = 0, 0
    read = read_bundle(Bundle("net", "1", bundle(tmp_path / "net"), (0, 0)))

    class Interrupted(LocalRunner):
        def run(self, feed: Feed) -> Outputs:
            nonlocal now_ns, runs
            runs += 1
            now_ns += 50_000 if runs % 4 == 0 else 650_000
            return super().run(feed)

    session = read.engine.open(read.artifact)
    warming = warming_by(lambda: now_ns, read)
    found = warm(Interrupted(session), warming)
    assert (found.costs, found.least_ns) == ({1: 50_000, 4: 50_000}, 50_000)
    session.close()


def test_fewer_rows_never_count_as_dearer_than_more_of_them(tmp_path: Path) -> None:
    """Every run of one row was disturbed; it could run as four, with padding, and those were seen at 50 us."""
    read = read_bundle(Bundle("net", "1", bundle(tmp_path / "net"), (0, 0)))
    now_ns = 0

    class Disturbed(LocalRunner):
        def run(self, feed: Feed) -> Outputs:
            nonlocal now_ns
            now_ns += 50_000 if len(feed["x"]) == 4 else 900_000
            return super().run(feed)

    session = read.engine.open(read.artifact)
    warming = warming_by(lambda: now_ns, read)
    assert warm(Disturbed(session), warming).costs == {1: 50_000, 4: 50_000}
    session.close()


def test_between_the_steps_of_reading_a_bundle_the_requests_beside_it_get_their_turn(tmp_path: Path) -> None:
    rests: list[float] = []
    where = Bundle("net", "1", bundle(tmp_path / "net"), (0, 0))
    read_bundle(where, pace=Pace(lambda: False, rests.append))
    assert not rests
    read_bundle(where, pace=Pace(lambda: True, rests.append))
    assert len(rests) == 4  # the TOML file, the manifest, the files' digests, the engine and the steps
    assert min(rests) >= LEAST_S


@pytest.mark.parametrize("beside", [False, True])
def test_a_version_that_is_warmed_beside_requests_leaves_them_two_thirds_of_the_time(
    tmp_path: Path, beside: bool
) -> None:
    read = read_bundle(Bundle("net", "1", bundle(tmp_path / "net"), (0, 0)))
    now_ns, rested_s = 0, 0.0

    class Slow(LocalRunner):
        def run(self, feed: Feed) -> Outputs:
            nonlocal now_ns
            now_ns += 40_000_000
            return super().run(feed)

    def rest(seconds: float) -> None:
        nonlocal rested_s
        rested_s += seconds

    session = read.engine.open(read.artifact)
    warming = warming_by(lambda: now_ns, read, pace=Pace(lambda: beside, rest))
    warm(Slow(session), warming)
    session.close()
    opened_s = LEAST_S
    assert rested_s == pytest.approx(opened_s + SHARE * now_ns / 1e9 if beside else 0.0)
