"""Versions come and go while requests are answered."""

from __future__ import annotations

import asyncio
import gc
import os
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from hasten import store
from hasten.deployment import FILE, MODEL, Serving, parse_deployment
from hasten.errors import ModelNotFound, ModelNotReady, StoreError
from hasten.golden import Golden, read_golden, write_golden
from hasten.host import this_host
from hasten.protocol.messages import ModelMetadata, TensorMetadata
from hasten.serve import lifecycle
from hasten.serve.composed import stands_in
from hasten.serve.lifecycle import KEPT_FATES
from hasten.serve.model import Model
from hasten.serve.repository import Repository, open_repository
from hasten.serve.service import Service
from hasten.serve.worker import Instance
from hasten.store import MANIFEST
from hasten.testing.models import convnet, mlp
from serve.bundles import bundle, instances_left, request, rows, run


def instances() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("hasten")]


async def started(path: Path) -> Service:
    service = Service(open_repository(path))
    await service.start()
    return service


def test_a_new_version_takes_over_and_no_request_is_lost(tmp_path: Path) -> None:
    home = tmp_path / "models"
    bundle(home / "net" / "1")

    async def work() -> None:
        service = await started(home)
        answered: set[str] = set()
        over = asyncio.Event()

        async def client() -> None:
            while not over.is_set():
                routed = service.models()[0].version
                answer = await service.infer(request(rows(1)))
                assert answer.version == routed, "whoever was routed to when it came has answered it"
                answered.add(answer.version)

        clients = [asyncio.create_task(client()) for _ in range(4)]
        await asyncio.to_thread(bundle, home / "net" / "2", model=mlp(seed=1))
        await service.load("net")
        assert (await service.infer(request(rows(1)))).version == "2"
        over.set()
        await asyncio.gather(*clients)
        assert "1" in answered
        await service.stop()

    run(work())


def test_a_version_that_has_gone_is_told_and_nothing_of_it_is_alive(tmp_path: Path) -> None:
    home = tmp_path / "models"
    bundle(home / "net" / "1")
    bundle(home / "net" / "2", model=mlp(seed=1))
    left: list[int] = []

    def gone() -> None:
        gc.collect()
        left.append(sum(type(thing) is Model for thing in gc.get_objects()))

    async def work() -> None:
        service = Service(open_repository(home), gone=gone)
        await service.start()
        for times, version in enumerate(("1", "2", "1"), 1):
            await service.infer(request(rows(1)))
            await service.load("net", version)
            while len(left) < times:
                await asyncio.sleep(0.001)
        assert left == [1, 1, 1], "only the version that is routed to"
        await service.stop()

    run(work())


def test_going_back_routes_to_the_version_before(tmp_path: Path) -> None:
    home = tmp_path / "models"
    bundle(home / "net" / "1")
    bundle(home / "net" / "2", model=mlp(seed=1))

    async def work() -> None:
        service = await started(home)
        with pytest.raises(ModelNotFound, match="no version before"):
            await service.rollback("net")
        await service.load("net", "1")
        assert (await service.infer(request(rows(1)))).version == "1"
        await service.rollback("net")
        assert (await service.infer(request(rows(1)))).version == "2"
        await service.stop()

    run(work())


@pytest.mark.parametrize("fault", ["damaged", "other tensors", "golden", "changed answers"])
def test_a_version_that_fails_leaves_the_old_one_in_place(tmp_path: Path, fault: str) -> None:
    home = tmp_path / "models"
    bundle(home / "net" / "1")

    async def work() -> None:
        service = await started(home)
        serving = Serving(instances=1, max_change=0.01 if fault == "changed answers" else None)
        model = convnet() if fault == "other tensors" else mlp(seed=1)
        path = bundle(home / "net" / "2", model=model, serving=serving)
        if fault == "damaged":
            (path.parent / "model" / "model.onnx").write_bytes(b"nothing")
        if fault == "golden":
            write_golden(path.parent, Golden({"x": rows(3)}, {"y": np.zeros((3, 4), np.float32)}))
        says = {
            "damaged": "is not what its manifest says",
            "other tensors": "tensors are not those of version 1",
            "golden": "golden output 'y' is off",
            "changed answers": "answers differ from version 1",
        }[fault]
        with pytest.raises(ModelNotReady, match=says):
            await service.load("net")
        assert (await service.infer(request(rows(1)))).version == "1"
        assert service.ready()
        reasons = {entry["version"]: entry["reason"] for entry in service.index()}
        assert says in reasons["2"]
        while len(instances()) > 1:  # the new one's instance ends by itself
            await asyncio.sleep(0.001)
        await service.stop()
        assert not instances_left()

    run(work())


