"""Tensors by name: their specifications, a model's signature, and when two of them agree."""

from __future__ import annotations

import tokenize
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt

from hasten.errors import SignatureMismatch, Untrusted

Array: TypeAlias = npt.NDArray[np.generic]
Feed = Mapping[str, Array]
Dim = int | str
"""One axis: its length, or the name of a symbolic dimension."""

DTYPES: dict[str, np.dtype[np.generic]] = {
    name: np.dtype(name)
    for name in (
        "bool",
        *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        *("float16", "float32", "float64"),
    )
} | {"bfloat16": np.dtype(ml_dtypes.bfloat16), "string": np.dtype(object)}
"""Every dtype that a tensor of a signature may have, by its NumPy name."""


NOT_LITERAL = (ValueError, TypeError, SyntaxError, RecursionError, MemoryError, tokenize.TokenError)
"""What parsing a ``.npy`` header as a Python literal can raise; the memory is that of the parser's stack."""

NPZ_DAMAGES = (
    *(OSError, EOFError, ValueError, OverflowError, zipfile.BadZipFile, zlib.error),
    *(RuntimeError, NotImplementedError),  # zipfile's words for encryption and for features it does not have
)
"""What reading a damaged ``.npz`` file can raise, but for its headers."""


@dataclass(frozen=True)
class Tolerance:
    """How far two tensors may lie apart: ``relative`` to the largest magnitude of the reference."""

    relative: float
    reason: str


TOLERANCES: dict[str, Tolerance] = {
    "float64": Tolerance(1e-6, "exporters and runtimes reorder sums; 52 bits leave ample room"),
    "float32": Tolerance(1e-4, "24 bits, and sums of a few thousand terms in another order"),
    "float16": Tolerance(2e-2, "11 bits, accumulated through the layers of a network"),
    "bfloat16": Tolerance(6e-2, "8 bits, accumulated through the layers of a network"),
}
"""Largest allowed error of a float output by dtype; integers and booleans must be equal."""


@dataclass(frozen=True)
class TensorSpec:
    """A tensor's name, dtype (a key of ``DTYPES``) and shape, in which a ``str`` is a symbolic dimension."""

    name: str
    dtype: str
    shape: tuple[Dim, ...]

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{', '.join(str(d) for d in self.shape)}]"

    def mismatch(self, array: Array) -> str | None:
        """Say what is wrong with ``array`` as a value of this tensor, or return None."""
        wanted = DTYPES[self.dtype]
        got = array.dtype
        if got != wanted and not (self.dtype == "string" and got.kind in "OSU"):
            return f"{self.name!r} wants dtype {self.dtype}, got {got}"
        if array.ndim != len(self.shape):
            return f"{self.name!r} wants {len(self.shape)} dimensions {list(self.shape)}, got {list(array.shape)}"
        for axis, (dim, length) in enumerate(zip(self.shape, array.shape, strict=True)):
            if isinstance(dim, int) and dim != length:
                return f"{self.name!r} wants length {dim} on axis {axis} of {list(self.shape)}, got {length}"
        return None

    def concrete(self, dims: Mapping[str, int]) -> tuple[int, ...]:
        """Give the shape with each symbolic dimension looked up in ``dims``; an unknown one is 1."""
        return tuple(d if isinstance(d, int) else dims.get(d, 1) for d in self.shape)


