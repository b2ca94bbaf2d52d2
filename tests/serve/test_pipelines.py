"""Deployments with steps: a client sends files and gets labels, and a bad row is its own request's alone."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hasten.deployment import Serving
from hasten.engines.onnxruntime import OnnxRuntime
from hasten.errors import (
    BadRequest,
    DeadlineExceeded,
    ModelNotFound,
    ModelNotReady,
    Overloaded,
    ServerFault,
    SignatureMismatch,
    StoreError,
    TooLarge,
)
from hasten.protocol.messages import InferRequest, InferResponse, Tensor
from hasten.samples.preprocess import Preprocess
from hasten.serve.intake import opened
from hasten.serve.model import Model
from hasten.serve.piping import Piping
from hasten.serve.pool import Pool
from hasten.serve.reading import read_bundle
from hasten.serve.repository import open_repository
from hasten.serve.service import Service
from hasten.serve.step_threads import StepThreads
from hasten.serve.ticket import Marks
from hasten.steps.function import Declared, Function, load
from hasten.steps.pipeline import open_pipeline
from hasten.steps.step import Around
from hasten.store import read_artifact
from hasten.tensors import Array, Signature, TensorSpec
from hasten.testing.models import convnet
from serve.bundles import bundle, instances_left, request, rows, run
from serve.photos import BEST, CLASSES, NORMALISE, POST, PRE, SIZE, asking, photo
from serve.schedulers import Told

LEAST_URGENT = 1000
PREPROCESS = Preprocess(resize=(SIZE, SIZE), mean=(0.5,), std=(0.25,))


def made(folder: Path, **more: Any) -> Path:
    """Write a bundle of a network on images, with steps around it."""
    told: dict[str, Any] = {"pre": PRE, "post": POST, "classes": list(CLASSES), **more}
    return bundle(folder, model=convnet(size=SIZE), **told)


async def started(path: Path, **more: Any) -> Service:
    service = Service(open_repository(path), **more)
    await service.start()
    assert service.ready(), service.index()
    return service


def scores(path: Path, *data: bytes) -> Array:
    """Give what a bare session says of the files, read as samples are."""
    x = np.stack([PREPROCESS.apply_image(each) for each in data])
    return OnnxRuntime().open(read_artifact(path.parent / "model")).run({"x": x})["y"]


def outputs(answer: InferResponse) -> dict[str, Array]:
    return {tensor.name: tensor.data for tensor in answer.outputs}


def expected(path: Path, *data: bytes) -> tuple[list[list[bytes]], Array]:
    raw = scores(path, *data).astype(np.float64)
    shares = np.exp(raw) / np.exp(raw).sum(axis=1, keepdims=True)
    order = np.argsort(-shares, axis=1)[:, :2]
    return [[CLASSES[i].encode() for i in row] for row in order], np.take_along_axis(shares, order, axis=1)


def test_a_photo_gets_labels_as_a_bare_session_has_them(tmp_path: Path) -> None:
    path = made(tmp_path / "net")
    sent = [photo(1), photo(2, form="PNG", height=70), photo(3, form="WEBP", width=9)]

    async def work() -> None:
        service = await started(path)
        got = outputs(await service.infer(asking(*sent, id="7")))
        about = service.model_metadata("net")
        await service.stop()
        labels, shares = expected(path, *sent)
        assert got["label"].tolist() == labels
        np.testing.assert_allclose(got["score"], shares, rtol=1e-4)
        assert [(t.name, t.datatype, t.shape) for t in about.inputs] == [("image", "BYTES", (-1,))]
        assert [(t.name, t.datatype, t.shape) for t in about.outputs] == [
            ("label", "BYTES", (-1, 2)),
            ("score", "FP32", (-1, 2)),
        ]

    run(work())
    assert not instances_left()


def test_pictures_of_any_size_share_a_batch_and_a_bad_one_fails_alone(tmp_path: Path) -> None:
    path = made(tmp_path / "net", serving=Serving(instances=1, batch_sizes=(1, 8)))
    good = [photo(seed, height=20 + seed, width=60 - seed) for seed in range(24)]

    async def work() -> None:
        service = await started(path)
        bad = [b"no image at all", photo(1)[:200], b"", photo(9, form="GIF")]
        asked = [asking(each) for each in good] + [asking(photo(0), each, photo(2)) for each in bad]
        answers = await asyncio.gather(*map(service.infer, asked), return_exceptions=True)
        stats = service.statistics("net")["model_stats"][0]
        refused = service.models()[0].statistics.refused
        await service.stop()
        for data, answer in zip(good, answers[: len(good)], strict=True):
            assert isinstance(answer, InferResponse)
            assert outputs(answer)["label"].tolist() == expected(path, data)[0]
        for answer in answers[len(good) :]:
            assert isinstance(answer, BadRequest)
            assert str(answer).startswith("row 1: "), answer
        assert stats["inference_count"] == len(good)
        assert stats["execution_count"] < len(good), "they were batched"
        assert refused == {"bad_request": len(bad)}

    run(work())


def test_the_phases_tell_where_the_time_of_the_steps_went(tmp_path: Path) -> None:
    path = made(tmp_path / "net")

    async def work() -> None:
        service = await started(path)
        heard: list[Any] = []
        arrived, marks, asked = asyncio.Event(), Marks(), asking(photo(0, height=1500, width=2000))
        marks.ns[0] = marks.ns[1] = marks.ns[2] = service._clock_ns()

        def done(outcome: Any) -> None:
            heard.append(outcome)
            arrived.set()

        service.submit(asked, marks, done)
        await arrived.wait()
        marks.ns[8] = marks.ns[9] = service._clock_ns()
        assert marks.ns == sorted(marks.ns), "every mark is later than the one before"
        phases = marks.phases_ns()
        assert sum(phases.values()) == marks.ns[9] - marks.ns[0]
        assert phases["pre"] > 0.5 * sum(phases.values()), "decoding three million pixels is most of it"
        assert phases["post"] > 0
        await service.stop()

    run(work())


def test_a_client_that_leaves_while_its_steps_run_hears_nothing(tmp_path: Path) -> None:
    path = made(tmp_path / "net")

    async def work() -> None:
        service = await started(path)
        heard: list[object] = []
        ticket = service.submit(asking(*[photo(1)] * 50), Marks(), heard.append)
        ticket.cancel()
        ticket.cancel()
        assert len((await service.infer(asking(photo(1)))).outputs) == 2
        assert heard == []
        assert service.models()[0].statistics.refused == {"cancelled": 1}
        await service.stop()

    run(work())
    assert not instances_left()


def test_stopping_finishes_what_is_in_the_steps(tmp_path: Path) -> None:
    path = made(tmp_path / "net")

    async def work() -> None:
        service = await started(path)
        answers = [asyncio.create_task(service.infer(asking(photo(seed)))) for seed in range(30)]
        await asyncio.sleep(0)
        assert await service.stop()
        assert all(isinstance(answer, InferResponse) for answer in await asyncio.gather(*answers))

    run(work())
    assert not instances_left()


def test_more_rows_or_bytes_than_may_wait_are_refused_before_a_row_is_decoded(tmp_path: Path) -> None:
    path = made(tmp_path / "net", serving=Serving(instances=1, queue_rows=8, queue_bytes=100_000))

    async def work() -> None:
        service = await started(path)
        with pytest.raises(TooLarge, match="9 rows"):
            await service.infer(asking(*[b""] * 9))
        with pytest.raises(TooLarge, match="200000 bytes"):
            await service.infer(asking(b"0" * 200_000))
        await service.stop()

    run(work())


def test_the_time_of_a_request_runs_out_in_its_steps(tmp_path: Path) -> None:
    path = made(tmp_path / "net")

    async def work() -> None:
        service = await started(path)
        large = photo(0, height=1500, width=2000)
        with pytest.raises(DeadlineExceeded):
            await service.infer(asking(*[large] * 8, timeout_us=1000))
        await service.stop()

    run(work())


def test_the_model_itself_answers_under_its_raw_name_where_the_deployment_says_so(tmp_path: Path) -> None:
    with_raw, without = made(tmp_path / "net", raw=True), made(tmp_path / "other")
    x = np.stack([PREPROCESS.apply_image(photo(1))])

    async def work() -> None:
        service = await started(with_raw)
        answer = await service.infer(request(x, model="net.raw"))
        np.testing.assert_allclose(answer.outputs[0].data, scores(with_raw, photo(1)), rtol=1e-5, atol=1e-6)
        assert (answer.model, answer.version) == ("net.raw", "1")
        about = service.model_metadata("net.raw")
        assert (about.name, about.inputs[0].datatype, about.inputs[0].shape) == ("net.raw", "FP32", (-1, 3, 16, 16))
        assert service.config("net.raw")["name"] == "net.raw"
        with pytest.raises(BadRequest, match="'image' is missing"):
            await service.infer(request(x))
        await service.stop()
        service = await started(without)
        with pytest.raises(ModelNotFound):
            await service.infer(request(x, model="net.raw"))
        await service.stop()

    run(work())


@pytest.mark.parametrize(
    ("told", "says"),
    [
        ({"pre": ({"step": "decode-imgae"},)}, "did you mean 'decode-image'"),
        ({"pre": ({"input": "image"},)}, 'pre step 1 has no step = "NAME"'),
        ({"pre": (*PRE[:1], {"step": "resize", "hieght": 3})}, r"pre step 2 \(resize\): .*did you mean 'height'"),
        ({"pre": (*PRE[:1], NORMALISE)}, r"pre step 2 \(normalise\): the steps give x: float32\[3, height, width\]"),
        ({"pre": (*PRE[:2], {**NORMALISE, "dtype": "float64"})}, "float64.*takes x: float32"),
        ({"pre": (*PRE[:2], {**NORMALISE, "output": "z"})}, "leaves z: .* which the model does not take"),
        ({"pre": (*PRE[:2], {**NORMALISE, "mean": [0.1, 0.2]})}, "one value, or three"),
        ({"pre": (PRE[0], PRE[0])}, r"pre step 2 \(decode-image\): it wants a file's bytes"),
        ({"pre": ({"step": "softmax", "input": "y"},)}, r"stands under \[\[post\]\], not under \[\[pre\]\]"),
        (
            {"post": ({"step": "softmax", "input": "z"},)},
            r"post step 1 \(softmax\): it reads 'z'.*only 'y'",
        ),
        ({"post": ({"step": "top-k", "input": "y", "k": 9},)}, "k = 9, and 'y' has 4 classes"),
        ({"post": (BEST,), "classes": ["one"]}, "names 1 classes, and 'y' has 4"),
        ({"post": ({**BEST, "labels": "../labels.txt"},)}, "lies outside of"),
        ({"post": ({**BEST, "labels": "labels.txt"},)}, "there is no file .*labels.txt"),
    ],
)
def test_a_step_that_does_not_fit_is_one_clear_error_at_load(tmp_path: Path, told: dict[str, Any], says: str) -> None:
    path = made(tmp_path / "net", **told)
    with pytest.raises(StoreError, match=says) as caught:
        read_bundle(open_repository(path).find("net"))
    assert str(caught.value).startswith(str(path))


def test_a_model_without_a_batch_axis_has_no_steps(tmp_path: Path) -> None:
    path = bundle(tmp_path / "net", model=convnet(size=SIZE), batch=4, pre=PRE)
    assert read_bundle(open_repository(path).find("net")).pipeline is not None
    text = path.read_text().replace("batch = 4", "batch = 3")
    path.write_text(text)
    with pytest.raises(StoreError, match="no batch axis"):
        read_bundle(open_repository(path).find("net"))


@pytest.mark.parametrize("batch", [1, 4])
def test_steps_work_with_a_model_of_a_fixed_batch(tmp_path: Path, batch: int) -> None:
    path = made(tmp_path / "net", batch=batch)
    sent = [photo(seed) for seed in range(6)]

    async def work() -> None:
        service = await started(path)
        got = outputs(await service.infer(asking(*sent)))
        await service.stop()
        x = np.stack([PREPROCESS.apply_image(each) for each in sent])
        session = OnnxRuntime().open(read_artifact(path.parent / "model"))
        raw = np.concatenate([session.run({"x": np.repeat(row[None], batch, axis=0)})["y"][:1] for row in x])
        assert got["label"][:, 0].tolist() == [CLASSES[i].encode() for i in raw.argmax(axis=1)]

    run(work())


def with_own_rows(batch: int | str, *names: str) -> Signature:
    """Give a model that calls an axis of its own as the batch axis is called."""
    inputs = tuple(TensorSpec(name, "float32", (batch, "rows", 4)) for name in names)
    return Signature(inputs, (TensorSpec("y", "float32", (batch, "rows")),))


def test_an_axis_of_the_models_own_that_is_called_rows_is_not_the_batchs() -> None:
    post = ({"step": "rename", "input": "y", "to": "sums"},)
    pipeline = open_pipeline({"post": post}, with_own_rows("n", "x", "z"), Around(folder=Path()), where="it")
    assert pipeline is not None
    for signature in (pipeline.signature, opened(with_own_rows(1, "x", "z"))):
        x, z = np.zeros((2, 3, 4), np.float32), np.zeros((2, 5, 4), np.float32)
        signature.check({"x": x, "z": x})
        with pytest.raises(SignatureMismatch, match=r"'z' has model\.rows = 5, but 'x' has model\.rows = 3"):
            signature.check({"x": x, "z": z})
        with pytest.raises(SignatureMismatch, match=r"'z' has rows = 1, but 'x' has rows = 2"):
            signature.check({"x": x, "z": x[:1]})


CODE = """
import time
from pathlib import Path