def opened(model: onnx.ModelProto) -> onnx.ModelProto:
    """Give a model that does not say how many classes it has."""
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_param = "classes"
    return model


def told(takes: int, gives: int, *, rank: int = 2) -> ModelMetadata:
    one, other = ((-1,) * (rank - 1) + (length,) for length in (takes, gives))
    x, y = TensorMetadata(name="x", datatype="FP32", shape=one), TensorMetadata(name="y", datatype="FP32", shape=other)
    return ModelMetadata(name="net", versions=(), platform="", inputs=(x,), outputs=(y,))


@pytest.mark.parametrize(
    ("old", "new", "goes_on"),
    [
        (told(16, 4), told(16, 4), True),
        (told(16, 4), told(20, 4), False),
        (told(16, 4), told(16, 5), False),
        (told(16, 4), told(16, 4, rank=3), False),
        (told(16, 4), told(-1, 4), True),
        (told(-1, 4), told(16, 4), False),
        (told(16, 4), told(16, -1), False),
        (told(16, -1), told(16, 4), True),
        (told(16, 4), replace(told(16, 4), outputs=()), False),
        (replace(told(16, 4), outputs=()), told(16, 4), False),
    ],
)
def test_clients_go_on_where_what_they_send_is_taken_and_what_they_get_was_told(
    old: ModelMetadata, new: ModelMetadata, goes_on: bool
) -> None:
    assert stands_in(new, old) == goes_on


@pytest.mark.parametrize(
    ("old", "new", "taken"),
    [
        (mlp(), mlp(seed=1, classes=5), False),
        (mlp(), mlp(seed=1, features=20), False),
        (mlp(), mlp(seed=1), True),
        (mlp(), opened(mlp(seed=1)), False),
        (opened(mlp()), mlp(seed=1), True),
    ],
)
def test_a_version_takes_over_where_clients_can_go_on_as_they_were_told(
    tmp_path: Path, old: onnx.ModelProto, new: onnx.ModelProto, taken: bool
) -> None:
    home = tmp_path / "models"
    bundle(home / "net" / "1", model=old)

    async def work() -> None:
        service = await started(home)
        bundle(home / "net" / "2", model=new)
        await service.refresh()
        assert (await service.infer(request(rows(1)))).version == ("2" if taken else "1")
        says = [str(entry["reason"]) for entry in service.index()]
        refused = any("its tensors are not those of version 1; unload that one first" in reason for reason in says)
        assert refused is not taken
        await service.stop()

    run(work())


def test_a_model_that_never_loaded_is_told_with_its_reason(tmp_path: Path) -> None:
    path = bundle(tmp_path / "net")
    (path.parent / "model" / "model.onnx").write_bytes(b"nothing")

    async def work() -> None:
        service = await started(path)
        assert not service.ready()
        assert "manifest" in service.index()[0]["reason"]
        with pytest.raises(ModelNotReady, match="manifest"):
            await service.infer(request(rows(1)))
        assert not service.model_ready("net")
        await service.stop()

    run(work())


def test_golden_answers_are_checked_before_it_is_ready(tmp_path: Path) -> None:
    path = bundle(tmp_path / "net")

    async def work() -> None:
        first = await started(path)
        answer = await first.infer(request(rows(11)))
        await first.stop()
        write_golden(path.parent, Golden({"x": rows(11)}, {"y": answer.outputs[0].data}))
        again = await started(path)
        assert again.ready()
        await again.stop()

    run(work())


