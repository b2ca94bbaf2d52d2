from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from hasten.artifact import Artifact, Step
from hasten.errors import StoreError
from hasten.store import MANIFEST, Store, read_artifact, write_atomically
from hasten.tensors import Signature, TensorSpec

SIGNATURE = Signature((TensorSpec("x", "float32", ("batch", 2)),), (TensorSpec("y", "float32", ("batch",)),))


def put(store: Store, content: bytes = b"model", **changes) -> Artifact:
    with store.scratch() as folder:
        (folder / "model.onnx").write_bytes(content)
        made = Artifact.of(folder, "model.onnx", **{"format": "onnx", "signature": SIGNATURE, **changes})
        return store.put(made.after(Step(name="import", seconds=1.5), source=None))


def test_what_is_put_comes_back_whole(store: Store):
    made = put(store, traits=("int8",), host="abc", preprocess={"mean": [0.5]})
    again = store.get(made.digest)
    assert again == made
    assert again.digest == made.digest == again.folder.name
    assert again.entry.read_bytes() == b"model"
    assert again.lineage[0].seconds == 1.5


def test_putting_the_same_twice_keeps_one_and_leaves_nothing_behind(store: Store):
    assert put(store) == put(store)
    assert len(list(store.artifacts())) == 1
    assert not list((store.root / "tmp").iterdir())


def test_the_first_characters_of_a_digest_are_enough_where_only_one_begins_so(store: Store):
    made = put(store)
    assert store.get(made.digest[:6]) == made
    for i in range(20):
        put(store, str(i).encode())
    with pytest.raises(StoreError, match="begin with"):
        store.get("")
    with pytest.raises(StoreError, match="0 artifacts"):
        store.get("zzz")


def test_a_digest_is_no_path(store: Store):
    put(store)
    with pytest.raises(StoreError):
        store.get("../objects/*")


def test_a_changed_file_is_found(store: Store):
    made = put(store)
    store.verify(made)
    made.entry.write_bytes(b"evil")
    with pytest.raises(StoreError, match=r"model\.onnx is not what its manifest says; delete that folder"):
        store.verify(made)


@pytest.mark.parametrize("name", ["extra", "below/extra"])
def test_an_extra_file_is_found(store: Store, name: str):
    made = put(store)
    (made.folder / name).parent.mkdir(exist_ok=True)
    (made.folder / name).write_bytes(b"")
    with pytest.raises(StoreError, match=f"{name} is not in its manifest; delete that file"):
        store.verify(made)


@pytest.mark.parametrize("name", [".nfs0000", ".DS_Store", ".model.onnx.swp", "..data", ".snapshot/model.onnx"])
def test_what_others_put_beside_a_model_under_a_hidden_name_is_let_be(store: Store, name: str):
    made = put(store)
    (made.folder / name).parent.mkdir(exist_ok=True)
    (made.folder / name).write_bytes(b"theirs")
    store.verify(made)


def test_a_hidden_file_that_the_manifest_names_is_checked(store: Store):
    with store.scratch() as folder:
        (folder / "model.onnx").write_bytes(b"model")
        (folder / ".weights").write_bytes(b"weights")
        made = store.put(Artifact.of(folder, "model.onnx", format="onnx", signature=SIGNATURE))
    store.verify(made)
    (made.folder / ".weights").unlink()
    with pytest.raises(StoreError, match=r"\.weights is not what its manifest says"):
        store.verify(made)


def test_whoever_copies_a_bundle_is_told_to_copy_it_again_not_to_delete_it(store: Store, tmp_path: Path):
    copied = tmp_path / "bundle" / "model"
    shutil.copytree(put(store).folder, copied)
    (copied / "model.onnx").write_bytes(b"mod")
    with pytest.raises(StoreError, match="not whole yet, or damaged: copy it again") as told:
        Store(copied.parent).verify(read_artifact(copied))
    assert "delete" not in str(told.value)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../b"])
def test_a_manifest_that_names_files_outside_its_folder_is_refused(store: Store, name):
    made = put(store)
    manifest = made.folder / MANIFEST
    manifest.write_text(manifest.read_text().replace('"entry_name": "model.onnx"', f'"entry_name": "{name}"'))
    with pytest.raises(StoreError, match="outside its folder"):
        read_artifact(made.folder)


@pytest.mark.parametrize("damage", ["", "{", '{"format": 3}'])
def test_a_damaged_manifest_is_one_line(store: Store, damage):
    made = put(store)
    (made.folder / MANIFEST).write_text(damage)
    with pytest.raises(StoreError, match="cannot be read"):
        store.get(made.digest)


def test_a_folder_without_a_manifest_holds_no_artifact(tmp_path):
    with pytest.raises(StoreError, match="holds no artifact"):
        read_artifact(tmp_path)


def test_a_step_is_remembered_until_its_artifact_is_gone(store: Store):
    made = put(store)
    assert store.cached("key") is None
    store.remember("key", made)
    assert store.cached("key") == made
    (made.folder / MANIFEST).unlink()
    assert store.cached("key") is None


@pytest.mark.parametrize("damage", ["", "[]", "{}"])
def test_a_damaged_note_of_a_step_is_one_line(store: Store, damage):
    store.remember("key", put(store))
    (store.root / "cache" / "key.json").write_text(damage)
    with pytest.raises(StoreError, match=r"key\.json cannot be read"):
        store.cached("key")


def test_scratch_is_gone_afterwards_also_when_something_fails(store: Store):
    with pytest.raises(RuntimeError), store.scratch() as folder:
        (folder / "half").write_bytes(b"x")
        raise RuntimeError
    assert not folder.exists()


def full_disk(*arguments: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch):
    path = tmp_path / "note.json"
    write_atomically(path, b"old")
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(StoreError, match="the disk is full"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_while_putting_leaves_no_artifact(store: Store, monkeypatch):
    monkeypatch.setattr(Path, "write_bytes", full_disk, raising=True)
    with pytest.raises(StoreError, match="the disk is full"), store.scratch() as folder:
        (folder / "model.onnx").touch()
        store.put(Artifact.of(folder, "model.onnx", format="onnx", signature=SIGNATURE))
    assert not list(store.artifacts())
    assert not list((store.root / "tmp").iterdir())


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match="cannot write"):
        write_atomically(tmp_path / "file" / "below", b"")


def test_what_a_killed_process_left_goes_when_the_next_one_works(store) -> None:
    left = store.root / "tmp" / "999999999-abc"
    left.mkdir(parents=True)
    (left / "half.onnx").write_bytes(b"half")
    with store.scratch() as folder:
        assert not left.exists()
        with store.scratch() as second:
            assert folder.exists()
            assert second != folder
