import io
import tracemalloc
import warnings
import zipfile
from pathlib import Path

import arro3.core
import arro3.io
import ml_dtypes
import msgspec
import numpy as np
import pytest
from PIL import Image

from hasten.errors import BadInput, SignatureMismatch, UnknownName
from hasten.samples import Samples, arrow
from hasten.samples.fit import cast
from hasten.samples.preprocess import Preprocess
from hasten.samples.readers import read_samples
from hasten.tensors import Signature, TensorSpec


def model(**inputs) -> Signature:
    return Signature(tuple(TensorSpec(name, dtype, shape) for name, (dtype, shape) in inputs.items()), ())


FEATURES = model(x=("float32", ("n", 2)))
PICTURES = model(x=("float32", ("n", 3, 4, 5)))


def image(value: int, *, size=(4, 5), ending="PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((*size, 3), value, np.uint8)).save(file, ending)
    return file.getvalue()


def lists(array: np.ndarray) -> arro3.core.Array:
    """[n, a, b] as lists of lists of different kinds."""
    flat = arro3.core.Array.from_numpy(np.ascontiguousarray(array).reshape(-1))
    inner = arro3.core.fixed_size_list_array(flat, array.shape[-1])
    if array.ndim == 2:
        return inner
    offsets = np.arange(0, len(array) * array.shape[1] + 1, array.shape[1], dtype=np.int32)
    return arro3.core.list_array(arro3.core.Array.from_numpy(offsets), inner)


def binary(items: list) -> arro3.core.Array:
    return arro3.core.Array(items, type=arro3.core.DataType.binary())


def text(items: list) -> arro3.core.Array:
    return arro3.core.Array(items, type=arro3.core.DataType.string())


def table(**columns) -> arro3.core.Table:
    arrays = {
        name: arro3.core.Array.from_numpy(value) if isinstance(value, np.ndarray) else value
        for name, value in columns.items()
    }
    return arro3.core.Table.from_pydict(arrays)


def parquet(path: Path, **columns) -> Path:
    arro3.io.write_parquet(table(**columns), path, max_row_group_size=3)
    return path


def dataset(folder: Path, features: dict, **columns) -> Path:
    folder.mkdir(parents=True)
    arro3.io.write_ipc_stream(table(**columns), folder / "data-00000-of-00001.arrow")
    (folder / "state.json").write_bytes(
        msgspec.json.encode({"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_split": None})
    )
    (folder / "dataset_info.json").write_bytes(msgspec.json.encode({"features": features}))
    return folder


# --- Parquet


def test_columns_of_numbers_feed_one_input_side_by_side(tmp_path) -> None:
    path = parquet(tmp_path / "t.parquet", a=np.arange(7.0), b=np.arange(7), label=np.arange(7) % 2)
    read = read_samples(path, FEATURES)
    np.testing.assert_array_equal(read.samples.inputs["x"], np.stack([np.arange(7)] * 2, 1))
    assert read.samples.inputs["x"].dtype == np.float32
    assert read.samples.labels.tolist() == [0, 1, 0, 1, 0, 1, 0]
    assert read.columns == {"x": ("a", "b")}
    assert read.label == "label"


def test_columns_of_nested_arrays_keep_their_shape_across_row_groups(tmp_path) -> None:
    array = np.arange(5 * 2 * 3, dtype=np.float32).reshape(5, 2, 3)
    read = read_samples(parquet(tmp_path / "t.parquet", x=lists(array)), model(x=("float32", ("n", 2, 3))))
    np.testing.assert_array_equal(read.samples.inputs["x"], array)


def test_flat_arrays_are_unfolded_to_a_static_input(tmp_path) -> None:
    array = np.arange(2 * 12, dtype=np.float32).reshape(2, 12)
    read = read_samples(parquet(tmp_path / "t.parquet", pixels=lists(array)), model(x=("float32", ("n", 1, 3, 4))))
    np.testing.assert_array_equal(read.samples.inputs["x"], array.reshape(2, 1, 3, 4))


def test_a_swapped_shape_is_a_mismatch_not_a_reshape(tmp_path) -> None:
    path = parquet(tmp_path / "t.parquet", x=lists(np.zeros((2, 4, 3), np.float32)))
    with pytest.raises(SignatureMismatch, match=r"\[4, 3\].*\[3, 4\]"):
        read_samples(path, model(x=("float32", ("n", 3, 4))))


@pytest.mark.parametrize("ending", ["PNG", "JPEG"])
def test_encoded_images_are_decoded_to_the_size_of_the_input(tmp_path, ending) -> None:
    images = binary([image(value, size=(8, 8), ending=ending) for value in (0, 51, 255)])
    read = read_samples(parquet(tmp_path / "t.parquet", image=images, label=np.arange(3)), PICTURES)
    assert read.samples.inputs["x"].shape == (3, 3, 4, 5)
    np.testing.assert_allclose(read.samples.inputs["x"][:, 0, 0, 0], [0, 0.2, 1], atol=1e-6)
    assert read.preprocess == Preprocess(resize=(4, 5))


def test_a_declared_preprocessing_is_used_and_reported(tmp_path) -> None:
    declared = Preprocess(scale=1.0, mean=(1.0,))
    read = read_samples(parquet(tmp_path / "t.parquet", i=binary([image(7)])), PICTURES, preprocess=declared)
    assert (read.samples.inputs["x"] == 6).all()
    assert read.preprocess == Preprocess(scale=1.0, mean=(1.0,), resize=(4, 5))


def test_preprocessing_without_images_is_an_error(tmp_path) -> None:
    path = parquet(tmp_path / "t.parquet", a=np.arange(3.0), b=np.arange(3.0))
    with pytest.raises(BadInput, match="no column that feeds the model holds images"):
        read_samples(path, FEATURES, preprocess=Preprocess())


def test_an_unreadable_image_is_named_by_its_row(tmp_path) -> None:
    path = parquet(tmp_path / "t.parquet", picture=binary([image(1), b"garbage"]))
    with pytest.raises(BadInput, match="row 1 of column 'picture'"):
        read_samples(path, PICTURES)


def test_images_of_two_sizes_without_a_resize_are_named_by_row(tmp_path) -> None:
    path = parquet(tmp_path / "t.parquet", picture=binary([image(1), image(1, size=(6, 6))]))
    with pytest.raises(BadInput, match=r"row 1 .*resize"):
        read_samples(path, model(x=("float32", ("n", 3, "h", "w"))))


def test_a_missing_value_is_named_by_its_row(tmp_path) -> None:
    column = arro3.core.Array([1.0, 2.0, None], type=arro3.core.DataType.float64())
    path = parquet(tmp_path / "t.parquet", a=np.arange(3.0), b=column)
    with pytest.raises(BadInput, match="'b' has no value in row 2"):
        read_samples(path, FEATURES)


def test_a_column_that_is_not_needed_may_have_missing_values(tmp_path) -> None:
    holes = arro3.core.Array([1.0, 2.0, None], type=arro3.core.DataType.float64())
    path = parquet(tmp_path / "t.parquet", note=holes, x=lists(np.ones((3, 2), np.float32)))
    assert read_samples(path, FEATURES).unused == ("note",)


def test_lists_of_two_lengths_are_refused_with_both(tmp_path) -> None:
    flat = arro3.core.Array.from_numpy(np.arange(5.0))
    ragged = arro3.core.list_array(arro3.core.Array.from_numpy(np.array([0, 2, 5], np.int32)), flat)
    with pytest.raises(BadInput, match=r"2 and 3 \(row 1\)"):
        read_samples(parquet(tmp_path / "t.parquet", x=ragged), FEATURES)


def test_classes_written_as_words_become_indices_even_beyond_the_limit(tmp_path) -> None:
    path = parquet(tmp_path / "t.parquet", a=np.arange(6.0), b=np.arange(6.0), label=text(list("cbbcaa")))
    assert read_samples(path, FEATURES).samples.labels.tolist() == [2, 1, 1, 2, 0, 0]
    limited = read_samples(path, FEATURES, limit=2).samples
    assert limited.labels.tolist() == [2, 1]
    assert limited.classes == ("a", "b", "c")


@pytest.mark.parametrize("damage", [lambda data: b"nonsense", lambda data: data[:-20], lambda data: b""])
def test_a_damaged_parquet_file_is_one_clear_error(tmp_path, damage) -> None:
    path = parquet(tmp_path / "t.parquet", a=np.arange(3.0), b=np.arange(3.0))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(BadInput, match=r"t\.parquet"):
        read_samples(path, FEATURES)


def test_a_parquet_file_with_a_broken_footer_is_one_clear_error(tmp_path, capfd) -> None:
    path = parquet(tmp_path / "t.parquet", a=np.arange(3.0), b=np.arange(3.0))
    data = bytearray(path.read_bytes())
    footer = int.from_bytes(data[-8:-4], "little")
    data[-8 - footer : -8] = b"\xff" * footer
    path.write_bytes(data)
    with pytest.raises(BadInput, match="cannot be read"):
        read_samples(path, FEATURES)
    assert capfd.readouterr() == ("", "")


def test_rows_that_need_more_memory_than_allowed_say_so_and_a_limit_helps(tmp_path) -> None:
    path = parquet(tmp_path / "t.parquet", a=np.arange(1000.0), b=np.arange(1000.0))
    with pytest.raises(BadInput, match=r"MiB.*--limit"):
        read_samples(path, FEATURES, memory_bytes=5000)
    assert len(read_samples(path, FEATURES, memory_bytes=5000, limit=100).samples) == 100


def test_images_too_large_to_decode_together_are_refused_before_decoding(tmp_path) -> None:
    path = parquet(tmp_path / "t.parquet", image=binary([image(1)] * 20))
    with pytest.raises(BadInput, match=r"20 images.*--limit"):
        read_samples(path, model(x=("float32", ("n", 3, 100, 100))), memory_bytes=200_000)


# --- which column feeds which input


def test_columns_named_like_the_inputs_feed_them_and_the_rest_is_reported_unused(tmp_path) -> None:
    path = parquet(tmp_path / "t.parquet", id=np.arange(3), b=np.arange(3.0), a=np.ones(3), y=np.arange(3))
    read = read_samples(path, model(a=("float32", ("n",)), b=("float64", ("n", 1))))
    assert read.samples.inputs["b"].shape == (3, 1)
    assert (read.samples.inputs["a"] == 1).all()
    assert read.unused == ("id",)
    assert read.label == "y"


def test_an_assigned_column_wins_over_its_name(tmp_path) -> None:
    path = parquet(tmp_path / "t.parquet", a=np.zeros(3), b=np.ones(3))
    read = read_samples(path, model(a=("float32", ("n",)), z=("float32", ("n",))), inputs={"a": "b", "z": "a"})
    assert (read.samples.inputs["a"] == 1).all()
    assert (read.samples.inputs["z"] == 0).all()


def test_a_single_remaining_column_feeds_the_single_input_and_the_named_label_is_taken(tmp_path) -> None:
    path = parquet(tmp_path / "t.parquet", data=lists(np.ones((3, 2), np.float32)), score=np.array([0.5, 1.5, 2.0]))
    read = read_samples(path, FEATURES, label="score")
    assert read.samples.labels.tolist() == [0.5, 1.5, 2.0]
    assert read.samples.classes is None


@pytest.mark.parametrize(
    ("options", "nearest"),
    [({"label": "lable"}, "label"), ({"inputs": {"x": "aa"}}, "a"), ({"inputs": {"xx": "a"}}, "x")],
)
def test_an_unknown_name_offers_the_nearest(tmp_path, options, nearest) -> None:
    path = parquet(tmp_path / "t.parquet", a=np.arange(3.0), label=np.arange(3))
    with pytest.raises(UnknownName, match=f"'{nearest}'"):
        read_samples(path, model(x=("float32", ("n",))), **options)


def test_an_open_choice_between_columns_is_an_error_that_says_how_to_choose(tmp_path) -> None:
    path = parquet(tmp_path / "t.parquet", p=lists(np.zeros((2, 2), np.float32)), q=lists(np.zeros((2, 2), np.float32)))
    with pytest.raises(BadInput, match="--inputs x=COLUMN"):
        read_samples(path, FEATURES)


def test_too_many_columns_for_the_input_are_a_mismatch(tmp_path) -> None:
    path = parquet(tmp_path / "t.parquet", a=np.zeros(2), b=np.zeros(2), c=np.zeros(2))
    with pytest.raises(SignatureMismatch, match=r"\[3\].*\[2\]"):
        read_samples(path, FEATURES)


# --- dtypes


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        (np.array([1, 2], np.int64), "float32"),
        (np.array([1.5, 2], np.float64), "float16"),
        (np.array([1, 200], np.int64), "uint8"),
        (np.array([True, False]), "int32"),
        (np.array([1.0, np.inf]), "float16"),
    ],
)
def test_a_safe_cast_is_made(tmp_path, values, dtype) -> None:
    np.savez(tmp_path / "t.npz", x=values)
    read = read_samples(tmp_path / "t.npz", model(x=(dtype, ("n",))))
    assert read.samples.inputs["x"].dtype.name == dtype
    np.testing.assert_array_equal(read.samples.inputs["x"].astype(np.float64), values.astype(np.float64))


