"""Columns from Arrow: Parquet files, CSV files, and Hugging Face ``datasets`` folders on disk."""

from __future__ import annotations

import contextlib
import csv
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from arro3.core import (
    DataType,
    RecordBatch,
    dictionary_dictionary,
    dictionary_indices,
    list_flatten,
    list_offsets,
    struct_field,
)
from arro3.io import infer_csv_schema, read_csv, read_ipc_stream, read_parquet

from hasten.artifact import Json
from hasten.errors import BadInput, UnknownName
from hasten.samples.columns import MAX_IMAGE_BYTES, Column, Columns, Images, Room, Unusable, in_mib, is_array
from hasten.tensors import Array

BATCH_ROWS = 256
"""Rows decoded at a time: memory is looked at between two batches."""

MOST_WORDS, LONGEST_WORD = 1 << 16, 1 << 10
"""Different strings of a column, and letters of each, beyond which it has texts and no classes."""

MAX_TEXT_BYTES = 64 * 2**20
"""Of the texts of one batch of rows in memory."""

PARQUET_MAGIC = b"PAR1"


def read_parquet_files(paths: Iterable[Path], room: Room) -> Columns:
    """Read Parquet files of one schema, one after the other.

    Raises:
        BadInput: a file is damaged, holds a type that is no tensor, or the rows need more memory than allowed.
    """
    return _read(paths, _open_parquet, room)


def read_csv_file(path: Path, room: Room) -> Columns:
    """Read a CSV file. A first line of nothing but numbers is a row, and the columns are then ``column_1``, ....

    Raises:
        BadInput: it is empty, has two columns of one name, a value is missing or lines differ in length.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            first = next(csv.reader(file), [])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BadInput(f"{path} cannot be read as CSV: {error}") from error
    if not first:
        raise BadInput(f"{path} is empty")
    header = not all(_is_number(field) for field in first)
    if header and (repeated := [name for name in first if first.count(name) > 1]):
        raise BadInput(f"{path} has two columns called {repeated[0]!r}")

    def open_csv(file: Path) -> Any:
        return read_csv(file, infer_csv_schema(file, has_header=header), has_header=header, batch_size=BATCH_ROWS)

    return _read([path], open_csv, room)


def read_dataset_folder(folder: Path, split: str | None, room: Room) -> Columns:
    """Read what ``datasets.save_to_disk`` wrote. A dictionary of several splits needs the name of one.

    Raises:
        BadInput: the folder holds none, it is damaged, or one of several splits must be named.
        UnknownName: it has no split of that name.
    """
    folder = _split_folder(folder, split)
    state, info = _json(folder / "state.json"), _json(folder / "dataset_info.json")
    if state.get("_indices_data_files"):
        raise BadInput(f"{folder} keeps a selection of rows apart; save it again after dataset.flatten_indices()")
    names = [str(item["filename"]) for item in state.get("_data_files", [])]
    if not names or any(Path(name).name != name for name in names):
        raise BadInput(f"{folder / 'state.json'} names no data files, or some outside its folder")
    read = _read([folder / name for name in names], read_ipc_stream, room)
    features = info.get("features") or {}
    classes = {
        name: tuple(str(item) for item in feature["names"])
        for name, feature in features.items()
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and feature.get("names")
    }
    if len(classes) != 1:
        return read
    label, names_of_classes = next(iter(classes.items()))
    return Columns(by_name=read.by_name, label=label, classes=names_of_classes, vocabularies=read.vocabularies)


def _split_folder(folder: Path, split: str | None) -> Path:
    if not (folder / "dataset_dict.json").exists():
        if split is not None:
            raise BadInput(f"{folder} is one dataset without splits; leave out '#{split}'")
        return folder
    splits = [str(name) for name in _json(folder / "dataset_dict.json").get("splits", [])]
    if split is None and len(splits) != 1:
        example = f"{folder.name}#{splits[-1] if splits else 'test'}"
        raise BadInput(f"{folder} holds the splits {', '.join(splits) or 'none'}; name one: {example}")
    chosen = split or splits[0]
    if chosen not in splits:
        raise UnknownName("split", chosen, splits)
    return folder / chosen


def _json(path: Path) -> dict[str, Json]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Json])
    except (OSError, msgspec.DecodeError) as error:
        raise BadInput(f"{path} cannot be read: {error}") from error


def _open_parquet(path: Path) -> Any:
    """Check what would make the reader give up in a way of its own, then open it."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(4)
        file.seek(max(0, size - 8))
        tail = file.read(8)
    if size < 12 or head != PARQUET_MAGIC or tail[4:] != PARQUET_MAGIC:
        raise BadInput(f"{path} is no Parquet file, or it is cut off")
    if int.from_bytes(tail[:4], "little") > size - 12:
        raise BadInput(f"{path} is damaged: its footer is longer than the file")
    with quiet_panics():
        return read_parquet(path, batch_size=BATCH_ROWS)


