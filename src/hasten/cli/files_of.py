"""Rows for a deployment with steps: images as the files that they are, text as it stands, numbers as it takes them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hasten.cli.models import DataOptions
from hasten.errors import BadInput
from hasten.host import this_host
from hasten.samples import Samples
from hasten.samples.arrow import parquet_pieces
from hasten.samples.columns import Column, Columns, Images, Room, Unusable, is_array
from hasten.samples.fit import assign, cast, label_column, side_by_side
from hasten.samples.readers import open_columns
from hasten.serve.intake import content_bytes
from hasten.tensors import Array, Signature, TensorSpec

PIECE_ROWS = 1024
"""Rows that are kept together: of ``predict`` what an interruption costs at most, and what is in memory at once."""


@dataclass(frozen=True)
class Rows:
    """Tensors by name, each [n, ...]; files and text are objects of ``bytes``."""

    inputs: Mapping[str, Array]

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    def take(self, rows: Sequence[int]) -> Rows:
        """Give those rows, in that order."""
        return Rows({name: array[list(rows)] for name, array in self.inputs.items()})

    def batches(self, size: int) -> Iterator[dict[str, Array]]:
        """Give feeds of ``size`` rows in order; the last may be shorter."""
        for start in range(0, len(self), size):
            yield {name: array[start : start + size] for name, array in self.inputs.items()}


def file_pieces(
    data: str, signature: Signature, *, rows: int, limit: int | None, inputs: Mapping[str, str], label: str | None
) -> Iterator[Rows]:
    """Give the rows of a file or folder in pieces of ``rows``, as ``signature`` of a deployment's steps wants them.

    Images of a folder are read piece by piece, a Parquet file too.

    Raises:
        BadInput: a column fits no input, or it is open which. UnknownName: a column or an input that is not there.
    """
    room = Room(this_host().memory_bytes // 4, limit)
    path, left = Path(data), limit
    whole = path.suffix.lower() != ".parquet" or not path.is_file()
    for columns in [open_columns(data, room)] if whole else parquet_pieces(path, rows):
        if isinstance(columns, Samples):
            raise BadInput(f"{data} gives finished samples; a deployment with steps takes files, text and numbers")
        names = assign(columns, signature, inputs, label_column(columns, signature, inputs, label))
        chosen = {spec.name: _chosen(columns, names[spec.name]) for spec in signature.inputs}
        lengths = {name: len_of(column) for name, column in chosen.items()}
        count = min(lengths.values())
        if max(lengths.values()) > count:
            told = ", ".join(f"{name}: {length}" for name, length in lengths.items())
            raise BadInput(f"the columns of {data} differ in length ({told}); each row needs all of them")
        count = count if left is None else min(count, left)
        for start in range(0, count, rows):
            stop = min(start + rows, count)
            yield Rows({spec.name: piece_of(chosen[spec.name], spec, start, stop) for spec in signature.inputs})
        left = None if left is None else left - count
        if left is not None and left <= 0:
            return


def files_for(data: str, signature: Signature, options: DataOptions, *, limit: int | None) -> Rows | None:
    """Give all rows as a server's model takes them, where it takes the files of images and the data has some; or None.

    Images that are to be preprocessed are not sent as files. Raises as ``file_pieces`` does.
    """
    if options.preprocess is not None or all(spec.dtype != "string" for spec in signature.inputs):
        return None
    room, held_bytes, pieces = Room(this_host().memory_bytes // 4, 1), 0, []
    columns = open_columns(data, room)
    if isinstance(columns, Samples) or not any(isinstance(column, Images) for column in columns.by_name.values()):
        return None
    inputs = options.inputs or {}
    for piece in file_pieces(data, signature, rows=PIECE_ROWS, limit=limit, inputs=inputs, label=options.label):
        held_bytes += sum(content_bytes(array) for array in piece.inputs.values())
        room.check(held_bytes, f"the files of {data}")
        pieces.append(piece)
    if not pieces:
        return None  # read as samples are, it is told that there are none
    return Rows({name: np.concatenate([piece.inputs[name] for piece in pieces]) for name in pieces[0].inputs})


def _chosen(columns: Columns, names: Sequence[str]) -> Column:
    """Give the column of an input, or several numbers side by side as [n, features]. Raises BadInput."""
    parts = [columns.by_name[name] for name in names]
    if len(parts) == 1:
        return parts[0]
    numbers = [part for part in parts if is_array(part)]
    if len(numbers) < len(parts):
        raise BadInput(f"the columns {names[0]!r} to {names[-1]!r} are not all numbers, to feed one input together")
    return side_by_side(numbers, names)


def len_of(column: Column) -> int:
    """Give how many rows a column has. Raises BadInput: it cannot be used."""
    if isinstance(column, Unusable):
        raise BadInput(column.reason)
    return len(column)


def piece_of(column: Column, spec: TensorSpec, start: int, stop: int) -> Array:
    """Give some rows of a column as a tensor. Raises BadInput, SignatureMismatch: they do not fit it."""
    if isinstance(column, Unusable):
        raise BadInput(column.reason)
    if isinstance(column, Images):
        if spec.dtype != "string":
            raise BadInput(f"the column has images, and {spec} takes none")
        return as_objects([column.read(row) for row in range(start, stop)])
    if spec.dtype == "string":
        if column.dtype.kind not in "SU" or column.ndim != 1:
            raise BadInput(f"the column has {column.dtype.name} {list(column.shape[1:])}, and {spec} takes text")
        return as_objects([item if isinstance(item, bytes) else item.encode() for item in column[start:stop].tolist()])
    return cast(column[start:stop], spec.dtype, f"the column of {spec.name!r}")


def as_objects(items: list[bytes]) -> Array:
    """Give bytes as an array [n] of objects."""
    held = np.empty(len(items), object)
    held[:] = items
    return held