@pytest.mark.parametrize(
    ("values", "dtype", "word"),
    [
        (np.array([1.0, 2.0]), "int64", "float64"),
        (np.array([1, 300]), "uint8", "300"),
        (np.array([-1, 3]), "uint8", "-1"),
        (np.array([1e30, 3]), "float16", "too large"),
        (np.array(["a", "b"]), "float32", "strings"),
        (np.array([0, 1]), "bool", "int64"),
    ],
)
def test_an_unsafe_cast_is_refused(tmp_path, values, dtype, word) -> None:
    np.savez(tmp_path / "t.npz", x=values)
    with pytest.raises(SignatureMismatch, match=word):
        read_samples(tmp_path / "t.npz", model(x=(dtype, ("n",))))


# --- NPZ


def test_npz_arrays_go_by_name_and_labels_too(tmp_path) -> None:
    np.savez_compressed(tmp_path / "t.npz", x=np.arange(6.0).reshape(3, 2), labels=np.array([2, 0, 1]))
    read = read_samples(tmp_path / "t.npz", FEATURES, limit=2)
    assert read.samples.inputs["x"].tolist() == [[0, 1], [2, 3]]
    assert read.samples.labels.tolist() == [2, 0]


def test_an_array_in_fortran_order_is_read_right(tmp_path) -> None:
    array = np.asfortranarray(np.arange(12.0).reshape(6, 2))
    np.savez(tmp_path / "t.npz", x=array)
    read = read_samples(tmp_path / "t.npz", FEATURES, limit=4)
    np.testing.assert_array_equal(read.samples.inputs["x"], array[:4])