@contextlib.contextmanager
def quiet_panics() -> Iterator[None]:
    """Keep off the terminal what the reader's runtime prints, a stack trace, before it raises a PanicException.

    It writes to the process's error stream itself, so that stream points elsewhere for this moment, in every thread.
    """
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _read(paths: Iterable[Path], open_file: Callable[[Path], Any], room: Room) -> Columns:
    pieces: dict[str, list[Column]] = {}
    words: dict[str, set[str]] = {}
    free: set[str] = set()
    rows = used = 0
    for path in paths:
        for batch in _batches(path, open_file):
            if pieces and batch.schema.names != list(pieces):
                raise BadInput(f"{path} has the columns {batch.schema.names}, the files before it {list(pieces)}")
            take = batch.num_rows if room.limit is None else min(batch.num_rows, room.limit - rows)
            kept = batch.slice(0, take) if take < batch.num_rows else batch
            for name in batch.schema.names:
                column = _column(kept, name, rows) if take else None
                if column is not None:
                    pieces.setdefault(name, []).append(column)
                    used += _bytes(column)
                if name not in free and _is_text(batch.field(name).type):
                    found = words.setdefault(name, set())
                    found.update(_words(batch.column(name)))
                    if len(found) > MOST_WORDS or max(map(len, found), default=0) > LONGEST_WORD:
                        free.add(name)
                        del words[name]
            rows += take
            room.check(used, path.name, at_row=rows)
            if rows == room.limit and not words:  # the classes of a column of strings need the rest, too
                break
    if not rows:
        raise BadInput(f"{', '.join(path.name for path in paths)}: there are no rows")
    joined = {name: _join(name, parts, room.memory_bytes - used) for name, parts in pieces.items()}
    return Columns(by_name=joined, vocabularies={name: tuple(sorted(found)) for name, found in words.items()})


