"""Ensembles and cascades: deployments that ask others, with the answers that NumPy has for them."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest

from hasten.cli.app import run as run_verb
from hasten.composition import read_composition
from hasten.deployment import FILE
from hasten.engines.onnxruntime import OnnxRuntime
from hasten.errors import BadRequest, DeadlineExceeded, ModelNotReady, StoreError
from hasten.protocol.messages import InferResponse, RequestedOutput
from hasten.serve.app import Listening
from hasten.serve.repository import open_repository
from hasten.serve.service import Service
from hasten.serve.ticket import Marks
from hasten.store import read_artifact
from hasten.tensors import Array
from hasten.testing.models import convnet, mlp
from serve import faulty
from serve.bundles import bundle, instances_left, request, rows, run
from serve.photos import CLASSES, PRE, SIZE, asking, photo
from serve.served import served

ENSEMBLE = '[ensemble]\nmembers = ["a", "b"]\nscores = "y"\n'
CASCADE = '[cascade]\nmembers = ["a", "b"]\nthresholds = [0.5]\nscores = "y"\nsoftmax = true\n'
BEST: dict[str, Any] = {"step": "top-k", "input": "y", "keep": True}


def write(home: Path, text: str, *, name: str = "both") -> Path:
    (home / name).mkdir(parents=True, exist_ok=True)
    (home / name / FILE).write_text(f'name = "{name}"\n{text}')
    return home


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("members")
    for seed, name in enumerate("ab"):
        bundle(home / name / "1", model=mlp(seed=seed))
    return home


@pytest.fixture
def home(members: Path, tmp_path: Path) -> Path:
    shutil.copytree(members, tmp_path / "models", ignore=shutil.ignore_patterns(".*"))
    return tmp_path / "models"


async def started(home: Path) -> Service:
    service = Service(open_repository(home))
    await service.start()
    assert service.ready(), service.index()
    return service


def alone(home: Path, name: str, x: Array) -> np.ndarray[Any, Any]:
    y = OnnxRuntime().open(read_artifact(home / name / "1" / "model")).run({"x": x})["y"]
    return y.astype(np.float64)


def shares(y: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    e = np.exp(y - y.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def outputs(answer: InferResponse) -> dict[str, Array]:
    return {tensor.name: tensor.data for tensor in answer.outputs}


@pytest.mark.parametrize(
    ("more", "combine"),
    [
        ("", lambda a, b: (a + b) / 2),
        ("softmax = true\n", lambda a, b: (shares(a) + shares(b)) / 2),
        ('combine = "weighted"\nweights = [3.0, 1.0]\n', lambda a, b: (3 * a + b) / 4),
        ('combine = "vote"\n', lambda a, b: (np.eye(4)[a.argmax(1)] + np.eye(4)[b.argmax(1)]) / 2),
    ],
)
def test_an_ensemble_combines_what_its_members_say(home: Path, more: str, combine: Any) -> None:
    write(home, ENSEMBLE + more)

    async def work() -> None:
        service = await started(home)
        asked = [rows(n, seed=n) for n in range(1, 12)]
        answers = await asyncio.gather(*[service.infer(request(x, model="both", id=str(len(x)))) for x in asked])
        figures = {model.name: model.statistics for model in service.models()}
        await service.stop()
        for x, answer in zip(asked, answers, strict=True):
            wanted = combine(alone(home, "a", x), alone(home, "b", x))
            np.testing.assert_allclose(outputs(answer)["y"], wanted, rtol=1e-4, atol=1e-5)
            assert answer.id == str(len(x))
        assert {name: each.rows for name, each in figures.items()} == {"a": 66, "b": 66, "both": 66}
        assert figures["a"].total.count == figures["both"].total.count == len(asked)

    run(work())
    assert not instances_left()


@pytest.mark.parametrize("confidence", ["top-1", "margin"])
@pytest.mark.parametrize("threshold", [0.0, 0.4, 0.6, 1.0])
def test_a_cascade_asks_the_next_member_only_where_the_first_is_in_doubt(
    home: Path, confidence: str, threshold: float
) -> None:
    write(home, CASCADE.replace("0.5", str(threshold)) + f'confidence = "{confidence}"\n')
    x = rows(40)

    async def work() -> None:
        service = await started(home)
        got = outputs(await service.infer(request(x, model="both")))
        asked = {model.name: model.statistics.rows for model in service.models()}
        await service.stop()
        a, b = alone(home, "a", x), alone(home, "b", x)
        ordered = np.sort(shares(a), axis=1)
        sure = ordered[:, -1] - (ordered[:, -2] if confidence == "margin" else 0) >= threshold
        assert got["member"].tolist() == (~sure).astype(int).tolist()
        np.testing.assert_allclose(got["y"], np.where(sure[:, None], a, b), rtol=1e-4, atol=1e-5)
        assert asked.get("b", 0) == (~sure).sum()

    run(work())


def test_a_cascade_over_photos_passes_labels_on(tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        more: dict[str, Any] = {"pre": PRE, "post": (BEST,), "classes": list(CLASSES)}
        bundle(tmp_path / name, model=convnet(size=SIZE, seed=seed), **more)
    write(tmp_path, CASCADE)

    async def work() -> None:
        service = await started(tmp_path)
        sent = [photo(seed) for seed in range(12)]
        got = outputs(await service.infer(asking(*sent, model="both")))
        each = [outputs(await service.infer(asking(*sent, model=name))) for name in "ab"]
        about = service.model_metadata("both")
        assert service.takes_image("both"), "which is what the lines that serve prints send"
        with pytest.raises(BadRequest, match="row 1: this is no image"):
            await service.infer(asking(photo(1), b"junk", model="both"))
        await service.stop()
        assert [tensor.name for tensor in about.outputs] == ["y", "label", "score", "member"]
        for row, member in enumerate(got["member"].tolist()):
            assert got["label"][row] == each[member]["label"][row]

    run(work())


def test_its_time_is_told_as_that_of_its_members_and_adds_up(home: Path) -> None:
    write(home, CASCADE)

    async def work() -> None:
        service = await started(home)
        arrived, marks, heard = asyncio.Event(), Marks(), []
        marks.ns[0] = marks.ns[1] = marks.ns[2] = service._clock_ns()

        def done(outcome: Any) -> None:
            heard.append(outcome)
            arrived.set()

        service.submit(request(rows(5), model="both"), marks, done)
        await arrived.wait()
        marks.ns[8] = marks.ns[9] = service._clock_ns()
        assert marks.ns == sorted(marks.ns)
        assert marks.phases_ns()["infer"] > 0
        await service.stop()

    run(work())


def test_a_client_that_leaves_withdraws_what_the_members_have(home: Path) -> None:
    write(home, ENSEMBLE)

    async def work() -> None:
        service = await started(home)
        heard: list[object] = []
        ticket = service.submit(request(rows(1), model="both"), Marks(), heard.append)
        ticket.cancel()
        ticket.cancel()
        await service.infer(request(rows(1), model="both"))
        assert heard == []
        assert {model.name: model.statistics.refused for model in service.models()} == {
            name: {"cancelled": 1} for name in ("a", "b", "both")
        }
        await service.stop()

    run(work())


def test_stopping_finishes_what_is_between_two_members(home: Path) -> None:
    write(home, CASCADE.replace("0.5", "1.0"))

    async def work() -> None:
        service = await started(home)
        asked = [asyncio.create_task(service.infer(request(rows(1, seed=s), model="both"))) for s in range(30)]
        await asyncio.sleep(0)
        assert await service.stop()
        assert all(outputs(answer)["member"].tolist() == [1] for answer in await asyncio.gather(*asked))

    run(work())


def test_a_bad_request_an_output_that_is_not_there_and_a_time_that_is_over_are_told(home: Path) -> None:
    write(home, CASCADE)

    async def work() -> None:
        service = await started(home)
        with pytest.raises(BadRequest, match="wants length 16"):
            await service.infer(request(rows(1)[:, :3], model="both"))
        with pytest.raises(BadRequest, match="no output 'z'"):
            await service.infer(request(rows(1), model="both", outputs=(RequestedOutput(name="z"),)))
        only = await service.infer(request(rows(1), model="both", outputs=(RequestedOutput(name="member"),)))
        assert outputs(only).keys() == {"member"}
        with pytest.raises(DeadlineExceeded):
            await service.infer(request(rows(1), model="both", timeout_us=1))
        await service.stop()

    run(work())


def test_it_is_ready_while_its_members_are(home: Path) -> None:
    write(home, ENSEMBLE)

    async def work() -> None:
        service = await started(home)
        await service.unload("b")
        assert not service.model_ready("both")
        with pytest.raises(ModelNotReady):
            await service.infer(request(rows(1), model="both"))
        await service.load("b")
        assert service.model_ready("both")
        assert len((await service.infer(request(rows(1), model="both"))).outputs) == 1
        await service.stop()

    run(work())


async def swap(service: Service, home: Path, name: str, version: str, **kind: int) -> None:
    """Put a version with other tensors in a member's place, which its own clients must be told of first."""
    bundle(home / name / version, model=mlp(**kind))
    await service.unload(name)
    await service.load(name, version)