import numpy as np

def halve(values):
    x = values["half"]
    if not np.isfinite(x).all():
        raise ValueError("values must be finite")
    return {"x": x * 2}

def hang(values):
    while values["half"][0] and not (Path(__file__).parent / "go").exists():
        time.sleep(0.005)
    return {"x": values["half"]}

def wrong(values):
    return {"x": "text"}

def short(values):
    return {"x": values["half"][:8]}

def in_place(values):
    x = values["half"]
    x *= 2
    return {"x": x}

def lost_row(values):
    return {"z": values["y"][1:]}

def narrow(values):
    return {"z": values["y"][:, :1]}

def clear(values):
    values["y"][:] = 0
    return {"z": values["y"]}

def noted(values):
    with (Path(__file__).parent / "order").open("a") as file:
        file.write(f"{values['half'][0]:g} ")
    return hang(values) if values["half"][0] == 1 else {"x": values["half"]}
"""


def with_code(folder: Path, name: str, **more: Any) -> Path:
    spec = {"dtype": "float32", "shape": [16]}
    step = {
        "step": "function",
        "function": f"steps.py:{name}",
        "reads": [{"name": "half", **spec}],
        "makes": [{"name": "x", **spec}],
    }
    return bundle(folder, pre=(step,), **more)


def test_the_users_own_function_runs_where_the_operator_allows_it(tmp_path: Path) -> None:
    path, code = with_code(tmp_path / "net", "halve"), tmp_path / "code"
    code.mkdir()
    (code / "steps.py").write_text(CODE)
    x = rows(3)

    async def work() -> None:
        service = Service(open_repository(path))
        await service.start()
        assert "runs no code of deployments; see --allow-code" in service.index()[0]["reason"]
        await service.stop()
        service = await started(path, code=code)
        half = InferRequest(model="net", inputs=(Tensor.of("half", x / 2),))
        session = OnnxRuntime().open(read_artifact(path.parent / "model"))
        np.testing.assert_allclose((await service.infer(half)).outputs[0].data, session.run({"x": x})["y"], rtol=1e-4)
        with pytest.raises(BadRequest, match=r"row 1: steps\.py:halve: values must be finite"):
            bad = x.copy()
            bad[1, 0] = np.nan
            await service.infer(InferRequest(model="net", inputs=(Tensor.of("half", bad),)))
        await service.stop()

    run(work())


def test_code_outside_of_the_allowed_folder_is_not_run(tmp_path: Path) -> None:
    code = tmp_path / "code"
    code.mkdir()
    (tmp_path / "steps.py").write_text(CODE)
    for reference in ("../steps.py:halve", str(tmp_path / "steps.py:halve"), "other.py:halve"):
        with pytest.raises(StoreError, match="below the folder of code"):
            load(reference, code)


def test_a_function_that_gives_something_else_is_a_fault_of_the_server_alone(tmp_path: Path) -> None:
    path = with_code(tmp_path / "net", "wrong")
    (tmp_path / "steps.py").write_text(CODE)

    async def work() -> None:
        service = await started(path, code=tmp_path)
        with pytest.raises(ServerFault, match="gave 'x' as <U4; declared is float32"):
            await service.infer(InferRequest(model="net", inputs=(Tensor.of("half", rows(1)),)))
        await service.stop()

    run(work())


def with_code_after(folder: Path, name: str, **more: Any) -> Path:
    spec = {"dtype": "float32", "shape": [4]}
    reads, makes = [{"name": "y", **spec}], [{"name": "z", **spec}]
    step = {"step": "function", "function": f"steps.py:{name}", "reads": reads, "makes": makes}
    return bundle(folder, post=(step,), **more)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("short", r"steps.py:short gave .*'x' wants length 16 on axis 0 of \[16\], got 8"),
        ("lost_row", r"'z' wants length 3 on axis 0 of \[3, 4\], got 2"),
        ("narrow", r"'z' wants length 4 on axis 1 of \[3, 4\], got 1"),
    ],
)
def test_a_function_that_gives_another_shape_is_a_fault_of_the_server(tmp_path: Path, name: str, says: str) -> None:
    path = (with_code if name == "short" else with_code_after)(tmp_path / "net", name)
    (tmp_path / "steps.py").write_text(CODE)

    async def work() -> None:
        service = await started(path, code=tmp_path)
        sent = Tensor.of("half" if name == "short" else "x", rows(3))
        with pytest.raises(ServerFault, match=says):
            await service.infer(InferRequest(model="net", inputs=(sent,)))
        await service.stop()

    run(work())


def test_a_function_may_write_to_what_it_is_given_and_nobody_else_sees_it(tmp_path: Path) -> None:
    path = with_code(tmp_path / "net", "in_place")
    (tmp_path / "steps.py").write_text(CODE)
    x = rows(2)
    kept = x.copy()
    x.flags.writeable = False  # as what comes off the wire is

    async def work() -> None:
        service = await started(path, code=tmp_path)
        asked = InferRequest(model="net", inputs=(Tensor.of("half", x),))
        first = (await service.infer(asked)).outputs[0].data
        np.testing.assert_array_equal((await service.infer(asked)).outputs[0].data, first)
        x.flags.writeable = True
        assert (await service.infer(asked)).outputs[0].data.shape == first.shape
        np.testing.assert_array_equal(x, kept)
        await service.stop()

    run(work())


def test_a_function_after_the_model_may_write_to_what_it_is_given(tmp_path: Path) -> None:
    step = Function(
        function="steps.py:clear",
        reads=(Declared(name="y", dtype="float32", shape=(4,)),),
        makes=(Declared(name="z", dtype="float32", shape=(4,)),),
    )
    y = np.ones((2, 4), np.float32)
    y.flags.writeable = False
    (tmp_path / "steps.py").write_text(CODE)
    around = Around(folder=tmp_path, code=tmp_path, place="post")
    ready = step.open(around, {"y": TensorSpec("y", "float32", (4,))})
    assert not ready.apply({"y": y})["z"].any()
    assert y.all()


def test_a_function_that_hangs_fails_its_request_and_another_thread_takes_over(tmp_path: Path) -> None:
    path = with_code(tmp_path / "net", "hang", serving=Serving(instances=1, run_limit_ms=200.0))
    (tmp_path / "steps.py").write_text(CODE)

    async def work() -> None:
        service = await started(path, code=tmp_path)
        hangs = [
            asyncio.create_task(service.infer(InferRequest(model="net", inputs=(Tensor.of("half", x),))))
            for x in [np.ones((1, 16), np.float32)] * 4
        ]
        for outcome in await asyncio.gather(*hangs, return_exceptions=True):
            assert isinstance(outcome, ServerFault)
            assert "did not end within 0.2 s" in str(outcome)
        fine = InferRequest(model="net", inputs=(Tensor.of("half", np.zeros((1, 16), np.float32)),))
        assert len((await service.infer(fine)).outputs) == 1
        await service.stop()

    try:
        run(work())
    finally:
        (tmp_path / "go").touch()
    assert not instances_left()


def test_a_function_that_hangs_is_found_though_its_client_has_left(tmp_path: Path) -> None:
    path = with_code(tmp_path / "net", "hang", serving=Serving(instances=1, run_limit_ms=200.0))
    (tmp_path / "steps.py").write_text(CODE)

    async def work() -> None:
        service = await started(path, code=tmp_path)
        (model,) = service.models()
        assert isinstance(model, Model)
        assert model._piping is not None
        hung = InferRequest(model="net", inputs=(Tensor.of("half", np.ones((1, 16), np.float32)),))
        tickets = [service.submit(hung, Marks(), lambda outcome: None) for _ in range(model._piping.threads.count)]
        while not all(piped.seen_ns for piped in model._piping._at_work):
            await asyncio.sleep(0)
        for ticket in tickets:
            ticket.cancel()
        fine = InferRequest(model="net", inputs=(Tensor.of("half", np.zeros((1, 16), np.float32)),))
        assert len((await service.infer(fine)).outputs) == 1
        while model._piping._at_work:  # one thread may have begun, and so is given up, a little later than another
            await asyncio.sleep(0.01)
        assert (model._piping._waiting_rows, model._piping._waiting_bytes) == (0, 0)
        threads = model._piping.threads
        more, usual = threads.count, threads.count - len(tickets)
        (tmp_path / "go").touch()
        while threads.count > usual:  # those that were given up come back, and one for each of them ends
            await asyncio.sleep(0.01)
        assert more == 2 * usual
        assert len((await service.infer(fine)).outputs) == 1
        assert threads.count == usual
        await service.stop()

    try:
        run(work())
    finally:
        (tmp_path / "go").touch()
    assert not instances_left()


def half(value: float, **more: Any) -> InferRequest:
    """Ask with a row that starts with ``value``."""
    return InferRequest(model="net", inputs=(Tensor.of("half", np.full((1, 16), value, np.float32)),), **more)


def submitted(service: Service, asked: InferRequest) -> asyncio.Future[Any]:
    """Hand a request in at once; what comes of it is the future's result, an error too."""
    heard: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    service.submit(asked, Marks(), heard.set_result)
    return heard