def test_labels_that_are_bytes_are_read_as_text(tmp_path) -> None:
    words = np.array([b"dog", b"ant", b"cat", b"dog"])
    np.savez(tmp_path / "t.npz", x=np.zeros((4, 2)), labels=words)
    samples = read_samples(tmp_path / "t.npz", FEATURES).samples
    assert samples.classes == ("ant", "cat", "dog")
    assert samples.labels.tolist() == [2, 0, 1, 2]
    np.savez(tmp_path / "t.npz", x=np.zeros((1, 2)), labels=np.array([b"\xff"]))
    with pytest.raises(BadInput, match="no UTF-8"):
        read_samples(tmp_path / "t.npz", FEATURES)


def test_columns_of_different_length_that_feed_one_input_are_refused(tmp_path) -> None:
    np.savez(tmp_path / "t.npz", a=np.zeros(5), b=np.zeros(4))
    with pytest.raises(BadInput, match=r"differ in length \(a: 5, b: 4\)"):
        read_samples(tmp_path / "t.npz", FEATURES)


def test_pixels_whose_channels_come_first_cannot_be_preprocessed(tmp_path) -> None:
    np.savez(tmp_path / "t.npz", x=np.zeros((2, 3, 32, 32), np.uint8))
    with pytest.raises(BadInput, match=r"\[3, 32, 32\]; preprocessing takes height, width and channels"):
        read_samples(tmp_path / "t.npz", PICTURES, preprocess=Preprocess())


