"""Steps that are slow, hang or end their thread: who is let in, who is told, and that an idle server serves."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hasten.deployment import Serving
from hasten.errors import DeadlineExceeded, ModelNotReady, Overloaded, ServerFault
from hasten.protocol.messages import InferRequest, InferResponse, Tensor
from hasten.serve.call import Call
from hasten.serve.model import Model
from hasten.serve.piping import Piped, Piping, _true_phases
from hasten.serve.pool import Pool
from hasten.serve.repository import open_repository
from hasten.serve.service import Service
from hasten.serve.step_threads import MOST_LOST, StepThreads
from hasten.serve.ticket import Marks
from serve.bundles import bundle, run
from serve.test_pipelines import half, submitted

CODE = """
import time
from pathlib import Path

HERE = Path(__file__).parent

def noted(value, held):
    with (HERE / "order").open("a") as file:
        file.write(f"{value:g} ")
    while held and not (HERE / "go").exists():
        time.sleep(0.005)

def before(values):
    noted(values["half"][0], values["half"][0] == 1)
    return {"x": values["half"]}

def after(values):
    noted(len(values["y"]), True)
    return {"z": values["y"]}

def ends(values):
    if values["half"][0] == 1:
        raise SystemExit(3)
    return {"x": values["half"]}
"""


def function(name: str, reads: str, makes: str, size: int) -> dict[str, Any]:
    spec = {"dtype": "float32", "shape": [size]}
    return {
        "step": "function",
        "function": f"steps.py:{name}",
        "reads": [{"name": reads, **spec}],
        "makes": [{"name": makes, **spec}],
    }


@asynccontextmanager
async def opened(
    folder: Path,
    step: str = "before",
    serving: Serving = Serving(instances=1),  # noqa: B008 - frozen
    **more: Any,
) -> AsyncIterator[tuple[Service, Piping]]:
    """Serve with a single thread for steps; a row that starts with 1 is at work until the file ``go`` is there."""
    (folder / "steps.py").write_text(CODE)
    path = bundle(folder / "net", pre=(function(step, "half", "x", 16),), serving=serving)
    service = Service(open_repository(path), code=folder, **more)
    await service.start()
    (model,) = service.models()
    assert isinstance(model, Model)
    assert model._piping is not None
    model._piping.threads.count = 1
    try:
        yield service, model._piping
    finally:
        (folder / "go").touch()
        await service.stop()


async def is_at_work(folder: Path) -> None:
    while not (folder / "order").exists():
        await asyncio.sleep(0)


def test_rows_that_were_slow_once_keep_nobody_out_of_an_idle_server(tmp_path: Path) -> None:
    async def work() -> None:
        async with opened(tmp_path, serving=Serving(instances=1, timeout_ms=5000)) as (service, piping):
            piping._row_ns = 60e9
            assert isinstance(await submitted(service, half(2)), InferResponse)
            assert piping._row_ns < 60e9, "and it is learnt that they are slow no more"

    run(work())


def test_a_single_row_that_is_slow_changes_little_of_what_a_row_is_thought_to_take(tmp_path: Path) -> None:
    async def work() -> None:
        async with opened(tmp_path) as (_, piping):
            piping._row_ns = 0.0
            piping._learn(8e6)
            first = piping._row_ns
            piping._learn(60e9)
            assert first < piping._row_ns < 2 * first

    run(work())


def test_who_would_wait_for_steps_beyond_the_objective_is_refused_at_once(tmp_path: Path) -> None:
    async def work() -> None:
        async with opened(tmp_path, serving=Serving(instances=1, objective_ms=5000)) as (service, piping):
            first = submitted(service, half(1))
            await is_at_work(tmp_path)
            piping._row_ns = 2e9
            in_time, late = submitted(service, half(2)), submitted(service, half(3))
            assert not in_time.done()
            assert isinstance(late.result(), Overloaded)
            assert late.result().reason == "predicted_wait"
            (tmp_path / "go").touch()
            assert isinstance(await first, InferResponse)
            assert isinstance(await in_time, InferResponse)

    run(work())


@pytest.mark.parametrize(("busy_ns", "wanted"), [(10**6, Overloaded), (0, InferResponse)])
def test_what_was_waited_for_steps_counts_at_the_model_unless_it_is_idle(
    tmp_path: Path, busy_ns: int, wanted: type, inside: pytest.MonkeyPatch
) -> None:
    later_ns = [0]

    async def work() -> None:
        more = {"clock_ns": lambda: time.perf_counter_ns() + later_ns[0]}
        async with opened(tmp_path, serving=Serving(instances=1, objective_ms=1000), **more) as (service, _):
            inside.setattr(Pool, "free_ns", lambda pool, now_ns: busy_ns)
            first = submitted(service, half(1))
            await is_at_work(tmp_path)
            later_ns[0] = 2 * 10**9
            (tmp_path / "go").touch()
            assert isinstance(await first, wanted)

    run(work())


def test_a_step_that_wants_to_end_the_program_fails_its_request_alone(tmp_path: Path) -> None:
    async def work() -> None:
        async with opened(tmp_path, "ends") as (service, piping):
            fault = await submitted(service, half(1))
            assert isinstance(fault, ServerFault)
            assert "SystemExit: 3" in str(fault)
            assert isinstance(await submitted(service, half(2)), InferResponse)
            assert piping.threads.count == 1

    run(work())


def test_a_file_that_ends_the_program_when_it_is_imported_fails_its_model_alone(tmp_path: Path) -> None:
    async def work() -> None:
        async with opened(tmp_path) as (service, _):
            (tmp_path / "steps.py").write_text("import sys\nsys.exit(3)\n")
            with pytest.raises(ModelNotReady, match="cannot be imported: SystemExit: 3; version 1 stays"):
                bundle(tmp_path / "net", pre=(function("ends", "half", "x", 16),))
                await service.load("net")
            assert isinstance(await submitted(service, half(2)), InferResponse)

    run(work())


@pytest.mark.parametrize("threads", [1, 2])
def test_a_time_holds_in_the_steps_after_the_model_too(tmp_path: Path, threads: int) -> None:
    """With one thread it is over while the request waits for it, with two while its steps are at work."""
    (tmp_path / "steps.py").write_text(CODE)
    path = bundle(tmp_path / "net", post=(function("after", "y", "z", 4),), serving=Serving(instances=1))

    def ask(timeout_us: int) -> InferRequest:
        return InferRequest(model="net", inputs=(Tensor.of("x", np.zeros((1, 16), np.float32)),), timeout_us=timeout_us)

    async def work() -> None:
        service = Service(open_repository(path), code=tmp_path)
        await service.start()
        (model,) = service.models()
        assert isinstance(model, Model)
        assert model._piping is not None
        model._piping.threads.count = threads
        first = submitted(service, ask(0))
        await is_at_work(tmp_path)
        late = submitted(service, ask(150_000))
        done, _ = await asyncio.wait({first, late}, return_when=asyncio.FIRST_COMPLETED)
        assert done == {late}
        assert isinstance(late.result(), DeadlineExceeded)
        (tmp_path / "go").touch()
        assert isinstance(await first, InferResponse)
        await service.stop()

    try:
        run(work())
    finally:
        (tmp_path / "go").touch()
    assert len((tmp_path / "order").read_text().split()) == threads, "what is late is not begun"


@pytest.mark.parametrize(("made", "told"), [("None", "with None; declared is string"), (r"'\ud800'", "no")])
def test_what_is_no_text_where_a_step_is_to_make_some_is_a_fault_of_the_server(
    tmp_path: Path, made: str, told: str
) -> None:
    (tmp_path / "steps.py").write_text(f"def words(values):\n    return {{'z': [{made}] * len(values['y'])}}\n")
    step = function("words", "y", "z", 4) | {"makes": [{"name": "z", "dtype": "string"}]}
    path = bundle(tmp_path / "net", post=(step,), serving=Serving(instances=1))

    async def work() -> None:
        service = Service(open_repository(path), code=tmp_path)
        await service.start()
        x = np.zeros((1, 16), np.float32)
        fault = await submitted(service, InferRequest(model="net", inputs=(Tensor.of("x", x),)))
        assert isinstance(fault, ServerFault)
        assert told in str(fault)
        await service.stop()

    run(work())


def test_waiting_for_a_thread_after_the_model_is_told_as_queue() -> None:
    marks = Marks([0, 10, 20, 30, 40, 50, 60, 900, 0, 0])
    call = Call(InferRequest(model="net", inputs=()), marks, lambda outcome: None, 1, lambda call, outcome: None)
    piped = Piped(call, rows=1, n_bytes=0, deadline_ns=0)
    piped.began_ns = piped.entered_ns = 20
    piped.seen_ns = 860
    before = marks.phases_ns()
    _true_phases(piped)
    after = marks.phases_ns()
    changed = {name: after[name] - before[name] for name in after if after[name] != before[name]}
    assert changed == {"queue": 800, "post": -800}


def test_threads_that_hang_are_replaced_up_to_a_bound_and_come_back() -> None:
    threads = StepThreads("net", 2)
    for _ in range(2 * MOST_LOST):
        assert not threads.stuck
        threads.lost()
    assert threads.count == 2 + 2 * MOST_LOST
    for _ in range(2):
        assert not threads.stuck, "the usual number still works"
        threads.lost()
    assert (threads.stuck, threads.count) == (True, 2 + 2 * MOST_LOST)
    threads.found()
    assert (threads.stuck, threads.count) == (False, 2 + 2 * MOST_LOST)
    for _ in range(2 * MOST_LOST + 1):
        threads.found()
    assert threads.count == 2
    threads.close()


def test_where_every_thread_hangs_those_that_wait_and_those_that_come_are_told(tmp_path: Path) -> None:
    async def work() -> None:
        async with opened(tmp_path, serving=Serving(instances=1, run_limit_ms=50.0)) as (service, piping):
            most = 1 + piping.threads._spare
            hung = [submitted(service, half(1)) for _ in range(most + 3)]
            faults = [str(fault) for fault in await asyncio.gather(*hung)]
            assert sum("did not end within 0.05 s" in text for text in faults) == most
            assert sum("all threads for its steps hang" in text for text in faults) == 3
            assert "all threads for its steps hang" in str(await submitted(service, half(2)))
            (tmp_path / "go").touch()
            while piping.threads.stuck:
                await asyncio.sleep(0)
            assert isinstance(await submitted(service, half(2)), InferResponse)

    run(work())