def reason(service: Service, name: str = "both") -> str:
    return str(next(entry["reason"] for entry in service.index() if entry["name"] == name))


@pytest.mark.parametrize("text", [ENSEMBLE, CASCADE])
def test_it_is_not_ready_while_a_member_that_was_swapped_does_not_fit(home: Path, text: str) -> None:
    write(home, text)

    async def work() -> None:
        service = await started(home)
        await swap(service, home, "b", "2", classes=5)
        assert not service.ready()
        assert "member 'b' has 5 classes, and 'a' 4" in reason(service)
        with pytest.raises(ModelNotReady, match="member 'b' has 5 classes"):
            await service.infer(request(rows(1), model="both"))
        with pytest.raises(ModelNotReady, match="member 'b' has 5 classes"):
            await service.load("both")
        await service.unload("b")
        await service.load("b", "1")
        assert service.ready()
        assert not reason(service)
        assert len((await service.infer(request(rows(1), model="both"))).outputs) > 0
        await service.stop()

    run(work())


def test_it_goes_on_when_a_member_is_swapped_for_one_whose_own_clients_go_on(home: Path) -> None:
    write(home, ENSEMBLE)
    wide = mlp(seed=1)
    wide.graph.output[0].type.tensor_type.shape.dim[1].dim_param = "classes"
    bundle(home / "b" / "1", model=wide)
    bundle(home / "a" / "1", model=wide)

    async def work() -> None:
        service = await started(home)
        bundle(home / "b" / "2", model=mlp(seed=1))
        await service.refresh()
        assert service.ready(), service.index()
        assert (await service.infer(request(rows(1), model="both"))).outputs[0].data.shape == (1, 4)
        await service.stop()

    run(work())