def test_labels_of_another_length_are_refused_with_both_lengths(tmp_path) -> None:
    np.savez(tmp_path / "t.npz", x=np.zeros((5, 2)), labels=np.zeros(4, np.int64))
    with pytest.raises(BadInput, match=r"4 labels.*5 samples"):
        read_samples(tmp_path / "t.npz", FEATURES)


def test_pickled_objects_are_refused(tmp_path) -> None:
    np.savez(tmp_path / "t.npz", x=np.array([{}, []], dtype=object))
    with pytest.raises(BadInput, match="Python objects"):
        read_samples(tmp_path / "t.npz", FEATURES)


def test_an_array_that_claims_too_much_is_refused_before_memory_is_taken(tmp_path) -> None:
    np.savez(tmp_path / "t.npz", x=np.zeros((1000, 2)))
    with pytest.raises(BadInput, match=r"--limit"):
        read_samples(tmp_path / "t.npz", FEATURES, memory_bytes=10_000)


def test_a_truncated_npz_is_one_clear_error(tmp_path) -> None:
    path = tmp_path / "t.npz"
    np.savez(path, x=np.zeros((1000, 2)))
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(BadInput, match=r"t\.npz cannot be read"):
        read_samples(path, FEATURES)


def test_declared_preprocessing_applies_to_arrays_of_pixels(tmp_path) -> None:
    pixels = np.arange(2 * 4 * 5, dtype=np.uint8).reshape(2, 4, 5)
    np.savez(tmp_path / "t.npz", x=pixels)
    signature = model(x=("float32", ("n", 1, 4, 5)))
    read = read_samples(tmp_path / "t.npz", signature, preprocess=Preprocess(color="gray"))
    np.testing.assert_allclose(read.samples.inputs["x"][:, 0], pixels / 255, rtol=1e-6)
    np.testing.assert_array_equal(read_samples(tmp_path / "t.npz", signature).samples.inputs["x"][:, 0], pixels)


