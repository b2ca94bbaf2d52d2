"""What the service answers, refuses and tells, on real models."""

from __future__ import annotations

import asyncio
import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hasten.deployment import Serving
from hasten.engines.onnxruntime import OnnxRuntime
from hasten.errors import BadRequest, ModelNotFound, ModelNotReady, Overloaded, ServeError, ServerFault, TooLarge
from hasten.protocol.messages import Form, InferRequest, InferResponse, RequestedOutput, Tensor
from hasten.serve import call as calls
from hasten.serve.call import Call
from hasten.serve.intake import Intake
from hasten.serve.model import MOST_RUNS
from hasten.serve.repository import open_repository
from hasten.serve.runner import LocalRunner
from hasten.serve.service import Service
from hasten.serve.ticket import Marks
from hasten.store import read_artifact
from hasten.tensors import Array, Signature, TensorSpec
from hasten.testing.models import encoder, mlp
from serve.bundles import bundle, request, rows, run


def alone(path: Path, x: Array) -> Array:
    """Give what a bare session of a bundle says."""
    return OnnxRuntime().open(read_artifact(path.parent / "model")).run({"x": x})["y"]


async def started(path: Path) -> Service:
    service = Service(open_repository(path))
    await service.start()
    assert service.ready(), service.index()
    return service


def test_a_request_gets_what_a_bare_session_says(tmp_path: Path) -> None:
    path = bundle(tmp_path / "net")

    async def work() -> None:
        service = await started(path)
        answer = await service.infer(request(rows(3), id="seven"))
        await service.stop()
        assert (answer.id, answer.model, answer.version) == ("seven", "net", "1")
        np.testing.assert_allclose(answer.outputs[0].data, alone(path, rows(3)), rtol=1e-5, atol=1e-6)

    run(work())


def test_a_request_of_more_rows_than_a_thousand_runs_is_refused_before_it_is_cut(
    tmp_path: Path, inside: pytest.MonkeyPatch
) -> None:
    path = bundle(tmp_path / "net", serving=Serving(instances=1, queue_rows=100))
    cut: list[int] = []
    divide = Call.divide
    inside.setattr(Call, "divide", lambda call, taken, largest: (cut.append(taken.rows), divide(call, taken, largest)))

    async def work() -> None:
        service = await started(path)
        most = MOST_RUNS * service.models()[0].sizes[-1]  # type: ignore[union-attr]
        many = np.broadcast_to(rows(1), (most + 1, 16))
        with pytest.raises(TooLarge, match=f"has {most + 1} rows; at most {most} are taken at once"):
            await service.infer(request(many))
        answer = await service.infer(request(many[:500]))
        assert len(answer.outputs[0].data) == 500  # more than may wait, where nobody else does
        assert cut == [500]
        await service.stop()

    run(work())


def test_a_request_that_is_refused_is_not_cut(tmp_path: Path, inside: pytest.MonkeyPatch) -> None:
    path = bundle(tmp_path / "net", serving=Serving(instances=1, concurrency=1))

    async def work() -> None:
        service = await started(path)
        first = asyncio.create_task(service.infer(request(rows(1))))
        await asyncio.sleep(0)
        inside.setattr(Call, "divide", lambda *_: pytest.fail("it was cut"))
        with pytest.raises(Overloaded, match="1 may be"):
            await service.infer(request(rows(8000)))
        await first
        await service.stop()

    run(work())


@pytest.mark.parametrize("isolation", ["thread", "process"])
def test_a_hundred_requests_at_once_each_get_their_own_rows(tmp_path: Path, isolation: str) -> None:
    path = bundle(tmp_path / "net", serving=Serving(instances=2, isolation=isolation))  # type: ignore[arg-type]

    async def work() -> None:
        service = await started(path)
        asked = [rows(1 + seed % 3, seed=seed) for seed in range(100)]
        answers = await asyncio.gather(*[service.infer(request(x)) for x in asked])
        stats = service.statistics("net")["model_stats"][0]
        await service.stop()
        for x, answer in zip(asked, answers, strict=True):
            np.testing.assert_allclose(answer.outputs[0].data, alone(path, x), rtol=1e-4, atol=1e-5)
        assert stats["inference_count"] == sum(map(len, asked))
        assert stats["execution_count"] < 100, "they were batched"
        assert {entry["batch_size"] for entry in stats["batch_stats"]} <= {1, 2, 4, 8}

    run(work())


def test_a_request_larger_than_the_largest_batch_comes_back_whole(tmp_path: Path) -> None:
    path = bundle(tmp_path / "net", serving=Serving(instances=2, batch_sizes=(1, 4)))

    async def work() -> None:
        service = await started(path)
        answer = await service.infer(request(rows(11)))
        await service.stop()
        np.testing.assert_allclose(answer.outputs[0].data, alone(path, rows(11)), rtol=1e-4, atol=1e-5)

    run(work())