def test_members_that_fit_each_other_anew_are_served_once_it_is_loaded_again(home: Path) -> None:
    write(home, ENSEMBLE)

    async def work() -> None:
        service = await started(home)
        for name in "ab":
            await swap(service, home, name, "2", classes=5)
        assert "load it again" in reason(service)
        await service.load("both")
        assert service.ready()
        answer = await service.infer(request(rows(1), model="both"))
        assert service.model_metadata("both").outputs[0].shape == (-1, answer.outputs[0].data.shape[1]) == (-1, 5)
        await service.stop()

    run(work())


def test_loading_it_brings_back_members_and_keeps_the_version_to_go_back_to(home: Path) -> None:
    write(home, ENSEMBLE, name="both/1")
    write(home, ENSEMBLE, name="both/2")
    for version in "12":
        (home / "both" / version / FILE).write_text(f'name = "both"\n{ENSEMBLE}')

    async def work() -> None:
        service = await started(home)
        await service.load("both", "1")
        await service.unload("b")
        assert reason(service) == "member 'b' is not ready"
        await service.load("both", "1")
        assert service.ready()
        await service.rollback("both")
        assert (await service.infer(request(rows(1), model="both"))).version == "2"
        await service.stop()

    run(work())


def test_an_ensemble_is_no_substitute_for_a_cascade_whose_clients_read_other_outputs(home: Path) -> None:
    write(home, CASCADE)

    async def work() -> None:
        service = await started(home)
        write(home, ENSEMBLE)
        with pytest.raises(ModelNotReady, match="its tensors are not those of version 1; unload that one first"):
            await service.load("both")
        assert {"y", "member"} == outputs(await service.infer(request(rows(1), model="both"))).keys()
        await service.unload("both")
        await service.load("both")
        assert {"y"} == outputs(await service.infer(request(rows(1), model="both"))).keys()
        await service.stop()

    run(work())