@asynccontextmanager
async def occupied(folder: Path) -> AsyncIterator[tuple[Service, Piping, asyncio.Future[Any]]]:
    """Serve with a single thread for steps, which is at work on a request until the file ``go`` is there."""
    path = with_code(folder / "net", "noted")
    (folder / "steps.py").write_text(CODE)
    service = await started(path, code=folder)
    (model,) = service.models()
    assert isinstance(model, Model)
    assert model._piping is not None
    model._piping.threads.count = 1
    try:
        first = submitted(service, half(1))
        while not (folder / "order").exists():
            await asyncio.sleep(0)
        yield service, model._piping, first
    finally:
        (folder / "go").touch()
        await service.stop()


def test_priority_then_the_time_left_says_whose_steps_are_next(tmp_path: Path) -> None:
    async def work() -> None:
        async with occupied(tmp_path) as (service, _, first):
            asked = [half(2), half(3, timeout_us=50_000_000), half(4, timeout_us=40_000_000), half(5, priority=1)]
            others = [submitted(service, each) for each in asked]
            (tmp_path / "go").touch()
            assert all(isinstance(answer, InferResponse) for answer in await asyncio.gather(first, *others))
        assert (tmp_path / "order").read_text() == "1 5 4 3 2 "

    run(work())


def test_a_request_that_waits_for_a_thread_is_over_at_its_deadline(tmp_path: Path) -> None:
    async def work() -> None:
        async with occupied(tmp_path) as (service, _, first):
            late = submitted(service, half(2, timeout_us=1000))
            done, _ = await asyncio.wait({first, late}, return_when=asyncio.FIRST_COMPLETED)
            assert done == {late}, "it was told while the thread was still at work on another"
            assert isinstance(late.result(), DeadlineExceeded)
        assert (tmp_path / "order").read_text() == "1 ", "nothing was prepared in vain"

    run(work())