def test_an_unloaded_model_is_gone_and_can_come_back(tmp_path: Path) -> None:
    path = bundle(tmp_path / "net")

    async def work() -> None:
        service = await started(path)
        await service.unload("net")
        with pytest.raises(ModelNotReady):
            await service.infer(request(rows(1)))
        assert service.index(ready=True) == []
        await service.load("net")
        assert (await service.infer(request(rows(1)))).version == "1"
        await service.stop()

    run(work())


@pytest.mark.parametrize("broken", ["gone", "manifest", "defect"])
def test_whatever_goes_wrong_in_a_load_fails_the_version_and_the_old_one_stays(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = tmp_path / "models"
    bundle(models / "net" / "1")

    async def work() -> None:
        service = Service(open_repository(models))
        await service.start()
        new = bundle(models / "net" / "2").parent
        if broken == "gone":  # listed, and renamed before it is opened
            monkeypatch.setattr(store, "hash_file", lambda path: path.with_name("gone").open("rb"))
        elif broken == "manifest":
            (new / MODEL / MANIFEST).write_bytes(b"\xff")
        else:
            monkeypatch.setattr(lifecycle, "read_bundle", lambda *_: 1 / 0)
        with pytest.raises(ModelNotReady, match=r"version 2 of model 'net' failed to load: .*; version 1 stays"):
            await service.load("net", "2")
        assert [(item["version"], item["state"]) for item in service.index()] == [("1", "READY"), ("2", "UNAVAILABLE")]
        assert len((await service.infer(request(rows(1)))).outputs) == 1
        await service.stop()

    run(work())


def test_a_model_that_is_asked_for_while_the_server_ends_is_not_loaded(tmp_path: Path) -> None:
    models = tmp_path / "models"
    bundle(models / "net")

    async def work() -> None:
        service = Service(open_repository(models))
        await service.start()
        bundle(models / "late")
        service.drain()
        with pytest.raises(ModelNotReady, match="the server is ending"):
            await service.load("late")
        assert await service.stop()

    run(work())


def test_the_watched_folder_loads_what_is_new_and_unloads_what_has_gone(tmp_path: Path) -> None:
    home = tmp_path / "models"
    bundle(home / "net" / "1")

    async def work() -> None:
        service = await started(home)
        bundle(home / "net" / "2", model=mlp(seed=1))
        bundle(home / "more", model=mlp(seed=2))
        await service.refresh()
        assert {(e["name"], e["version"]) for e in service.index(ready=True)} == {("net", "2"), ("more", "1")}
        shutil.rmtree(home / "more")
        await service.refresh()
        assert {e["name"] for e in service.index(ready=True)} == {"net"}
        assert service.ready()
        await service.stop()

    run(work())


def test_a_bundle_that_is_copied_file_by_file_is_loaded_once_it_is_whole(tmp_path: Path) -> None:
    home = tmp_path / "models"
    bundle(home / "net" / "1")
    bundle(tmp_path / "new", model=mlp(seed=1))

    async def work() -> None:
        service = await started(home)
        target = home / "net" / "2"
        target.mkdir()
        shutil.copy2(tmp_path / "new" / FILE, target)
        await service.refresh()
        assert service.models()[0].version == "1", "its model is still on the way"
        shutil.copytree(tmp_path / "new", target, dirs_exist_ok=True)
        await service.refresh()
        assert (service.models()[0].version, service.ready()) == ("2", True)
        await service.stop()

    run(work())


def test_a_model_that_failed_is_not_waited_for_once_it_has_gone_or_is_unloaded(tmp_path: Path) -> None:
    home = tmp_path / "models"
    for name in ("net", "bad", "worse"):
        bundle(home / name)
    for name in ("bad", "worse"):
        (home / name / MODEL / "model.onnx").write_bytes(b"nothing")

    async def work() -> None:
        service = await started(home)
        assert not service.ready()
        shutil.rmtree(home / "bad")
        await service.refresh()
        assert {entry["name"] for entry in service.index()} == {"net", "worse"}
        assert not service.ready(), "the other one is still asked for"
        await service.unload("worse")
        assert service.ready()
        with pytest.raises(ModelNotFound, match="'worse' is not loaded"):
            await service.unload("worse")
        await service.stop()

    run(work())


def test_a_version_that_was_overwritten_is_not_gone_back_to(tmp_path: Path) -> None:
    bundle(tmp_path / "models" / "net")

    async def work() -> None:
        service = await started(tmp_path / "models")
        bundle(tmp_path / "models" / "net", model=mlp(seed=1))
        await service.refresh()
        now = (await service.infer(request(rows(1)))).outputs[0].data
        with pytest.raises(ModelNotFound, match=r"was overwritten.*a folder of its own"):
            await service.rollback("net")
        np.testing.assert_array_equal((await service.infer(request(rows(1)))).outputs[0].data, now)
        await service.stop()

    run(work())


def test_the_watched_folder_goes_back_when_the_newest_version_is_taken_away(tmp_path: Path) -> None:
    home = tmp_path / "models"
    bundle(home / "net" / "1")
    bundle(home / "net" / "2", model=mlp(seed=1))

    async def work() -> None:
        service = await started(home)
        assert (await service.infer(request(rows(1)))).version == "2"
        shutil.rmtree(home / "net" / "2")
        await service.refresh()
        assert (await service.infer(request(rows(1)))).version == "1"
        await service.stop()

    run(work())


def test_a_bundle_of_another_processor_is_refused_with_both_fingerprints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "models"
    bundle(home / "net" / "1")

    async def work() -> None:
        service = await started(home)
        with monkeypatch.context() as elsewhere:
            other = replace(this_host(), cpu="another one")
            elsewhere.setattr("hasten.engines.built.this_host", lambda: other)
            bundle(home / "net" / "2", model=mlp(seed=1))
        with pytest.raises(ModelNotReady, match="built for another processor") as told:
            await service.load("net")
        assert other.binding in str(told.value)
        assert this_host().binding in str(told.value)
        assert (await service.infer(request(rows(1)))).version == "1"
        await service.stop()

    run(work())


def test_versions_that_have_gone_from_the_folder_are_forgotten_after_a_while(tmp_path: Path) -> None:
    home = tmp_path / "models"
    bundle(home / "net" / "1")

    async def work() -> None:
        service = await started(home)
        for version in range(2, 15):
            (home / "net" / str(version - 1)).rename(home / "net" / str(version))
            await service.load("net")
        while any(state["state"] == "UNLOADING" for state in service.index()):
            await asyncio.sleep(0.001)
        assert service.models()[0].version == "14"
        assert len(service.index()) <= 1 + KEPT_FATES
        assert len(service.index(ready=True)) == 1
        await service.stop()

    run(work())


def test_a_bundle_that_is_written_anew_replaces_itself(tmp_path: Path) -> None:
    path = bundle(tmp_path / "net")

    async def work() -> None:
        service = await started(path)
        before = (await service.infer(request(rows(2)))).outputs[0].data
        bundle(tmp_path / "net", model=mlp(seed=5))
        await service.refresh()
        after = (await service.infer(request(rows(2)))).outputs[0].data
        assert not np.allclose(before, after)
        await service.stop()

    run(work())


def test_a_copy_of_the_same_size_and_times_is_taken_once_it_is_whole(tmp_path: Path) -> None:
    """As ``cp -p``, ``tar`` and ``rsync -a`` leave it: nothing is newer than what was there."""
    home, other = tmp_path / "models", tmp_path / "other"
    bundle(home / "net")
    bundle(other, model=mlp(seed=5))
    for file in other.rglob("*"):
        os.utime(file, ns=(1, 1))

    async def work() -> None:
        service = await started(home)
        before = (await service.infer(request(rows(2)))).outputs[0].data
        for name in (FILE, "golden.npz", "model/manifest.json"):
            if (other / name).exists():
                shutil.copy2(other / name, home / "net" / name)
        await service.refresh()
        assert service.model_ready("net"), "what was loaded stays while the copy is not whole"
        shutil.copy2(other / "model" / "model.onnx", home / "net" / "model" / "model.onnx")
        await service.refresh()
        assert not np.allclose(before, (await service.infer(request(rows(2)))).outputs[0].data)
        await service.stop()

    run(work())


def test_what_could_not_be_loaded_is_tried_again_where_that_is_asked(
    tmp_path: Path, inside: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "models"
    bundle(home / "net")
    bundle(home / "other")

    def fails(*given: Any) -> Any:
        raise StoreError("not today")

    async def work() -> None:
        with inside.context() as patch:
            patch.setattr("hasten.serve.lifecycle.read_bundle", fails)
            service = Service(open_repository(home))
            await service.start()
        await service.refresh()
        assert not service.index(ready=True), "nothing has changed, and nobody asks"
        await service.refresh(anew=True)
        assert [entry["name"] for entry in service.index(ready=True)] == ["net", "other"]
        await service.stop()

    run(work())


def test_a_folder_that_cannot_be_looked_at_keeps_what_serves_and_hides_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    home = tmp_path / "models"
    bundle(home / "net")
    (home / "private").mkdir()
    look, scan = Path.stat, Path.iterdir

    def stat(path: Path, **more: Any) -> os.stat_result:
        if path == home / "net" / FILE:
            raise PermissionError(13, "Permission denied")
        return look(path, **more)

    def iterdir(path: Path) -> Iterator[Path]:
        if path == home / "private":
            raise PermissionError(13, "Permission denied")
        return scan(path)

    async def work() -> None:
        service = await started(home)
        with monkeypatch.context() as patch:
            patch.setattr(Path, "stat", stat)
            patch.setattr(Path, "iterdir", iterdir)
            bundle(home / "other")
            for _ in range(2):
                await service.refresh()
        assert [entry["name"] for entry in service.index(ready=True)] == ["net", "other"]
        await service.stop()

    run(work())
    assert caplog.text.count(f"{home / 'net'} cannot be looked at: Permission denied") == 1
    assert caplog.text.count(f"{home / 'private'} cannot be looked at: Permission denied") == 1


def test_what_is_left_out_of_a_repository_is_said_and_a_link_to_itself_stops_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    home = tmp_path / "models"
    bundle(home / "net")
    bundle(home / "a b")
    (home / "loop").symlink_to("loop")
    (home / "lost+found").mkdir()
    (home / ".hidden").symlink_to(tmp_path)
    assert set(open_repository(home).scan()) == {"net"}
    told = [line.getMessage() for line in caplog.records]
    assert sorted(told) == [
        f"{home / 'a b'} is left out: it has a name that no client could write",
        f"{home / 'loop'} is left out: it leads out of the repository",
    ]


def test_a_folder_is_followed_on_whatever_went_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    home = tmp_path / "models"
    bundle(home / "net")
    scan, left = Repository.scan, [RuntimeError("of any kind"), StoreError("unreadable")]

    def fails(repository: Repository, known: Any = None) -> Any:
        if left:
            raise left.pop()
        return scan(repository, known)

    async def work() -> None:
        service = await started(home)
        monkeypatch.setattr(Repository, "scan", fails)
        bundle(home / "more")
        following = asyncio.create_task(service.follow(0.001))
        while "more" not in [entry["name"] for entry in service.index(ready=True)]:
            await asyncio.sleep(0)
        following.cancel()
        await service.stop()

    run(work())
    assert "of any kind" in caplog.text
    assert "unreadable" in caplog.text


def test_a_thread_that_the_system_does_not_give_is_asked_for_again(
    tmp_path: Path, inside: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path, start = bundle(tmp_path / "net"), Instance.start

    def fails(instance: Instance) -> None:
        inside.setattr(Instance, "start", start)
        raise RuntimeError("can't start new thread")

    async def work() -> None:
        service = await started(path)
        (model,) = service.models()
        assert isinstance(model, Model)
        model.pool._retry_s = 0.001
        inside.setattr(Instance, "start", fails)
        for instance in list(model.pool._ready):
            model.pool._lose(instance)
        while not model.ready:
            await asyncio.sleep(0)
        assert len((await service.infer(request(rows(1)))).outputs) == 1
        await service.stop()

    run(work())
    assert "no thread can be started: can't start new thread" in caplog.text


def test_names_never_leave_the_folder(tmp_path: Path) -> None:
    home = tmp_path / "models"
    bundle(home / "net")
    bundle(tmp_path / "secret")
    (home / "link").symlink_to(tmp_path / "secret")
    repository = open_repository(home)
    assert set(repository.scan()) == {"net"}
    for name in ("../secret", "link", "net/../../secret", "", ".", str(tmp_path / "secret")):
        with pytest.raises(ModelNotFound):
            repository.find(name)
        with pytest.raises(ModelNotFound):
            repository.find("net", name or "..")


def test_the_newest_version_is_the_highest_number(tmp_path: Path) -> None:
    for version in ("2", "10", "beta"):
        folder = tmp_path / "net" / version
        folder.mkdir(parents=True)
        (folder / FILE).write_text("")
    assert Repository(tmp_path).find("net").version == "10"


def test_a_folder_without_a_deployment_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="holds no deployment"):
        open_repository(tmp_path)


def test_golden_answers_come_back_and_pickles_do_not(tmp_path: Path) -> None:
    golden = Golden({"a/b:0": rows(2)}, {"y": np.arange(3)})
    write_golden(tmp_path, golden)
    back = read_golden(tmp_path)
    assert back is not None
    np.testing.assert_array_equal(back.inputs["a/b:0"], rows(2))
    np.savez(tmp_path / "golden", **{"inputs:x": np.array([{}], object)})
    with pytest.raises(StoreError, match="cannot be read"):
        read_golden(tmp_path)


def test_a_bundle_from_before_there_were_serving_fields_still_loads(tmp_path: Path) -> None:
    path = bundle(tmp_path / "net")
    text = path.read_text()
    path.write_text(text[: text.index("[serving]")])
    assert parse_deployment(path).serving == Serving()


@pytest.mark.parametrize(
    ("line", "says"),
    [("instnaces = 2", "did you mean 'instances'"), ("queue_rows = 0", "queue_rows"), ('isolation = "x"', "isolation")],
)
def test_a_wrong_serving_field_is_told(tmp_path: Path, line: str, says: str) -> None:
    path = bundle(tmp_path / "net")
    text = path.read_text()
    path.write_text(text[: text.index("[serving]")] + f"[serving]\n{line}\n")
    with pytest.raises(StoreError, match=says):
        parse_deployment(path)


def test_a_load_that_is_cancelled_leaves_nothing_behind(tmp_path: Path) -> None:
    home = tmp_path / "models"
    bundle(home / "net" / "1")

    async def work() -> None:
        service = await started(home)
        bundle(home / "net" / "2", model=mlp(seed=1))
        loading = asyncio.create_task(service.load("net"))
        await asyncio.sleep(0)
        loading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await loading
        assert (await service.infer(request(rows(1)))).version == "1"
        await service.load("net")
        assert (await service.infer(request(rows(1)))).version == "2"
        await service.stop()

    run(work())


def test_a_model_that_is_added_and_fails_does_not_take_the_server_out_of_rotation(tmp_path: Path) -> None:
    home = tmp_path / "models"
    bundle(home / "net")

    async def work() -> None:
        service = await started(home)
        path = bundle(home / "more", model=mlp(seed=2))
        (path.parent / "model" / "model.onnx").write_bytes(b"nothing")
        await service.refresh()
        assert service.ready()
        assert not service.model_ready("more")
        await service.stop()

    run(work())


def test_the_server_is_not_ready_before_every_model_of_the_folder_is(tmp_path: Path) -> None:
    home = tmp_path / "models"
    for name in ("a", "b", "c"):
        bundle(home / name)

    async def work() -> None:
        service = Service(open_repository(home))
        starting = asyncio.create_task(service.start())
        while not starting.done():
            serving = len(service.index(ready=True))
            assert service.ready() == (serving == 3)
            await asyncio.sleep(0)
        assert service.ready()
        await service.stop()

    run(work())
