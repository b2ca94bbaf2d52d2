from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from hasten.artifact import Artifact, Step, hash_files
from hasten.tensors import Signature, TensorSpec

SIGNATURE = Signature((TensorSpec("x", "float32", ("batch", 2)),), (TensorSpec("y", "float32", ("batch",)),))


def artifact(folder: Path, content: bytes = b"model", **changes) -> Artifact:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.onnx").write_bytes(content)
    return Artifact.of(folder, "model.onnx", **{"format": "onnx", "signature": SIGNATURE, **changes})


def test_the_same_bytes_made_the_same_way_are_the_same_model_anywhere(tmp_path):
    first, second = artifact(tmp_path / "a"), artifact(tmp_path / "b")
    assert (first.content, first.digest) == (second.content, second.digest)


@pytest.mark.parametrize(
    "changes",
    [
        {"traits": ("int8",)},
        {"host": "abc"},
        {"preprocess": {"resize": [8, 8]}},
        {"signature": Signature((TensorSpec("x", "float32", ("n", 2)),), SIGNATURE.outputs)},
    ],
)
def test_what_describes_a_model_is_in_its_digest_and_not_in_its_content(tmp_path, changes):
    first, second = artifact(tmp_path / "a"), artifact(tmp_path / "b", **changes)
    assert first.digest != second.digest
    assert first.content == second.content


@pytest.mark.parametrize("changes", [{"content": b"other"}, {"format": "openvino"}])
def test_other_bytes_or_another_format_are_other_content(tmp_path, changes):
    assert artifact(tmp_path / "a").content != artifact(tmp_path / "b", **changes).content


def test_lineage_counts_but_how_long_it_took_does_not(tmp_path):
    source = artifact(tmp_path / "a")
    quick, slow = (source.after(Step(name="fold", seconds=s), source=source) for s in (1.0, 2.0))
    assert quick.digest == slow.digest != source.digest
    assert source.after(Step(name="fold", settings={"max_bytes": 1}), source=source).digest != quick.digest


def test_a_step_comes_behind_the_lineage_of_its_source(tmp_path):
    source = artifact(tmp_path / "a").after(Step(name="import"), source=None)
    made = artifact(tmp_path / "b", b"other").after(Step(name="fold", source=source.digest), source=source)
    assert [step.name for step in made.lineage] == ["import", "fold"]
    assert made.lineage[-1].source == source.digest


def test_files_below_folders_are_hashed_and_counted(tmp_path):
    (tmp_path / "a" / "deep").mkdir(parents=True)
    (tmp_path / "a" / "deep" / "weights.bin").write_bytes(b"12345")
    made = artifact(tmp_path / "a")
    assert set(made.files) == {"model.onnx", "deep/weights.bin"}
    assert made.size_bytes == 10
    assert made.entry.read_bytes() == b"model"


def test_a_changed_file_has_another_hash(tmp_path):
    made = artifact(tmp_path / "a")
    made.entry.write_bytes(b"changed")
    assert hash_files(made.folder) != made.files


def test_a_copy_with_another_trait_does_not_keep_the_old_digest(tmp_path):
    made = artifact(tmp_path / "a")
    before = made.digest
    assert replace(made, traits=frozenset({"int8"})).digest != before