def test_a_request_whose_steps_are_at_work_is_over_at_its_deadline(tmp_path: Path) -> None:
    async def work() -> None:
        async with occupied(tmp_path) as (service, piping, _):
            piping.threads.count = 2
            late = submitted(service, half(1, timeout_us=100_000))
            assert isinstance(await late, DeadlineExceeded)
            assert not (tmp_path / "go").exists()

    run(work())


def test_a_request_that_comes_to_its_model_too_late_is_not_held_against_those_that_come_to_it_now(
    tmp_path: Path, inside: pytest.MonkeyPatch
) -> None:
    path = made(tmp_path / "net", serving=Serving(instances=1, objective_ms=500))

    async def work() -> None:
        service = await started(path)
        inside.setattr(Pool, "free_ns", lambda pool, now_ns: 10**9)
        with pytest.raises(Overloaded) as refused:
            await service.infer(asking(photo(0)))
        assert refused.value.reason == "predicted_wait"
        gate = service.models()[0].pool.gate
        assert gate.shut(LEAST_URGENT, service._clock_ns()) is None
        await service.stop()

    run(work())


def test_threads_for_steps_are_started_as_usual_while_a_model_is_behind(tmp_path: Path) -> None:
    told = Told()

    async def work() -> None:
        service = await started(made(tmp_path / "net"), scheduler=told)
        assert service._around is not None
        service._around.bursts.begin()
        await service.infer(asking(photo(0)))
        paused = [said == "no more" for said in told.said]
        assert paused[:3] == [False, True, False]
        assert paused[1:] == [True, False] * (len(paused) // 2), "for each thread that is started"
        await service.stop()

    run(work())


def test_a_request_that_ends_before_its_steps_begin_takes_no_room(tmp_path: Path) -> None:
    async def work() -> None:
        async with occupied(tmp_path) as (service, piping, _):
            held = piping._waiting_rows, piping._waiting_bytes
            tickets = [service.submit(half(2), Marks(), lambda outcome: None) for _ in range(200)]
            for ticket in tickets:
                ticket.cancel()
            assert (piping._waiting_rows, piping._waiting_bytes) == held
            assert len(piping.threads._heap) < 100

    run(work())


def test_a_request_is_not_refused_for_rows_that_it_goes_before(tmp_path: Path) -> None:
    async def work() -> None:
        async with occupied(tmp_path) as (service, piping, _):
            others = [submitted(service, half(2)) for _ in range(9)]
            piping._row_ns = 1e9
            usual = submitted(service, half(3, timeout_us=5_000_000))
            urgent = submitted(service, half(4, timeout_us=5_000_000, priority=1))
            assert usual.done()
            assert isinstance(usual.result(), Overloaded)
            assert not urgent.done()
            (tmp_path / "go").touch()
            await asyncio.gather(urgent, *others)

    run(work())


def test_a_burst_of_jobs_runs_on_all_threads() -> None:
    threads, together, once = StepThreads("net", 4), threading.Barrier(5), threading.Event()

    def meet() -> None:
        together.wait(10)

    threads.put(once.set)
    assert once.wait(10)
    idle = False
    while not idle:
        with threads._bell:
            idle = threads._idle == 1
    with threads._bell:  # the one that is idle cannot wake between the jobs of a burst
        for _ in range(4):
            threads.put(meet)
    meet()
    threads.close()


@pytest.mark.parametrize(("max_change", "size", "routed"), [(None, 24, "2"), (0.5, 24, "1"), (0.0, SIZE, "2")])
def test_a_version_may_take_other_sizes_behind_the_same_steps(
    tmp_path: Path, max_change: float | None, size: int, routed: str
) -> None:
    home = tmp_path / "models"
    made(home / "net" / "1")

    async def work() -> None:
        service = await started(home)
        resize = {"step": "resize", "height": size, "width": size}
        serving = Serving(instances=1, max_change=max_change)
        told: dict[str, Any] = {"pre": (PRE[0], resize, NORMALISE), "post": POST, "classes": list(CLASSES)}
        bundle(home / "net" / "2", model=convnet(size=size), serving=serving, **told)
        await service.refresh()
        answer = await service.infer(asking(photo(1)))
        assert answer.version == routed, service.index()
        await service.stop()

    run(work())


def test_a_version_whose_steps_take_something_else_is_refused(tmp_path: Path) -> None:
    home = tmp_path / "models"
    made(home / "net" / "1")

    async def work() -> None:
        service = await started(home)
        made(home / "net" / "2", post=())
        with pytest.raises(ModelNotReady, match="tensors are not those of version 1"):
            await service.load("net")
        assert (await service.infer(asking(photo(1)))).version == "1"
        await service.stop()

    run(work())


def test_steps_after_the_model_alone_leave_its_inputs_as_they_are(tmp_path: Path) -> None:
    path = made(tmp_path / "net", pre=())
    x = np.stack([PREPROCESS.apply_image(photo(seed)) for seed in range(3)])

    async def work() -> None:
        service = await started(path)
        got = outputs(await service.infer(request(x)))
        await service.stop()
        assert got["label"].tolist() == expected(path, *(photo(seed) for seed in range(3)))[0]

    run(work())
