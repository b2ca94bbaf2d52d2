"""The noun: named inputs and labels, with a digest, on disk as plain ``.npy`` files that processes share."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import ml_dtypes  # noqa: F401 - NumPy learns bfloat16 from it
import msgspec
import numpy as np
import numpy.typing as npt

from hasten.errors import BadInput, SignatureMismatch, StoreError
from hasten.store import write_atomically, writing
from hasten.tensors import NOT_LITERAL, Array, Signature, restored, storable

INDEX = "samples.json"


@dataclass(frozen=True)
class Samples:
    """``inputs`` by name, each [n, ...]: the first axis counts samples. ``labels`` [n, ...] or None.

    Raises:
        BadInput: the lengths differ, there is nothing, or an array holds Python objects.
    """

    inputs: Mapping[str, Array]
    labels: Array | None = None
    classes: tuple[str, ...] | None = None
    """The name of each class index, where labels are classes."""

    def __post_init__(self) -> None:
        lengths = {f"input {name!r}": len(array) for name, array in self.inputs.items()}
        if self.labels is not None:
            lengths["labels"] = len(self.labels)
        if len(set(lengths.values())) > 1:
            raise BadInput(f"samples differ in length: {', '.join(f'{k} has {n}' for k, n in lengths.items())}")
        if not self.inputs or not next(iter(lengths.values())):
            raise BadInput("there are no samples")
        arrays = {**self.inputs} if self.labels is None else {**self.inputs, "labels": self.labels}
        for name, array in arrays.items():
            if array.dtype.kind == "O":
                raise BadInput(
                    f"{name!r} holds Python objects; samples need a fixed-width dtype, such as 'U8' for text"
                )

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of names, dtypes, shapes and bytes."""
        state = hashlib.sha256()
        arrays = {**self.inputs} if self.labels is None else {**self.inputs, "\0labels": self.labels}
        for name, array in sorted(arrays.items()):
            state.update(f"{name}\0{array.dtype}\0{array.shape}\0".encode())
            for start in range(0, len(array), 256):
                state.update(np.ascontiguousarray(array[start : start + 256]).tobytes())
        return state.hexdigest()

    def take(self, rows: npt.NDArray[np.int64] | Sequence[int]) -> Samples:
        """Give the samples at these rows, in their order."""
        index = np.asarray(rows, dtype=np.int64)
        labels = None if self.labels is None else self.labels[index]
        return Samples({name: array[index] for name, array in self.inputs.items()}, labels, self.classes)

    def feed(self, rows: slice) -> dict[str, Array]:
        """Give the inputs of these rows: what ``Session.run`` takes."""
        return {name: np.ascontiguousarray(array[rows]) for name, array in self.inputs.items()}

    def batches(self, size: int) -> Iterator[dict[str, Array]]:
        """Give feeds of ``size`` rows in order; the last may be shorter."""
        for start in range(0, len(self), size):
            yield self.feed(slice(start, start + size))

    def check(self, signature: Signature) -> None:
        """Check names, dtypes and shapes against a model's inputs, but for the batch axis's length; and the labels.

        Raises:
            SignatureMismatch: names the input, what was wanted, what the samples have.
            BadInput: the labels are no numbers, or some are not finite.
        """
        if self.labels is not None:
            check_labels(self.labels)
        names = {spec.name for spec in signature.inputs}
        if self.inputs.keys() != names:
            raise SignatureMismatch(f"the samples have inputs {sorted(self.inputs)}, the model wants {sorted(names)}")
        for spec in signature.inputs:
            array = self.inputs[spec.name]
            if not spec.shape:
                raise SignatureMismatch(f"input {spec.name!r} is a scalar: it has no batch axis to lay samples along")
            row = np.empty((1, *array.shape[1:]), dtype=array.dtype)
            batchless = type(spec)(spec.name, spec.dtype, (1, *spec.shape[1:]))
            if problem := batchless.mismatch(row):
                raise SignatureMismatch(f"the samples do not fit: input {problem}")

    def save(self, folder: Path) -> None:
        """Write one ``.npy`` per array, then the index: without it, the folder holds no samples.

        A file already there is replaced whole, so that who has mapped the old one keeps it.

        Raises:
            StoreError: the disk is full or cannot be written.
        """
        names = list(self.inputs)
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / INDEX).unlink(missing_ok=True)
            for i, name in enumerate(names):
                _save_array(folder / f"input{i}.npy", storable(self.inputs[name]))
            if self.labels is not None:
                _save_array(folder / "labels.npy", self.labels)
        index = {
            "inputs": [[name, self.inputs[name].dtype.name] for name in names],
            "labels": self.labels is not None,
            "classes": self.classes,
            "digest": self.digest,
        }
        write_atomically(folder / INDEX, msgspec.json.encode(index))

    @classmethod
    def load(cls, folder: Path) -> Samples:
        """Open what ``save`` wrote, mapped into memory, not read.

        Raises:
            StoreError: the folder holds no samples, or damaged ones.
        """
        try:
            index = msgspec.json.decode((folder / INDEX).read_bytes(), type=_Index)
            inputs = {
                name: restored(_mapped(folder / f"input{i}.npy"), dtype) for i, (name, dtype) in enumerate(index.inputs)
            }
            labels = _mapped(folder / "labels.npy") if index.labels else None
            loaded = cls(inputs, labels, index.classes)
        except UNREADABLE as error:
            raise StoreError(f"{folder} holds no readable samples: {error}") from error
        loaded.__dict__["digest"] = index.digest
        return loaded


def check_labels(labels: Array) -> None:
    """Check that labels [n, ...] can be judged by.

    Raises:
        BadInput: they are texts; or some are NaN or infinite, with the first such row and how many there are.
    """
    if labels.dtype.kind in "SU":
        raise BadInput(
            "the labels are texts; give the index of each sample's class as a number, and the names of the classes as "
            "Samples(..., classes=(...)): numpy.unique(labels, return_inverse=True) gives both"
        )
    if labels.dtype.kind in "biu":
        return
    wrong = np.flatnonzero(~np.isfinite(labels).reshape(len(labels), -1).all(axis=1))
    if wrong.size:
        raise BadInput(
            f"the labels of {wrong.size} of {len(labels)} samples are NaN or infinite, the first in row {wrong[0]}; "
            "take these rows out, or name another column with --label"
        )


@dataclass(frozen=True, kw_only=True)
class _Index:
    """What ``INDEX`` says: the inputs' names and dtypes in the order of their files, and what else there is."""

    inputs: tuple[tuple[str, str], ...]
    labels: bool
    classes: tuple[str, ...] | None
    digest: str


UNREADABLE = (OSError, EOFError, OverflowError, msgspec.DecodeError, BadInput, *NOT_LITERAL)


def _mapped(path: Path) -> Array:
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{path.name} is no array")
    return array


def _save_array(path: Path, array: Array) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            np.save(file, array, allow_pickle=False)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