def crafted(
    path: Path, header: str, data: bytes = b"", *, claimed: int | None = None, method=zipfile.ZIP_STORED
) -> Path:
    """An archive of one array in version 2 of NumPy's format, with this header and whatever length it claims."""
    text = header.encode()
    length = (len(text) if claimed is None else claimed).to_bytes(4, "little")
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("x.npy", b"\x93NUMPY\x02\x00" + length + text + data)
    return path


def shaped(shape: str, descr: str = "'<f8'") -> str:
    return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n"


def test_a_crafted_array_within_bounds_is_read(tmp_path) -> None:
    path = crafted(tmp_path / "t.npz", shaped("(3, 2)"), np.arange(6.0).tobytes(), method=zipfile.ZIP_DEFLATED)
    assert read_samples(path, FEATURES).samples.inputs["x"].tolist() == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize(
    ("header", "word"),
    [
        (shaped("(-1, 2)"), "negative length"),
        (shaped("(3, -2)"), "negative length"),
        (shaped(f"({10**30}, 0)"), "hold nothing"),
        (shaped(f"({2**62}, 2)"), "--limit"),
        (shaped("(3, 2)", "('<f8', (1000000,))"), "structures"),
        (shaped("(3, 2"), "damaged header"),
        (shaped("(3, [2])"), "damaged header"),
        ("{[]: 1}", "damaged header"),
        ("-" * 9_000 + "1", "damaged header"),
        ("(" * 9_000, "damaged header"),
    ],
)
def test_a_header_that_lies_is_refused_before_its_array_is_read(tmp_path, header, word) -> None:
    path = crafted(tmp_path / "t.npz", header, bytes(2**24), method=zipfile.ZIP_DEFLATED)
    tracemalloc.start()
    try:
        with pytest.raises(BadInput, match=word) as caught:
            read_samples(path, FEATURES, memory_bytes=2**30)
        assert tracemalloc.get_traced_memory()[1] < 2**23  # the parser itself takes some
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value)