def _batches(path: Path, open_file: Callable[[Path], Any]) -> Iterator[RecordBatch]:
    with _reading(path):
        reader = iter(open_file(path))
    while True:
        with _reading(path):
            batch = next(reader, None)
        if batch is None:
            return
        yield batch


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn whatever the Arrow reader raises into one line."""
    try:
        yield
    except (BadInput, KeyboardInterrupt):
        raise
    except BaseException as error:  # a damaged file can end in a PanicException, which is no Exception
        if not (isinstance(error, Exception) or type(error).__name__ == "PanicException"):
            raise
        raise BadInput(f"{path} cannot be read: {' '.join(str(error).split())[:300]}") from error


def _column(batch: RecordBatch, name: str, first_row: int) -> Column:
    """Give one column of a batch; ``Unusable`` where a value is missing, lists differ in length, or no type fits."""
    try:
        return _usable(batch.column(name), name, first_row)
    except BadInput as error:
        return Unusable(str(error))


def _usable(column: Any, name: str, first_row: int) -> Column:
    if _is_binary(column.type):
        return _images(column, name, first_row)
    if DataType.is_struct(column.type):
        fields = [field.name for field in column.type.fields]
        if "bytes" not in fields:
            raise BadInput(f"column {name!r} holds structures of {fields}; hasten reads numbers, arrays and images")
        return _images(struct_field(column, [fields.index("bytes")]), name, first_row)
    return _values(column, name, first_row)


def _values(column: Any, name: str, first_row: int | None) -> Array:
    """Give numbers, strings or nested lists of them as an array; ``first_row`` is None inside a list."""
    kind = column.type
    _check_whole(column, name, first_row)
    if DataType.is_dictionary(kind):
        words, places = _values(dictionary_dictionary(column), name, None), dictionary_indices(column).to_numpy()
        if words.dtype.kind == "U":
            _check_texts(len(places), words.itemsize, name)
        return np.asarray(words[places])
    if _is_text(kind):
        return _text(column, name)
    if DataType.is_fixed_size_list(kind):
        flat = _values(list_flatten(column), name, None)
        return flat.reshape(len(column), kind.list_size, *flat.shape[1:])
    if DataType.is_list(kind) or DataType.is_large_list(kind):
        lengths = np.diff(list_offsets(column).to_numpy())
        if not len(lengths):
            raise BadInput(f"column {name!r}: its lists hold nothing; a tensor needs one length")
        if len(odd := np.flatnonzero(lengths != lengths[0])):
            where = "" if first_row is None else f" (row {first_row + int(odd[0])})"
            raise BadInput(
                f"column {name!r}: its lists differ in length: {lengths[0]} and {lengths[odd[0]]}{where}; "
                "a tensor needs one length"
            )
        flat = _values(list_flatten(column), name, None)
        return flat.reshape(len(column), int(lengths[0]), *flat.shape[1:])
    if DataType.is_integer(kind) or DataType.is_floating(kind) or DataType.is_boolean(kind):
        return np.asarray(column.to_numpy())
    if DataType.is_null(kind):
        raise BadInput(f"column {name!r} is empty: it has no value in row {first_row}")
    raise BadInput(f"column {name!r} has the type {_type_name(kind)}; hasten reads numbers, arrays, strings and images")


def _images(column: Any, name: str, first_row: int) -> Images:
    _check_whole(column, name, first_row)
    items = [bytes(item) for item in column.to_numpy()]
    for row, item in enumerate(items):
        if len(item) > MAX_IMAGE_BYTES:
            raise BadInput(f"row {first_row + row} of column {name!r} has {in_mib(len(item))}: too much for one image")
    return Images(items)


def _check_whole(column: Any, name: str, first_row: int | None) -> None:
    if column.null_count:
        missing = next(row for row, value in enumerate(column.to_pylist()) if value is None)
        where = "inside a list" if first_row is None else f"in row {first_row + missing}"
        raise BadInput(f"column {name!r} has no value {where}; fill it in, or leave that row out")


def _join(name: str, parts: list[Column], free_bytes: int = MAX_TEXT_BYTES) -> Column:
    """Join the pieces of a column; ``free_bytes`` is what texts, of which each is as wide as the longest, may take."""
    if unusable := [part for part in parts if isinstance(part, Unusable)]:
        return unusable[0]
    images = [part for part in parts if isinstance(part, Images)]
    if images:
        return Images([item for part in images for item in part.items])
    arrays = [part for part in parts if is_array(part)]
    if len({array.dtype.kind in "US" for array in arrays}) > 1:
        return Unusable(f"column {name!r}: it holds text in some files and numbers in others; give it one type")
    if len({array.shape[1:] for array in arrays}) > 1:
        shapes = sorted({str(list(array.shape[1:])) for array in arrays})
        return Unusable(f"column {name!r}: its arrays differ in shape ({', '.join(shapes)}); a tensor needs one")
    if arrays[0].dtype.kind == "U" and len(arrays) > 1:
        try:
            _check_texts(sum(map(len, arrays)), max(array.itemsize for array in arrays), name, free_bytes)
        except BadInput as error:
            return Unusable(str(error))
    return np.concatenate(arrays) if len(arrays) > 1 else arrays[0]


def _bytes(column: Column) -> int:
    if isinstance(column, Images):
        return sum(len(item) for item in column.items if isinstance(item, bytes))
    return column.nbytes if is_array(column) else 0


def _text(column: Any, name: str) -> Array:
    """Give strings as a fixed-width array: NumPy objects could not be hashed, stored or sent."""
    values = [value for value in column.to_pylist() if value is not None]
    _check_texts(len(values), max(map(len, values), default=0) * np.dtype("U1").itemsize, name)
    return np.asarray(values, dtype=np.str_)


def _check_texts(count: int, width: int, name: str, free_bytes: int = MAX_TEXT_BYTES) -> None:
    """Check that so many texts, each of them ``width`` bytes in memory as the longest is, are not too much."""
    if count * width > free_bytes:
        raise BadInput(
            f"column {name!r}: {count} texts, all as wide as the longest, take {in_mib(count * width)}; leave it out"
        )


def _words(column: Any) -> set[str]:
    """Give the strings that a column has, each once."""
    if DataType.is_dictionary(column.type):
        return _words(dictionary_dictionary(column))
    return {value for value in column.to_pylist() if value is not None}


def _is_text(kind: DataType) -> bool:
    if DataType.is_dictionary(kind):
        return bool(kind.value_type is not None and _is_text(kind.value_type))
    return any(test(kind) for test in (DataType.is_string, DataType.is_large_string, DataType.is_string_view))


def _is_binary(kind: DataType) -> bool:
    return any(test(kind) for test in (DataType.is_binary, DataType.is_large_binary, DataType.is_binary_view))


def _type_name(kind: DataType) -> str:
    return repr(kind).partition("<")[2].strip().rstrip(">") or repr(kind)


def _is_number(field: str) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return True


def parquet_pieces(path: Path, rows: int) -> Iterator[Columns]:
    """Read a Parquet file piece by piece, ``rows`` rows each and the last one fewer; one piece is in memory at a time.

    Raises:
        BadInput: as ``read_parquet_files``, when the piece is read.
    """
    held: list[RecordBatch] = []
    first_row = waiting = 0
    for batch in _batches(path, _open_parquet):
        held.append(batch)
        waiting += batch.num_rows
        while waiting >= rows:
            taken, held = _take(held, rows)
            yield _piece(taken, first_row)
            first_row, waiting = first_row + rows, waiting - rows
    if waiting:
        yield _piece(held, first_row)


def _take(held: list[RecordBatch], rows: int) -> tuple[list[RecordBatch], list[RecordBatch]]:
    """Part batches after ``rows`` rows."""
    taken: list[RecordBatch] = []
    for at, batch in enumerate(held):
        if batch.num_rows >= rows:
            rest = [] if batch.num_rows == rows else [batch.slice(rows, batch.num_rows - rows)]
            return [*taken, batch.slice(0, rows)], [*rest, *held[at + 1 :]]
        taken.append(batch)
        rows -= batch.num_rows
    return taken, []


def _piece(batches: list[RecordBatch], first_row: int) -> Columns:
    pieces: dict[str, list[Column]] = {}
    for batch in batches:
        for name in batch.schema.names:
            pieces.setdefault(name, []).append(_column(batch, name, first_row))
        first_row += batch.num_rows
    return Columns(by_name={name: _join(name, parts) for name, parts in pieces.items()})