@pytest.mark.parametrize("model", ["a", "both"])
def test_an_output_that_is_asked_for_twice_is_refused_as_a_model_refuses_it(home: Path, model: str) -> None:
    write(home, ENSEMBLE)

    async def work() -> None:
        service = await started(home)
        with pytest.raises(BadRequest, match="output 'y' is asked for twice"):
            await service.infer(request(rows(1), model=model, outputs=(RequestedOutput(name="y"),) * 2))
        await service.stop()

    run(work())


@pytest.mark.usefixtures("faulty_engine")
@pytest.mark.parametrize("routed", [True, False])
def test_stopping_asks_what_is_alive_for_the_order_and_not_the_folder(home: Path, routed: bool) -> None:
    write(home, CASCADE.replace("0.5", "1.0"))
    unsure = mlp()
    for weight in unsure.graph.initializer:
        weight.raw_data = bytes(len(weight.raw_data))  # all scores are 0, so the second member is asked
    bundle(home / "a" / "1", model=unsure, engine="faulty")
    x = rows(1)
    x[0, 0] = faulty.HANGS

    async def work() -> None:
        service = await started(home)
        asked = asyncio.create_task(service.infer(request(x, model="both")))
        await asyncio.to_thread(faulty.hanging.wait, 10)
        shutil.rmtree(home / "both")
        if not routed:
            await service.unload("both")
        stopping = asyncio.create_task(service.stop())
        for _ in range(10):  # turns in which a wrong order would close the second member
            await asyncio.sleep(0)
        faulty.release.set()
        assert await stopping
        assert outputs(await asked)["member"].tolist() == [1]

    run(work())


def test_a_member_without_its_steps_is_loaded_with_its_model(home: Path) -> None:
    top: dict[str, Any] = {"step": "top-k", "input": "y", "keep": True}
    bundle(home / "a" / "1", post=(top,), raw=True, classes=list(map(str, range(4))))
    write(home, ENSEMBLE.replace('"a"', '"a.raw"'))

    async def work() -> None:
        service = await started(home)
        for name in ("both", "a"):
            await service.unload(name)
        await service.load("both")
        assert service.ready()
        assert len((await service.infer(request(rows(1), model="both"))).outputs) == 1
        await service.stop()

    run(work())


def test_its_members_are_unloaded_with_it_where_that_is_asked_and_no_other_asks_them(home: Path) -> None:
    bundle(home / "c" / "1", model=mlp(seed=2))
    write(home, ENSEMBLE)
    write(home, ENSEMBLE.replace('"b"', '"c"'), name="other")

    async def work() -> None:
        service = await started(home)
        asked = asyncio.create_task(service.infer(request(rows(1), model="both")))
        await asyncio.sleep(0)
        await service.unload("both", dependents=True)
        assert len((await asked).outputs) == 1, "what is inside is finished before the members go"
        assert {entry["name"] for entry in service.index(ready=True)} == {"a", "c", "other"}
        assert not service.takes_image("other")
        await service.unload("other")
        assert {entry["name"] for entry in service.index(ready=True)} == {"a", "c"}
        await service.stop()

    run(work())


