"""The contract of a step: what it reads, what it makes of it, and how it is opened.

A step is a frozen dataclass of settings. Before the model it works on one row at a time, without the batch axis, so
that one large image is in memory and not a request's worth; after the model it works on all rows of a request,
[n, ...]. Specifications never have the batch axis, on either side.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Literal, Protocol

from hasten.errors import SignatureMismatch, StoreError
from hasten.tensors import Array, Feed, TensorSpec

Place = Literal["pre", "post"]
"""Before the model, or after it; also the table's name in a deployment."""

Specs = Mapping[str, TensorSpec]
"""Tensors by name, without the batch axis."""

Values = dict[str, Array]

Apply = Callable[[Feed], Values]
"""Give every tensor that is there after the step. Any thread, several at once. Raises ``BadRequest``: what cannot be
used, and why; nobody else's request is touched."""

ROWS = "rows"
"""The batch axis of what a client sends and gets, as messages call it."""

LARGEST_FILE_BYTES = 256 << 20
"""A tokenizer or a list of labels of more is refused before it is read."""


@dataclass(frozen=True, kw_only=True)
class Around:
    """What a step may read when it is opened."""

    folder: Path
    """The bundle's: its files are named relative to it."""
    classes: tuple[str, ...] = ()
    """The deployment's names of classes."""
    code: Path | None = None
    """The folder whose Python files the server's operator lets steps run; None: no code at all."""
    place: Place = "pre"
    """Where the step stands: what it is given has no batch axis before the model, and has one after it."""

    def file(self, name: str) -> Path:
        """Find a file of the bundle.

        Raises:
            StoreError: it is not there, lies outside of the bundle, or is too large.
        """
        path = self.folder / name
        if not path.resolve().is_relative_to(self.folder.resolve()):
            raise StoreError(f"{name!r} lies outside of {self.folder}; copy it into the deployment's folder")
        if not path.is_file():
            raise StoreError(f"there is no file {path}; copy it into the deployment's folder")
        if path.stat().st_size > LARGEST_FILE_BYTES:
            raise StoreError(f"{path} has {path.stat().st_size} bytes; at most {LARGEST_FILE_BYTES} are read")
        return path


@dataclass(frozen=True)
class Opened:
    """A step that is ready. ``fills``: with what rows of different lengths are filled up at their end, by tensor.

    ``renamed``: new names by the old ones; what was to fill a tensor up still is under its new name.
    """

    apply: Apply
    fills: Mapping[str, int] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)


class Step(Protocol):
    """One declared step."""

    name: ClassVar[str]
    places: ClassVar[frozenset[Place]]

    def takes(self, wanted: Specs) -> tuple[TensorSpec, ...]:
        """Give the tensors that it reads, as a client would send them where no step before makes them.

        ``wanted`` are the model's inputs, for steps that leave a tensor's kind as it is.
        """

    def gives(self, given: Specs) -> Specs:
        """Give all tensors that are there after it.

        Raises:
            SignatureMismatch: what is given does not fit: which tensor, wanted, got.
        """

    def open(self, around: Around, given: Specs) -> Opened:
        """Read its files, and give what runs.

        Raises:
            StoreError: a file is missing or damaged. SignatureMismatch: a file does not fit what is given.
        """


def with_rows(spec: TensorSpec) -> TensorSpec:
    """Give a specification with the batch axis; an axis of a model's own that happens to be called as it is, is not."""
    own = (f"model.{dim}" if dim == ROWS else dim for dim in spec.shape)
    return replace(spec, shape=(ROWS, *own))


def found(given: Specs, name: str) -> TensorSpec:
    """Give the specification of a tensor. Raises SignatureMismatch: there is none."""
    if name not in given:
        raise SignatureMismatch(f"it reads {name!r}, and there is only {', '.join(map(repr, given)) or 'nothing'}")
    return given[name]


def without(given: Specs, *names: str) -> dict[str, TensorSpec]:
    """Give the specifications of the other tensors."""
    return {name: spec for name, spec in given.items() if name not in names}


def with_new(given: Specs, *made: TensorSpec, instead_of: tuple[str, ...] = ()) -> Specs:
    """Give the specifications with what a step makes. Raises SignatureMismatch: two tensors would have one name."""
    left = without(given, *instead_of)
    for spec in made:
        if spec.name in left:
            raise SignatureMismatch(f"it makes {spec.name!r}, and there is one already; give it another name")
        left[spec.name] = spec
    return left