def test_a_header_of_four_gibibytes_is_refused_unread(tmp_path) -> None:
    path = crafted(tmp_path / "t.npz", shaped("(3, 2)"), bytes(2**24), claimed=2**32 - 1, method=zipfile.ZIP_DEFLATED)
    tracemalloc.start()
    try:
        with pytest.raises(BadInput, match=r"claims a header of 4,294,967,295 bytes"):
            read_samples(path, FEATURES)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("method", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_a_compression_that_numpy_does_not_write_is_refused(tmp_path, method) -> None:
    path = crafted(tmp_path / "t.npz", shaped("(3, 2)"), np.arange(6.0).tobytes(), method=method)
    with pytest.raises(BadInput, match=rf"compressed by method {method}.*savez_compressed"):
        read_samples(path, FEATURES)


@pytest.mark.parametrize(("offset", "value", "word"), [(0, 1, "encrypted"), (2, 99, "method 99"), (0, 0x20, "patched")])
def test_a_zip_feature_that_cannot_be_read_is_one_clear_error(tmp_path, offset, value, word) -> None:
    path = crafted(tmp_path / "t.npz", shaped("(3, 2)"), np.arange(6.0).tobytes())
    data = bytearray(path.read_bytes())
    for start, field in ((data.index(b"PK\x03\x04"), 6), (data.index(b"PK\x01\x02"), 8)):
        data[start + field + offset] = value
    path.write_bytes(data)
    with pytest.raises(BadInput, match=word):
        read_samples(path, FEATURES)


def test_two_arrays_of_one_name_are_refused(tmp_path) -> None:
    path = crafted(tmp_path / "t.npz", shaped("(3, 2)"), np.arange(6.0).tobytes())
    with zipfile.ZipFile(path) as archive:
        data = archive.read("x.npy")
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(path, "a") as archive:
        archive.writestr("x.npy", data)
    with pytest.raises(BadInput, match=r"two arrays called 'x\.npy'"):
        read_samples(path, FEATURES)


# --- CSV


def test_a_csv_feeds_features_and_the_label_by_name(tmp_path) -> None:
    (tmp_path / "t.csv").write_text("a,target,b\n1,yes,2.5\n3,no,4\n")
    read = read_samples(tmp_path / "t.csv", FEATURES)
    assert read.samples.inputs["x"].tolist() == [[1, 2.5], [3, 4]]
    assert read.samples.labels.tolist() == [1, 0]
    assert read.samples.classes == ("no", "yes")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_csv_without_a_header_keeps_its_first_row(tmp_path, encoding) -> None:
    (tmp_path / "t.csv").write_text("1,2\n3,4\n", encoding=encoding)
    assert read_samples(tmp_path / "t.csv", FEATURES).samples.inputs["x"].tolist() == [[1, 2], [3, 4]]


def test_a_column_of_texts_is_no_column_of_classes(tmp_path, monkeypatch) -> None:
    """Neither many different ones nor a long one are collected, and a limit ends the reading."""
    monkeypatch.setattr(arrow, "MOST_WORDS", 3)
    one = model(a=("float32", ("n",)))
    (tmp_path / "t.csv").write_text("a,target,remark\n" + "".join(f"{n},yes,remark {n}\n" for n in range(9)))
    read = read_samples(tmp_path / "t.csv", one, limit=2)
    assert (read.samples.classes, read.unused, len(read.samples)) == (("yes",), ("remark",), 2)
    (tmp_path / "t.csv").write_text(f"a,target,remark\n1,yes,{'x' * 2000}\n3,no,y\n")
    assert read_samples(tmp_path / "t.csv", one).samples.classes == ("no", "yes")


@pytest.mark.parametrize("kind", ["plain", "dictionary"])
def test_a_long_text_beside_short_ones_takes_no_memory_and_is_told_where_it_is_wanted(kind, tmp_path) -> None:
    """All texts of an array are as wide as the longest."""
    texts = arro3.core.Array(["short"] * 255 + ["x" * 200_000], arro3.core.DataType.string())
    if kind == "dictionary":
        texts = texts.cast(arro3.core.DataType.dictionary(arro3.core.DataType.int32(), arro3.core.DataType.string()))
    table = arro3.core.Table({"a": arro3.core.Array(np.arange(256, dtype=np.float32)), "remark": texts})
    arro3.io.write_parquet(table, tmp_path / "t.parquet")
    one = model(a=("float32", ("n",)))
    tracemalloc.start()
    assert read_samples(tmp_path / "t.parquet", one).unused == ("remark",)
    assert tracemalloc.get_traced_memory()[1] < 32 * 2**20
    tracemalloc.stop()
    with pytest.raises(BadInput, match=r"256 texts, all as wide as the longest, take 195\.3 MiB; leave it out"):
        read_samples(tmp_path / "t.parquet", one, label="remark")


def test_a_column_of_text_in_one_file_and_numbers_in_another_is_refused(tmp_path) -> None:
    """Joined, numbers would be words that no class has."""
    for name, labels, kind in (("a", [0, 1], "int64"), ("b", ["2", "3"], "string")):
        columns = {"a": arro3.core.Array(np.arange(2, dtype=np.float32))}
        columns["label"] = arro3.core.Array(labels, getattr(arro3.core.DataType, kind)())
        arro3.io.write_parquet(arro3.core.Table(columns), tmp_path / f"{name}.parquet")
    with pytest.raises(BadInput, match="'label': it holds text in some files and numbers in others"):
        read_samples(tmp_path, model(a=("float32", ("n",))))


def test_a_column_of_lists_that_hold_nothing_does_not_stop_the_others(tmp_path) -> None:
    none = arro3.core.Array(np.zeros(0, np.int64))
    lists = arro3.core.list_array(np.zeros(1, np.int32), none)
    columns = {
        "a": arro3.core.Array(np.arange(3, dtype=np.float32)),
        "e": arro3.core.list_array(np.zeros(4, np.int32), lists),
    }
    arro3.io.write_parquet(arro3.core.Table(columns), tmp_path / "t.parquet")
    assert read_samples(tmp_path / "t.parquet", model(a=("float32", ("n",)))).unused == ("e",)


@pytest.mark.parametrize(
    "values", [np.array([100_000, 1]), np.array([1e30, 1.0], ml_dtypes.bfloat16), np.array([1e5, 1.0])]
)
def test_a_number_that_the_models_float16_cannot_hold_is_refused(values) -> None:
    with pytest.raises(SignatureMismatch, match="too large for the model's float16"):
        cast(values, "float16", "it")
    assert cast(np.array([np.inf, 1.0]), "float16", "it").tolist() == [np.inf, 1.0]


def test_pixels_that_grow_are_refused_before_memory_is_taken(tmp_path) -> None:
    np.savez(tmp_path / "t.npz", image=np.zeros((100, 32, 32, 3), np.uint8))
    tracemalloc.start()
    with pytest.raises(BadInput, match=r"100 images of \[3, 256, 256\]"):
        read_samples(
            tmp_path / "t.npz",
            model(image=("float32", ("n", 3, 256, 256))),
            preprocess=Preprocess(resize=(256, 256)),
            memory_bytes=2**20,
        )
    assert tracemalloc.get_traced_memory()[1] < 16 * 2**20
    tracemalloc.stop()


def test_texts_that_fit_batch_by_batch_and_not_together_are_left_out(tmp_path) -> None:
    one = model(a=("float32", ("n",)))
    long = "x" * 1000
    (tmp_path / "t.csv").write_text("a,remark\n" + "".join(f"{n},{long if n == 0 else n}\n" for n in range(2000)))
    with pytest.raises(BadInput, match="2000 texts, all as wide as the longest, take 7"):
        read_samples(tmp_path / "t.csv", one, label="remark", memory_bytes=4 * 2**20)
    assert len(read_samples(tmp_path / "t.csv", one, memory_bytes=4 * 2**20).samples) == 2000


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("a,b\n1,\n", "row 0"),
        ("a,b\n1,2\n3\n", "cannot be read"),
        ("a,a\n1,2\n", "two columns called 'a'"),
        ("a,b\n", "no rows"),
        ("", "empty"),
    ],
)
def test_a_broken_csv_is_one_clear_error(tmp_path, text, word) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(BadInput, match=word):
        read_samples(tmp_path / "t.csv", FEATURES)