@pytest.mark.parametrize("isolation", ["auto", "thread", "process"])
@pytest.mark.parametrize("batch", [1, 4])
def test_a_model_with_a_fixed_batch_takes_fewer_rows_and_more(tmp_path: Path, batch: int, isolation: Any) -> None:
    path = bundle(tmp_path / "net", batch=batch, serving=Serving(instances=1, isolation=isolation))

    async def work() -> None:
        service = await started(path)
        few, many = rows(7)[:3], rows(7)
        answers = await asyncio.gather(service.infer(request(few)), service.infer(request(many)))
        about, config = service.model_metadata("net"), service.config("net")
        await service.stop()
        wanted = np.concatenate([alone(path, np.resize(row, (batch, 16)))[:1] for row in many])
        for answer, n_rows in zip(answers, (3, 7), strict=True):
            np.testing.assert_allclose(answer.outputs[0].data, wanted[:n_rows], rtol=1e-4, atol=1e-5)
        assert about.inputs[0].shape == (-1, 16)
        assert config["max_batch_size"] == batch
        assert config["input"] == [{"name": "x", "data_type": "TYPE_FP32", "dims": [16]}]

    run(work())


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (InferRequest(model="net", inputs=()), "input 'x' is missing"),
        (request(rows(2).astype(np.float64)), "wants dtype float32, got float64"),
        (request(rows(2)[:, :5]), "wants length 16 on axis 1"),
        (request(rows(0)), "is empty"),
        (request(rows(1), outputs=(RequestedOutput(name="z"),)), "no output 'z'; it has ['y']"),
        (request(rows(1), outputs=(RequestedOutput(name="y"), RequestedOutput(name="y"))), "asked for twice"),
        (InferRequest(model="net", inputs=(Tensor.of("x", rows(1)), Tensor.of("x", rows(1)))), "given twice"),
        (InferRequest(model="net", inputs=(Tensor.of("w", rows(1)), Tensor.of("x", rows(1)))), "no input 'w'"),
    ],
)
def test_what_does_not_fit_is_told_with_the_tensor(tmp_path: Path, asked: InferRequest, says: str) -> None:
    path = bundle(tmp_path / "net")

    async def work() -> None:
        service = await started(path)
        with pytest.raises(BadRequest, match=says.replace("[", r"\[").replace("]", r"\]")):
            await service.infer(asked)
        await service.stop()

    run(work())


def test_unknown_names_and_versions_are_not_found(tmp_path: Path) -> None:
    path = bundle(tmp_path / "net")

    async def work() -> None:
        service = await started(path)
        for asked in (request(rows(1), model="other"), request(rows(1), version="9")):
            with pytest.raises(ModelNotFound):
                await service.infer(asked)
        with pytest.raises(ModelNotFound):
            await service.load("../net")
        await service.stop()
        with pytest.raises(ServeError):
            await service.infer(request(rows(1)))

    run(work())


def test_the_phases_of_an_answer_add_up_to_its_time(tmp_path: Path) -> None:
    path = bundle(tmp_path / "net")

    async def work() -> None:
        service = await started(path)
        heard: list[InferResponse | ServeError] = []
        arrived, marks = asyncio.Event(), Marks()
        marks.ns[0] = marks.ns[1] = marks.ns[2] = service._clock_ns()

        def done(outcome: InferResponse | ServeError) -> None:
            heard.append(outcome)
            arrived.set()

        service.submit(request(rows(2)), marks, done)
        await arrived.wait()
        marks.ns[8] = marks.ns[9] = service._clock_ns()
        assert marks.ns == sorted(marks.ns), "every mark is later than the one before"
        assert sum(marks.phases_ns().values()) == marks.ns[9] - marks.ns[0]
        (answer,) = heard
        assert isinstance(answer, InferResponse)
        service.sent(answer, marks)
        figures = service.models()[0].statistics
        assert figures.total.total_ns == sum(phase.total_ns for phase in figures.phases.values())
        assert figures.total.count == 1
        await service.stop()

    run(work())


def test_a_cancelled_request_is_not_answered(tmp_path: Path) -> None:
    path = bundle(tmp_path / "net")

    async def work() -> None:
        service = await started(path)
        heard: list[object] = []
        ticket = service.submit(request(rows(1)), Marks(), heard.append)
        ticket.cancel()
        ticket.cancel()
        await service.infer(request(rows(1)))
        assert heard == []
        assert service.models()[0].statistics.refused == {"cancelled": 1}
        assert service.models()[0].pool.calls == 0
        await service.stop()

    run(work())


def test_stopping_finishes_what_is_inside(tmp_path: Path) -> None:
    path = bundle(tmp_path / "net")

    async def work() -> None:
        service = await started(path)
        answers = [asyncio.create_task(service.infer(request(rows(1, seed=s)))) for s in range(40)]
        await asyncio.sleep(0)
        service.drain()
        assert not service.ready()
        assert await service.stop()
        assert len(await asyncio.gather(*answers)) == 40
        with pytest.raises(ModelNotReady):
            await service.infer(request(rows(1)))

    run(work())


def test_inputs_of_other_lengths_run_apart(tmp_path: Path) -> None:
    path = bundle(tmp_path / "net", model=encoder())

    async def work() -> None:
        service = await started(path)
        x = np.random.default_rng(0).standard_normal((2, 8, 16)).astype(np.float32)
        answer = await service.infer(request(x))
        await service.stop()
        np.testing.assert_allclose(answer.outputs[0].data, alone(path, x), rtol=1e-4, atol=1e-5)

    run(work())
    gc.collect()


