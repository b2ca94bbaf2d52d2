import hashlib
import json
import pickle
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from hasten.torchview.checkpoint import KEPT, Checkpoints  # noqa: E402


def state(step):
    return {"view": {"w": torch.full((4, 3), float(step))}, "plain": f"[{step}]", "averaged": None}


def filled(folder, steps=3, question="q"):
    checkpoints = Checkpoints(folder, question)
    for step in range(1, steps + 1):
        checkpoints.save(step, state(step))
    return checkpoints


def test_the_newest_is_loaded(tmp_path):
    step, loaded = filled(tmp_path).load()
    assert step == 3
    assert loaded["plain"] == "[3]"
    assert torch.equal(loaded["view"]["w"], torch.full((4, 3), 3.0))


def test_two_are_kept(tmp_path):
    filled(tmp_path, steps=5)
    assert len(list(tmp_path.iterdir())) == KEPT == 2


def test_an_empty_or_missing_folder_holds_none(tmp_path):
    assert Checkpoints(tmp_path, "q").load() is None
    assert Checkpoints(tmp_path / "nowhere", "q").load() is None


def test_those_of_another_training_are_neither_loaded_nor_removed(tmp_path):
    filled(tmp_path, question="a")
    assert Checkpoints(tmp_path, "b").load() is None
    filled(tmp_path, steps=1, question="b")
    assert Checkpoints(tmp_path, "a").load()[0] == 3
    assert Checkpoints(tmp_path, "b").load()[0] == 1


def test_one_renamed_as_another_trainings_is_not_loaded(tmp_path):
    filled(tmp_path, steps=1, question="a")
    (path,) = tmp_path.iterdir()
    path.rename(path.with_name(path.name.replace("a-", "b-", 1)))
    assert Checkpoints(tmp_path, "b").load() is None


@settings(max_examples=30, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255), cut=st.booleans())
def test_a_damaged_one_gives_way_to_the_one_before(tmp_path_factory, place, flip, cut):
    folder = tmp_path_factory.mktemp("damaged")
    checkpoints = filled(folder)
    newest = max(folder.iterdir())
    data = bytearray(newest.read_bytes())
    at = int(place * len(data))
    if cut:
        del data[at:]
    else:
        data[at] ^= flip
    newest.write_bytes(data)
    assert checkpoints.load()[0] == 2


def test_what_would_run_code_is_not_run(tmp_path):
    checkpoints = filled(tmp_path, steps=1)

    class Planted:
        def __reduce__(self):
            return Path.touch, (tmp_path / "touched",)

    body = pickle.dumps(Planted(), protocol=2)  # as torch.save writes
    header = {"question": "q", "step": 2, "sha256": hashlib.sha256(body).hexdigest()}
    (tmp_path / "q-000000002.checkpoint").write_bytes(json.dumps(header).encode() + b"\n" + body)
    assert checkpoints.load()[0] == 1
    assert not (tmp_path / "touched").exists()


def test_a_write_that_fails_leaves_those_before(tmp_path, monkeypatch):
    checkpoints = filled(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def fails(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fails)
    with pytest.raises(Exception, match="the disk is full"):
        checkpoints.save(4, state(4))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