# --- a folder of images by class


def folder_of_images(root: Path) -> Path:
    for name, count in (("cat", 3), ("ant", 5)):
        (root / name).mkdir(parents=True)
        for i in range(count):
            (root / name / f"{i}.png").write_bytes(image(10 * len(name) + i))
    return root


def test_class_folders_are_labels_in_sorted_order(tmp_path) -> None:
    read = read_samples(folder_of_images(tmp_path), PICTURES)
    assert read.samples.classes == ("ant", "cat")
    assert read.samples.labels.tolist() == [0] * 5 + [1] * 3
    assert read.samples.inputs["x"].shape == (8, 3, 4, 5)


def test_a_limit_takes_equal_shares_of_the_classes(tmp_path) -> None:
    assert read_samples(folder_of_images(tmp_path), PICTURES, limit=4).samples.labels.tolist() == [0, 0, 1, 1]


def test_an_empty_class_folder_is_named(tmp_path) -> None:
    (folder_of_images(tmp_path) / "dog").mkdir()
    with pytest.raises(BadInput, match="dog"):
        read_samples(tmp_path, PICTURES)


def test_images_without_class_folders_have_no_labels(tmp_path) -> None:
    (tmp_path / "a.png").write_bytes(image(1))
    assert read_samples(tmp_path, PICTURES).samples.labels is None


# --- Hugging Face datasets on disk


def test_a_dataset_folder_gives_images_and_its_class_names(tmp_path) -> None:
    pictures = arro3.core.struct_array(
        [binary([image(0), image(255)]), text(["a.png", "b.png"])],
        fields=[
            arro3.core.Field("bytes", arro3.core.DataType.binary()),
            arro3.core.Field("path", arro3.core.DataType.string()),
        ],
    )
    folder = dataset(
        tmp_path / "d",
        {"img": {"_type": "Image"}, "kind": {"names": ["off", "on"], "_type": "ClassLabel"}},
        img=pictures,
        kind=np.array([0, 1]),
    )
    read = read_samples(folder, PICTURES)
    assert read.samples.inputs["x"][:, 0, 0, 0].tolist() == [0, 1]
    assert read.samples.labels.tolist() == [0, 1]
    assert read.samples.classes == ("off", "on")


def test_a_class_that_there_is_not_is_named_with_its_row(tmp_path) -> None:
    folder = dataset(
        tmp_path / "d",
        {"kind": {"names": [f"c{i}" for i in range(10)], "_type": "ClassLabel"}},
        x=lists(np.zeros((3, 2), np.float32)),
        kind=np.array([3, -1, 0]),
    )
    with pytest.raises(BadInput, match=r"'kind' has the value -1 in row 1, but its classes are 0 to 9"):
        read_samples(folder, FEATURES)


UNUSABLE = {
    "no value": text([None, None, None]),
    "not a number": np.array([1.0, np.nan, 0.0]),
}