@pytest.mark.parametrize("speaks", ["REST", "gRPC"])
@pytest.mark.parametrize("dependents", [False, True])
def test_whether_members_go_too_is_said_as_tritons_clients_do(home: Path, speaks: str, dependents: bool) -> None:
    module = pytest.importorskip(f"tritonclient.{'http' if speaks == 'REST' else 'grpc'}")
    write(home, ENSEMBLE)
    with served(home, Listening(port=0, grpc_port=0)) as opened:
        client = module.InferenceServerClient(urlsplit(opened.http).netloc if speaks == "REST" else opened.grpc)
        client.unload_model("both", unload_dependents=dependents)
        assert [client.is_model_ready(name) for name in ("a", "b", "both")] == [not dependents, not dependents, False]
        client.close()


def test_it_is_loaded_once_a_member_that_failed_is_mended(home: Path) -> None:
    write(home, ENSEMBLE)
    model = home / "b" / "1" / "model" / "model.onnx"
    whole = model.read_bytes()
    model.write_bytes(b"nothing")

    async def work() -> None:
        service = Service(open_repository(home))
        await service.start()
        assert not service.model_ready("both")
        model.write_bytes(whole)
        await service.refresh()
        assert service.model_ready("both")
        assert service.ready()
        await service.unload("both")
        bundle(home / "more")
        await service.refresh()
        assert not service.model_ready("both"), "what was unloaded by hand stays so"
        await service.stop()

    run(work())


def test_a_pinned_version_is_asked_or_nothing_is(home: Path) -> None:
    write(home, ENSEMBLE.replace('"b"', '"b:1"'))

    async def work() -> None:
        service = await started(home)
        bundle(home / "b" / "2", model=mlp(seed=5))
        await service.refresh()
        assert service.model_ready("b")
        assert not service.model_ready("both")
        await service.stop()

    run(work())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (ENSEMBLE.replace('"b"', '"c"'), "no model is called 'c' here"),
        (ENSEMBLE.replace('"b"', '"both"'), "asks itself: both > both"),
        (ENSEMBLE.replace('"y"', '"z"'), "member 'a' gives no scores 'z'"),
        (ENSEMBLE.replace('"b"', '"other"'), r"member 'other' takes \['x FP32\[-1, 3, 16, 16\]'\]"),
    ],
)
def test_members_that_do_not_fit_are_told_where_it_is_loaded(home: Path, text: str, says: str) -> None:
    write(home, text)
    bundle(home / "other", model=convnet(size=SIZE))

    async def work() -> None:
        service = Service(open_repository(home))
        await service.start()
        (reason,) = [entry["reason"] for entry in service.index() if entry["name"] == "both"]
        await service.stop()
        assert re.search(says, reason), reason

    run(work())


