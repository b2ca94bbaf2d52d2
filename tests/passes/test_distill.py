from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest

torch = pytest.importorskip("torch")

from hasten.errors import BadInput, SignatureMismatch, Unsupported  # noqa: E402
from hasten.passes.distill import Distill, read_student, student_files  # noqa: E402
from hasten.samples import Samples  # noqa: E402
from hasten.testing.models import mlp, stored, write  # noqa: E402
from hasten.transform import HISTORY, run_pass, step_key  # noqa: E402


def rows(n=600, seed=0):
    return np.random.default_rng(seed).standard_normal((n, 16)).astype(np.float32)


def outputs(artifact, x):
    return onnxruntime.InferenceSession(str(artifact.entry)).run(None, {"x": x})[0]


def how(path, **settings):
    return Distill(**{"student": str(path), "epochs": 10.0, "batch": 32, "lr": 1e-2, "threads": 1, **settings})


@pytest.fixture
def source(store):
    return stored(mlp(), store)


@pytest.fixture
def small(tmp_path):
    return write(mlp(hidden=16, seed=4), tmp_path / "student.onnx")


def test_the_student_learns_what_the_source_says_and_takes_its_place(source, small, store, ctx):
    made = run_pass(how(small), source, store, replace(ctx, training=Samples({"x": rows()})))
    fresh = rows(seed=9)
    untrained = onnxruntime.InferenceSession(str(small)).run(None, {"x": fresh})[0]
    classes = outputs(source, fresh).argmax(1)
    before, after = ((found.argmax(1) == classes).mean() for found in (untrained, outputs(made, fresh)))
    assert after > before + 0.2
    assert made.size_bytes - (made.folder / HISTORY).stat().st_size < 0.6 * source.size_bytes
    assert made.traits == {"distilled"}
    assert made.signature == source.signature
    assert [step.name for step in made.lineage] == ["import", "distill"]
    assert HISTORY in made.files


def test_preprocessing_stays_and_traits_of_the_source_do_not(source, small, store, ctx):
    traited = replace(source, traits=frozenset({"int8"}), preprocess={"x": {"scale": 2}})
    with store.scratch() as folder:
        context = replace(ctx, folder=folder, training=Samples({"x": rows(200)}))
        made = how(small, epochs=1.0).apply(traited, context)
    assert made.traits == {"distilled"}
    assert made.preprocess == {"x": {"scale": 2}}


@pytest.mark.parametrize(
    ("student", "message"),
    [
        (mlp(classes=7), r"among the outputs the student has y: float32\[batch, 7\], the model y: float32\[batch, 4\]"),
        (mlp(features=8), r"among the inputs the student has x: float32\[batch, 8\]"),
    ],
)
def test_a_student_of_another_signature_is_refused(student, message, source, store, ctx, tmp_path):
    path = write(student, tmp_path / "other.onnx")
    with pytest.raises(SignatureMismatch, match=message):
        run_pass(how(path), source, store, replace(ctx, training=Samples({"x": rows()})))


def test_a_changed_student_is_another_question(source, small, ctx):
    before = step_key(how(small), source, ctx)
    assert step_key(how(small), source, ctx) == before
    write(mlp(hidden=16, seed=5), small)
    assert step_key(how(small), source, ctx) != before


def test_weights_in_a_file_of_their_own_count_as_well(source, ctx, tmp_path):
    path = tmp_path / "student.onnx"
    onnx.save_model(mlp(), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert student_files(path) == (path, tmp_path / "weights.bin")
    before = step_key(how(path), source, ctx)
    data = bytearray((tmp_path / "weights.bin").read_bytes())
    data[0] ^= 1
    (tmp_path / "weights.bin").write_bytes(data)
    assert step_key(how(path), source, ctx) != before
    assert len(read_student(path).graph.initializer) == len(mlp().graph.initializer)


def test_weights_outside_of_the_folder_are_not_read(tmp_path):
    (tmp_path / "inner").mkdir()
    model = mlp()
    (tmp_path / "secret.bin").write_bytes(bytes(1 << 16))
    path = tmp_path / "inner" / "student.onnx"
    onnx.save_model(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    pointed = onnx.load(path, load_external_data=False)
    for tensor in pointed.graph.initializer:
        next(item for item in tensor.external_data if item.key == "location").value = "../secret.bin"
    path.write_bytes(pointed.SerializeToString())
    with pytest.raises(BadInput, match=r"the student .* is no valid ONNX model"):
        read_student(path)


def test_a_file_that_is_no_model_is_refused(source, store, ctx, tmp_path):
    path = tmp_path / "student.onnx"
    path.write_bytes(b"no model at all")
    with pytest.raises(BadInput, match=r"student\.onnx is no ONNX model"):
        run_pass(how(path), source, store, replace(ctx, training=Samples({"x": rows()})))


def test_an_old_student_is_to_be_imported_first(tmp_path):
    model = mlp()
    model.opset_import[0].version = 11
    with pytest.raises(BadInput, match="has opset 11, training needs 13; import it first"):
        read_student(write(model, tmp_path / "old.onnx"))


def test_it_says_when_there_is_no_student(source, tmp_path):
    assert "give the path of an ONNX file as the setting 'student'" in Distill().why_not(source)
    assert "there is no file" in how(tmp_path / "nowhere.onnx").why_not(source)
    assert "not 'nonsense'" in Distill().why_not(replace(source, format="nonsense"))


def test_without_samples_it_says_what_to_give(source, small, store, ctx):
    with pytest.raises(Unsupported, match="distill: it needs samples to train on; give some with --train"):
        run_pass(how(small), source, store, ctx)
