"""Rows of many requests into one run's inputs, and its outputs back: split after join is the identity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np

from hasten.errors import ServerFault
from hasten.serve.batching import Batch, E
from hasten.tensors import Array, Feed

Buffers = Callable[[str, tuple[int, ...], np.dtype[np.generic]], Array]
"""(input, shape, dtype) -> the array that a run's input is written into."""


class Reused:
    """Buffers that are kept from run to run, one for each input and shape. One thread at a time."""

    LIMIT_BYTES: ClassVar[int] = 64 << 20
    """What is kept at most: beyond, all are forgotten and collected anew, and a larger one is never kept."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, tuple[int, ...]], Array] = {}
        self._n_bytes = 0

    def __call__(self, name: str, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> Array:
        """Give the buffer; what it holds is of an earlier run."""
        found = self._kept.get((name, shape))
        if found is not None:
            return found
        made = np.empty(shape, dtype)
        if made.nbytes <= self.LIMIT_BYTES:
            if self._n_bytes + made.nbytes > self.LIMIT_BYTES:
                self._kept = {}
                self._n_bytes = 0
            self._kept[name, shape] = made
            self._n_bytes += made.nbytes
        return made


def join(batch: Batch[E], buffers: Buffers, *, copy: bool = False) -> dict[str, Array]:
    """Write each entry's rows once into a buffer [size, ...]; rows of padding repeat the last row.

    An entry that fills the batch by itself is passed on as it is, unless ``copy`` or its bytes lie unaligned in a body:
    then it is copied. A model without a batch axis has only such batches, and counts each request as one row.
    """
    first = batch.entries[0].feed
    whole = len(batch.entries) == 1 and batch.rows == batch.size
    if whole and not copy and all(array.flags.c_contiguous and array.flags.aligned for array in first.values()):
        return dict(first)
    feed: dict[str, Array] = {}
    if whole:
        for name, array in first.items():
            feed[name] = buffers(name, array.shape, array.dtype)
            feed[name][...] = array
        return feed
    for name, head in first.items():
        target = buffers(name, (batch.size, *head.shape[1:]), head.dtype)
        at = 0
        for entry in batch.entries:
            target[at : at + entry.rows] = entry.feed[name]
            at += entry.rows
        if at < batch.size:  # a real row: zeros may be slow (denormals) or NaN inside
            target[at:] = target[at - 1]
        feed[name] = target
    return feed


def split(outputs: Feed, batch: Batch[E]) -> list[dict[str, Array]]:
    """Give each entry its rows, as views of ``outputs`` [size, ...].

    Raises:
        ServerFault: an output has not as many rows as the batch: nobody knows whose they are.
    """
    parts, at = [], 0
    for name, array in outputs.items():
        if array.shape[:1] != (batch.size,):
            text = f"output {name!r} has the shape {list(array.shape)} for a batch of {batch.size} rows"
            raise ServerFault(f"{text}: the model leaves rows out, or adds some, and cannot be run on a batch")
    if len(outputs) == 1:
        ((name, array),) = outputs.items()
        for entry in batch.entries:
            end = at + entry.rows
            parts.append({name: array[at:end]})
            at = end
        return parts
    for entry in batch.entries:
        parts.append({name: array[at : at + entry.rows] for name, array in outputs.items()})
        at += entry.rows
    return parts


def cut(feed: Feed, rows: int, largest: int) -> list[tuple[dict[str, Array], int]]:
    """Cut a request of ``rows`` into pieces of at most ``largest`` rows: views, each with its row count."""
    return [
        ({name: array[at : at + largest] for name, array in feed.items()}, min(largest, rows - at))
        for at in range(0, rows, largest)
    ]


def glue(parts: Sequence[Feed]) -> dict[str, Array]:
    """Put the outputs of a request's pieces together again."""
    if len(parts) == 1:
        return dict(parts[0])
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
