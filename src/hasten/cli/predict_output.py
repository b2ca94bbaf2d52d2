"""What ``hasten predict`` writes: pieces as .npz files, and of them the whole output as .parquet or .npz."""

from __future__ import annotations

import contextlib
import io
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from arro3.core import Array as ArrowArray
from arro3.core import DataType, RecordBatch, RecordBatchReader, fixed_size_list_array
from arro3.io import write_parquet

from hasten.errors import BadInput, StoreError
from hasten.samples.arrow import quiet_panics
from hasten.store import write_atomically, writing
from hasten.tensors import Array

Part = dict[str, Array]
"""The outputs of a piece by name, each [rows, ...]."""

LABEL = "label"
"""The column of class names, where the deployment has them and no output is called so."""

ROW_GROUP_ROWS = 65536


def write_part(path: Path, part: Part) -> None:
    """Write a piece, whole or not at all. Raises StoreError."""
    held = io.BytesIO()
    plain: dict[str, Any] = {f"output_{at}": _plain(array) for at, array in enumerate(part.values())}
    np.savez(held, names=np.array(list(part), np.str_), **plain)
    write_atomically(path, held.getvalue())


def read_part(path: Path) -> Part:
    """Read a piece. Raises StoreError: it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as held:
            return {str(name): held[f"output_{at}"] for at, name in enumerate(held["names"])}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise StoreError(f"{path} is damaged ({error}); remove it, and run the same command again") from error


def check_alike(part: Part, like: Part) -> None:
    """Check that outputs have rows, of the shape of another piece's.

    Raises:
        BadInput: one has none, or of another shape.
    """
    for name, array in part.items():
        if not array.ndim:
            raise BadInput(f"output {name!r} is a lone number; a file of columns needs one for each row")
        if array.shape[1:] != like[name].shape[1:]:
            raise BadInput(
                f"output {name!r} differs in shape between rows ({list(like[name].shape[1:])} and "
                f"{list(array.shape[1:])}); a file of columns needs one shape"
            )


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Give a place beside ``path`` to write to; it becomes ``path`` when the block ends well, and else goes."""
    fresh = path.with_name(f".{path.name}.fresh")
    try:
        yield fresh
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)


def write_npz_whole(path: Path, parts: Sequence[Path], classes: Sequence[str] | None) -> None:
    """Join pieces into one .npz, one piece in memory at a time. Raises StoreError."""
    rows, dtypes = 0, dict[str, np.dtype[Any]]()
    like = _columns(read_part(parts[0]), classes)
    for each in parts:  # a header stands before its rows, and has their number and the width of texts
        part = _columns(read_part(each), classes)
        check_alike(part, like)
        rows += len(next(iter(part.values())))
        dtypes = {name: np.result_type(array.dtype, dtypes.get(name, array.dtype)) for name, array in part.items()}
    with writing(path), whole(path) as fresh, zipfile.ZipFile(fresh, "w", allowZip64=True) as archive:
        for name, first in like.items():
            descr = np.lib.format.dtype_to_descr(dtypes[name])
            header = {"descr": descr, "fortran_order": False, "shape": (rows, *first.shape[1:])}
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array_header_2_0(file, header)
                for each in parts:
                    array = _columns(read_part(each), classes)[name]
                    file.write(np.ascontiguousarray(array, dtypes[name]).tobytes())


def write_parquet_whole(path: Path, parts: Sequence[Path], classes: Sequence[str] | None) -> None:
    """Join pieces into one Parquet file: a column for each output, arrays as lists of fixed size. Raises StoreError."""
    like = read_part(parts[0])
    for each in parts:
        check_alike(read_part(each), like)
    for name, array in like.items():
        if 0 in array.shape[1:]:
            raise BadInput(f"output {name!r} has rows of shape {list(array.shape[1:])}: no column; write it as .npz")
    schema = _batch(like, classes).schema

    def batches() -> Iterator[RecordBatch]:
        for each in parts:
            yield _batch(read_part(each), classes)

    with writing(path), whole(path) as fresh, quiet_panics():
        reader = RecordBatchReader.from_batches(schema, batches())
        try:
            write_parquet(reader, fresh, max_row_group_size=ROW_GROUP_ROWS)
        except BaseException as error:  # a full disk ends in a PanicException, which is no Exception
            if type(error).__name__ != "PanicException":
                raise
            raise StoreError(f"cannot write {path}: {_why(str(error))}; what is done is kept") from error


WRITERS: Mapping[str, Callable[[Path, Sequence[Path], Sequence[str] | None], None]] = {
    ".parquet": write_parquet_whole,
    ".npz": write_npz_whole,
}
"""What writes each kind of file, by its ending."""


def _why(text: str) -> str:
    """Say in few words what the writer's runtime says."""
    return "the disk is full" if "StorageFull" in text or "No space" in text else " ".join(text.split())[:300]


def _plain(array: Array) -> Array:
    """Give an array that NumPy's own file format knows."""
    if array.dtype == object:
        words = [item.decode(errors="replace") if isinstance(item, bytes) else str(item) for item in array.ravel()]
        return np.array(words, np.str_).reshape(array.shape)
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array


def _columns(part: Part, classes: Sequence[str] | None) -> Part:
    """Add the names of the classes, where the first output has a score for each: yes and no, or counts, are none."""
    scores = next(iter(part.values()))
    if not classes or LABEL in part or scores.shape[1:] != (len(classes),) or scores.dtype.kind != "f":
        return part
    return {**part, LABEL: np.array(classes, np.str_)[np.argmax(scores, axis=1)]}


def _batch(part: Part, classes: Sequence[str] | None) -> RecordBatch:
    return RecordBatch.from_pydict({name: _arrow(array) for name, array in _columns(part, classes).items()})


def _arrow(array: Array) -> ArrowArray:
    if array.dtype.kind == "U":
        flat = ArrowArray(array.ravel().tolist(), type=DataType.string())
    else:
        flat = ArrowArray.from_numpy(np.ascontiguousarray(array).ravel())
    for length in reversed(array.shape[1:]):
        flat = fixed_size_list_array(flat, length)
    return flat