def test_every_model_of_a_folder_is_served_under_the_name_of_its_folder(tmp_path: Path) -> None:
    home = tmp_path / "models"
    bundle(home / "one" / "1")
    bundle(home / "one" / "2", model=mlp(seed=1))
    bundle(home / "two", model=mlp(seed=2))

    async def work() -> None:
        service = await started(home)
        assert (await service.infer(request(rows(1), model="one"))).version == "2"
        assert (await service.infer(request(rows(1), model="two"))).version == "1"
        states = {(entry["name"], entry["version"]): entry["state"] for entry in service.index()}
        assert states == {("one", "1"): "UNAVAILABLE", ("one", "2"): "READY", ("two", "1"): "READY"}
        await service.stop()

    run(work())


def test_an_answer_that_cannot_be_put_together_is_told_and_holds_nothing(
    tmp_path: Path, inside: pytest.MonkeyPatch
) -> None:
    """As where an output's length depends on the data, and the pieces of a large request differ in it."""
    path = bundle(tmp_path / "net")
    inside.setattr(calls, "glue", lambda parts: np.concatenate([np.ones((1, 2)), np.ones((1, 3))]))

    async def work() -> None:
        service = await started(path)
        with pytest.raises(ServerFault, match="its answer could not be put together: ValueError"):
            await service.infer(request(rows(20)))
        assert service.models()[0].inside == 0
        assert await service.stop()

    run(work())


def test_an_answer_that_cannot_be_made_is_told_and_holds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where an engine leaves out an output that its model has."""
    path = bundle(tmp_path / "net")
    whole = LocalRunner.run

    async def work() -> None:
        service = await started(path)
        monkeypatch.setattr(LocalRunner, "run", lambda runner, feed: {"z": whole(runner, feed)["y"]})
        with pytest.raises(ServerFault, match="its answer could not be put together: KeyError: 'y'"):
            await service.infer(request(rows(1)))
        spans = service.models()[0].statistics.spans
        assert (service.models()[0].inside, spans["success"].count, spans["fail"].count) == (0, 0, 1)
        monkeypatch.undo()
        assert (await service.infer(request(rows(1)))).outputs[0].name == "y"
        assert await service.stop()

    run(work())


def test_rows_that_a_model_leaves_out_are_nobodys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where its output is as long as its data say: no client may get the row of another."""
    path = bundle(tmp_path / "net")
    whole = LocalRunner.run

    async def work() -> None:
        service = await started(path)
        monkeypatch.setattr(LocalRunner, "run", lambda runner, feed: {"y": whole(runner, feed)["y"][:-1]})
        together = [service.infer(request(rows(1))) for _ in range(4)]
        told = await asyncio.gather(*together, return_exceptions=True)
        assert all(isinstance(each, ServerFault) for each in told)
        assert "has the shape [3, 4] for a batch of 4 rows" in str(told[0])
        assert (service.models()[0].inside, service.models()[0].statistics.spans["success"].count) == (0, 0)
        monkeypatch.undo()
        assert (await service.infer(request(rows(1)))).outputs[0].data.shape == (1, 4)
        assert await service.stop()

    run(work())


def test_what_was_found_of_a_form_holds_for_the_model_that_found_it_alone() -> None:
    """A known head goes to another version after a swap, whose signature may be another."""
    asked = InferRequest(
        model="net",
        inputs=(Tensor(name="x", datatype="FP32", data=np.zeros((2, 3), np.float32)),),
        outputs=(RequestedOutput(name="y"),),
        form=Form(),
    )
    y = TensorSpec("y", "float32", ("b", 1))
    old = Intake(Signature((TensorSpec("x", "float32", ("b", 3)),), (y,)), "b")
    wider = Intake(Signature((TensorSpec("x", "float32", ("b", 4)),), (y,)), "b")
    other = Intake(Signature((TensorSpec("x", "float32", ("b", 3)),), (TensorSpec("z", "float32", ("b", 1)),)), "b")
    for _ in range(2):
        assert (old.take(asked).rows, old.take(asked).n_bytes) == (2, 24)
        with pytest.raises(BadRequest, match="wants length 4"):
            wider.take(asked)
        with pytest.raises(BadRequest, match="no output 'y'"):
            other.take(asked)


def test_texts_count_by_their_letters(tmp_path: Path) -> None:
    intake = Intake(Signature((TensorSpec("t", "string", ("b",)),), ()), "b")
    held = np.empty(2, object)
    held[:] = [b"x" * 1000, b"y" * 500]
    asked = InferRequest(model="net", inputs=(Tensor(name="t", datatype="BYTES", data=held),))
    for _ in range(2):  # the second time by its known shape
        assert intake.take(asked).n_bytes >= 1500
    taken = intake.take(asked)
    call = Call(asked, Marks(), done=lambda _: None, priority=1, finish=lambda *_: None)
    call.divide(taken, 1)
    assert sum(piece.n_bytes for piece in call.pieces) >= 1500