@dataclass(frozen=True)
class Signature:
    """What goes into a model and what comes out, in order."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def check(self, feed: Feed) -> None:
        """Check that ``feed`` fits the inputs.

        Raises:
            SignatureMismatch: a tensor is missing, unknown, of another dtype or shape, or two tensors
                disagree on a symbolic dimension.
        """
        wanted = {spec.name for spec in self.inputs}
        if missing := sorted(wanted - feed.keys()):
            raise SignatureMismatch(f"input {missing[0]!r} is missing; got {sorted(feed)}")
        if extra := sorted(feed.keys() - wanted):
            raise SignatureMismatch(f"the model has no input {extra[0]!r}; it has {sorted(wanted)}")
        bound: dict[str, tuple[int, str]] = {}
        for spec in self.inputs:
            if problem := spec.mismatch(feed[spec.name]):
                raise SignatureMismatch(f"input {problem}")
            for dim, length in zip(spec.shape, feed[spec.name].shape, strict=True):
                if isinstance(dim, str) and bound.setdefault(dim, (length, spec.name))[0] != length:
                    first, owner = bound[dim]
                    raise SignatureMismatch(
                        f"input {spec.name!r} has {dim} = {length}, but {owner!r} has {dim} = {first}"
                    )

    def dims(self, feed: Feed) -> dict[str, int]:
        """Give the length of each symbolic input dimension in ``feed``."""
        return {
            dim: length
            for spec in self.inputs
            for dim, length in zip(spec.shape, feed[spec.name].shape, strict=True)
            if isinstance(dim, str)
        }


MASKED = 50.0
"""How far below all others a place counts that both sides have masked: exp(-50) of a probability is nothing."""


@dataclass(frozen=True)
class Pair:
    """Two arrays of one shape as float64, for differences and divergences between them.

    Where both have the same infinity (a masked logit, say), or both no number, they agree: such places are ``masked``,
    and have a value far below all others in both. What is not finite in one of them alone stays so.
    """

    reference: npt.NDArray[np.float64]
    got: npt.NDArray[np.float64]
    masked: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, reference: Array, got: Array) -> Pair:
        """Compare two arrays."""
        a, b = reference.astype(np.float64), got.astype(np.float64)
        masked = ~np.isfinite(a) & ((a == b) | (np.isnan(a) & np.isnan(b)))
        if masked.any():
            finite = a[np.isfinite(a)]
            low = float(finite.min()) - MASKED if finite.size else 0.0
            a, b = np.where(masked, low, a), np.where(masked, low, b)
        return cls(a, b, masked)

    @property
    def finite(self) -> bool:
        """All that is not masked is finite in both."""
        return bool(np.isfinite(self.reference).all() and np.isfinite(self.got).all())

    def squares(self) -> tuple[float, float]:
        """Give the sums of squares of the differences, and of the reference, over all that is not masked."""
        a = np.where(self.masked, 0.0, self.reference)
        return float(((self.reference - self.got) ** 2).sum()), float((a**2).sum())


def storable(array: Array) -> Array:
    """Give what NumPy's file format can hold of an array: of bfloat16, which it does not know, the bits."""
    return array.view(np.uint16) if array.dtype == DTYPES["bfloat16"] else array


def restored(array: Array, dtype: str) -> Array:
    """Give the array of this dtype of which ``storable`` gave the bits; any other as it is."""
    return array.view(DTYPES[dtype]) if dtype == "bfloat16" else array


def relative_error(reference: Array, got: Array) -> float:
    """Give max |got - reference| / max |reference| (or over 1e-12), in float64.

    A NaN or an infinity at the same place in both is agreement; anywhere else the error is infinite.
    """
    if reference.shape != got.shape:
        return float("inf")
    if reference.size == 0:
        return 0.0
    pair = Pair.of(np.asarray(reference), np.asarray(got))
    if not pair.finite:
        return float("inf")
    if pair.masked.all():
        return 0.0
    a, b = pair.reference[~pair.masked], pair.got[~pair.masked]
    return float(np.abs(a - b).max() / max(float(np.abs(a).max()), 1e-12))


def assert_agrees(reference: Feed, got: Feed, *, dtype: str | None = None, what: str = "output") -> None:
    """Check each tensor of ``got`` against ``reference`` within ``TOLERANCES``.

    Args:
        reference: The tensors that are right.
        got: The tensors to check, under the same names.
        dtype: The precision to judge float tensors by, where it is lower than their own.
        what: The word for a tensor in the message.

    Raises:
        Untrusted: names the worst tensor, its error and the tolerance.
    """
    worst: tuple[float, str, float] | None = None
    for name, array in reference.items():
        if name not in got:
            raise Untrusted(f"{what} {name!r} is missing; got {sorted(got)}")
        own = array.dtype.name
        limit = TOLERANCES[dtype or own].relative if own in TOLERANCES else 0.0
        if array.dtype.kind in "OSU":
            error = 0.0 if np.array_equal(array, got[name]) else float("inf")
        else:
            error = relative_error(array, got[name])
        if error > limit and (worst is None or error / max(limit, 1e-12) > worst[0] / max(worst[2], 1e-12)):
            worst = (error, name, limit)
    if worst is not None:
        error, name, limit = worst
        raise Untrusted(f"{what} {name!r} is off by {error:.2g} of its largest value (allowed: {limit:.2g})")
