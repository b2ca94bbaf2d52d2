import ml_dtypes
import numpy as np
import pytest

from hasten.errors import BadInput, SignatureMismatch, StoreError
from hasten.samples import Samples
from hasten.tensors import Signature, TensorSpec


def test_arrays_of_different_lengths_are_refused_with_both() -> None:
    with pytest.raises(BadInput, match=r"'x' has 3.*labels has 2"):
        Samples({"x": np.zeros((3, 1))}, np.zeros(2))


def test_python_objects_are_refused() -> None:
    with pytest.raises(BadInput, match="Python objects"):
        Samples({"x": np.array(["a", None], dtype=object)})


def test_what_was_saved_loads_the_same(tmp_path) -> None:
    samples = Samples(
        {"x": np.arange(6, dtype=np.float32).reshape(3, 2), "b": np.ones((3, 1), ml_dtypes.bfloat16)},
        np.array([0, 1, 0]),
        ("no", "yes"),
    )
    samples.save(tmp_path)
    loaded = Samples.load(tmp_path)
    assert loaded.digest == samples.digest
    assert loaded.take(range(3)).digest == samples.digest
    assert loaded.inputs["b"].dtype == ml_dtypes.bfloat16
    assert loaded.classes == ("no", "yes")


def test_a_new_save_leaves_alone_what_is_mapped_from_the_old_one(tmp_path) -> None:
    Samples({"x": np.zeros((4, 2), np.float32)}).save(tmp_path)
    mapped = Samples.load(tmp_path)
    Samples({"x": np.ones((4, 2), np.float32)}).save(tmp_path)
    assert not np.any(mapped.inputs["x"])
    assert np.all(Samples.load(tmp_path).inputs["x"] == 1)


def test_a_folder_without_an_index_is_no_samples(tmp_path) -> None:
    with pytest.raises(StoreError, match="no readable samples"):
        Samples.load(tmp_path)


def test_samples_that_do_not_fit_say_which_axis() -> None:
    signature = Signature((TensorSpec("x", "float32", ("n", 3)),), ())
    with pytest.raises(SignatureMismatch, match=r"length 3 on axis 1.*got 2"):
        Samples({"x": np.zeros((4, 2), np.float32)}).check(signature)


SIGNATURE = Signature((TensorSpec("x", "float32", ("n", 2)),), ())


@pytest.mark.parametrize("dtype", [np.float16, np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_labels_that_are_not_finite_are_refused_with_the_first_row_and_their_number(dtype, value) -> None:
    labels = np.zeros((9, 2), dtype)
    labels[[4, 7], 1] = value
    with pytest.raises(BadInput, match=r"labels of 2 of 9 samples are NaN or infinite, the first in row 4; take"):
        Samples({"x": np.zeros((9, 2), np.float32)}, labels).check(SIGNATURE)


@pytest.mark.parametrize("labels", [np.array(["a", "b"]), np.array([b"a", b"b"])])
def test_labels_that_are_texts_are_refused_with_what_to_give(labels) -> None:
    with pytest.raises(BadInput, match=r"are texts; give the index of each sample's class.*classes="):
        Samples({"x": np.zeros((2, 2), np.float32)}, labels).check(SIGNATURE)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"inputs": [["x", "float32"]]}',
        '{"inputs": [["x"]], "labels": false, "classes": null, "digest": "0"}',
        '{"inputs": 3, "labels": false, "classes": null, "digest": "0"}',
        '{"inputs": [], "labels": false, "classes": null, "digest": "0"}',
        '{"inputs": [["x", "float32"]], "labels": true, "classes": null, "digest": "0"}',
        '{"inputs": [["x", "float32"]], "labels": false, "classes": 7, "digest": "0"}',
    ],
)
def test_a_damaged_index_is_no_samples(tmp_path, text) -> None:
    Samples({"x": np.zeros((4, 2), np.float32)}).save(tmp_path)
    (tmp_path / "samples.json").write_text(text)
    with pytest.raises(StoreError, match="no readable samples"):
        Samples.load(tmp_path)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x93NUMPY\x01\x00",
        b"\x93NUMPY\x01\x00\x04\x00(((\n",
        b"\x93NUMPY\x01\x00\x3c\x00{'descr': '<f4', 'fortran_order': False, 'shape': (9, 9), }\n",
        b"\x93NUMPY\x01\x00\x3d\x00{'descr': '<f4', 'fortran_order': False, 'shape': (-9, 9), }\n",
        b"nonsense",
    ],
)
def test_a_damaged_array_is_no_samples(tmp_path, data) -> None:
    Samples({"x": np.zeros((4, 2), np.float32)}).save(tmp_path)
    (tmp_path / "input0.npy").write_bytes(data)
    with pytest.raises(StoreError, match="no readable samples"):
        Samples.load(tmp_path)