@pytest.mark.parametrize("kind", UNUSABLE)
@pytest.mark.parametrize("names", [("label", None), ("y", None), ("truth", "truth")])
def test_labels_that_cannot_be_used_stop_only_who_needs_them(tmp_path, kind, names) -> None:
    column, label = names
    path = parquet(tmp_path / "d.parquet", a=np.arange(3.0), z=np.arange(3.0), **{column: UNUSABLE[kind]})
    with pytest.raises(BadInput, match=r"has no value in row 0|labels of 1 of 3 samples"):
        read_samples(path, FEATURES, label=label)
    unread = read_samples(path, FEATURES, label=label, labels="unread")
    assert (unread.label, unread.unlabelled, unread.samples.labels) == (column, None, None)
    assert unread.columns == {"x": ("a", "z")}
    optional = read_samples(path, FEATURES, label=label, labels="optional")
    assert optional.samples.labels is None
    assert any(word in str(optional.unlabelled) for word in ("has no value in row 0", "labels of 1 of 3 samples"))


def test_optional_labels_that_can_be_used_are_there(tmp_path) -> None:
    path = parquet(tmp_path / "d.parquet", a=np.arange(3.0), z=np.arange(3.0), label=text(["b", "a", "b"]))
    read = read_samples(path, FEATURES, labels="optional")
    assert (read.samples.labels.tolist(), read.samples.classes, read.unlabelled) == ([1, 0, 1], ("a", "b"), None)


def test_a_dictionary_of_splits_needs_the_name_of_one(tmp_path) -> None:
    for split, value in (("train", 0.0), ("test", 1.0)):
        dataset(tmp_path / "d" / split, {}, a=np.full(3, value), b=np.full(3, value))
    (tmp_path / "d" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(BadInput, match=r"train, test.*d#test"):
        read_samples(tmp_path / "d", FEATURES)
    assert (read_samples(f"{tmp_path / 'd'}#test", FEATURES).samples.inputs["x"] == 1).all()
    with pytest.raises(UnknownName, match="'train'"):
        read_samples(f"{tmp_path / 'd'}#trian", FEATURES)


def test_a_dataset_that_points_outside_its_folder_is_refused(tmp_path) -> None:
    folder = dataset(tmp_path / "d", {}, a=np.zeros(3))
    (folder / "state.json").write_text('{"_data_files": [{"filename": "../secret.arrow"}]}')
    with pytest.raises(BadInput, match="outside"):
        read_samples(folder, FEATURES)


# --- a Python function


@pytest.mark.parametrize(
    ("body", "labels"),
    [
        ("return np.ones((3, 2)), [0, 1, 2]", [0, 1, 2]),
        ("return {'x': np.ones((3, 2)), 'y': [2, 1, 0]}", [2, 1, 0]),
        ("return Samples({'x': np.ones((3, 2), np.float32)})", None),
    ],
)
def test_a_function_gives_samples_in_any_of_three_forms(tmp_path, body, labels) -> None:
    path = tmp_path / "mine.py"
    path.write_text(f"import numpy as np\nfrom hasten.samples import Samples\n\ndef load():\n    {body}\n")
    samples = read_samples(f"{path}:load", FEATURES, limit=3).samples
    assert (samples.inputs["x"] == 1).all()
    assert (None if samples.labels is None else samples.labels.tolist()) == labels


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("laod", "has no function 'laod'.*fails"),
        ("fails", "ZeroDivisionError"),
        ("wrong", "gave a int"),
        ("ragged", "cannot be made an array"),
    ],
)
def test_a_function_that_cannot_be_used_is_one_clear_error(tmp_path, name, word) -> None:
    path = tmp_path / "mine.py"
    bodies = {"fails": "1 / 0", "wrong": "3", "ragged": "{'x': [[1, 2], [3]]}"}
    path.write_text("\n".join(f"def {each}():\n    return {body}\n" for each, body in bodies.items()))
    with pytest.raises(BadInput, match=word):
        read_samples(f"{path}:{name}", FEATURES)


# --- what is no samples at all


def test_samples_of_a_function_with_labels_that_are_texts_say_what_to_give(tmp_path) -> None:
    (tmp_path / "data.py").write_text(
        "import numpy as np\nfrom hasten import Samples\n\n"
        "def f():\n    return Samples({'x': np.zeros((2, 2), np.float32)}, np.array(['a', 'b']))\n"
    )
    with pytest.raises(BadInput, match=r"give the index of each sample's class"):
        read_samples(f"{tmp_path / 'data.py'}:f", FEATURES)


def test_a_folder_of_saved_samples_is_taken_as_it_is(tmp_path) -> None:
    Samples({"x": np.ones((4, 2), np.float32)}).save(tmp_path)
    assert len(read_samples(tmp_path, FEATURES, limit=3).samples) == 3


@pytest.mark.parametrize("name", ["nothing.parquet", "here.txt", "empty"])
def test_what_cannot_be_read_is_one_clear_error(tmp_path, name) -> None:
    (tmp_path / "here.txt").write_text("hello")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match=name):
        read_samples(tmp_path / name, FEATURES)