def test_deployments_that_ask_each_other_in_a_circle_are_refused(home: Path) -> None:
    write(home, ENSEMBLE.replace('"b"', '"two"'), name="one")
    write(home, ENSEMBLE.replace('"b"', '"one"'), name="two")
    write(home, ENSEMBLE.replace('"b"', '"fine"'), name="outer")
    write(home, ENSEMBLE, name="fine")

    async def work() -> None:
        service = Service(open_repository(home))
        await service.start()
        told = {entry["name"]: entry for entry in service.index()}
        assert "asks itself" in told["one"]["reason"] + told["two"]["reason"]
        assert told["outer"]["state"] == told["fine"]["state"] == "READY", told
        x = rows(2)
        got = outputs(await service.infer(request(x, model="outer")))["y"]
        a, b = alone(home, "a", x), alone(home, "b", x)
        np.testing.assert_allclose(got, (a + (a + b) / 2) / 2, rtol=1e-4, atol=1e-5)
        assert await service.stop()

    run(work())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[ensemble]\nmembers = ["a"]\nscores = "y"\n', "1 members: 2 to 16"),
        ('[ensemble]\nmembers = ["a", "a"]\nscores = "y"\n', "each is asked once"),
        ('[ensemble]\nmembers = ["a", "b:"]\nscores = "y"\n', "write NAME or NAME:VERSION"),
        (ENSEMBLE + "weights = [1.0, 2.0]\n", "2 weights for combine = 'mean'"),
        (ENSEMBLE + "wieghts = [1.0]\n", "did you mean 'weights'"),
        (ENSEMBLE + CASCADE, "one table"),
        (CASCADE.replace("[0.5]", "[]"), "2 members take 1 thresholds"),
        (CASCADE.replace("0.5", "1.5"), "thresholds"),
        ('artifact = "x"\n' + ENSEMBLE, "one table"),
        ("[ensemble]\n", "members"),
        ("ensemble = 3\n", "no deployment that can be read"),
    ],
)
def test_a_table_that_is_wrong_is_one_clear_error(tmp_path: Path, text: str, says: str) -> None:
    write(tmp_path, text)
    with pytest.raises(StoreError, match=says):
        read_composition(tmp_path / "both" / FILE)


def test_one_that_is_served_alone_says_that_its_members_are_missing(home: Path) -> None:
    write(home, ENSEMBLE)

    async def work() -> None:
        service = Service(open_repository(home / "both"))
        await service.start()
        assert "no model is called 'a' here" in service.index()[0]["reason"]
        await service.stop()

    run(work())


def test_hasten_cascade_writes_a_deployment_that_can_be_served(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    x = rows(2000)
    labels = alone(home, "b", x).argmax(axis=1)
    np.savez(tmp_path / "val.npz", x=x, label=labels)
    words = [str(home / "a" / "1"), str(home / "b" / "1"), "--data", str(tmp_path / "val.npz"), "--max-drop", "10%"]
    assert run_verb(["cascade", *words, "-o", str(home / "both" / FILE), "--json"]) == 0, capsys.readouterr().err
    told = json.loads(capsys.readouterr().out)
    assert told["drop"] <= told["drop_high"] <= 0.1
    assert 0 < told["asked"] < 1
    composition = read_composition(home / "both" / FILE)
    assert composition is not None
    assert composition.how.members == ("a", "b")
    assert composition.how.softmax

    async def work() -> None:
        service = await started(home)
        got = outputs(await service.infer(request(x[:1000], model="both")))
        await service.stop()
        assert (got["y"].argmax(axis=1) == labels[:1000]).mean() > 0.85
        assert 0 < got["member"].mean() < 1

    run(work())
    elsewhere = ["cascade", *words, "-o", str(tmp_path / "elsewhere" / "both" / FILE)]
    assert run_verb(elsewhere) == 1
    assert "in one folder of models" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("place", "wanted"),
    [
        ("b", "lies in the folder of"),
        ("link", "lies in the folder of"),
        ("a", "lies in"),
        ("b/1", "one folder of models"),
    ],
)
def test_hasten_cascade_never_writes_over_a_deployment_that_it_asks(
    home: Path, tmp_path: Path, place: str, wanted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    members = [home / "a" / "1", home / "b" / "1"]
    (home / "link").symlink_to(home / "b")
    before = {path: path.read_bytes() for path in home.rglob(FILE)}
    words = [*map(str, members), "--data", str(tmp_path / "none.npz"), "-o", str(home / place / FILE)]
    assert run_verb(["cascade", *words]) == 1
    assert wanted in capsys.readouterr().err
    assert {path: path.read_bytes() for path in home.rglob(FILE)} == before
