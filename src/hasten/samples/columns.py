"""What a file of samples holds before it meets a model: named columns, and how much memory they may take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeGuard

from hasten.errors import BadInput
from hasten.tensors import Array

MAX_IMAGE_BYTES = 64 * 2**20
"""An encoded image of more is refused before it is read."""


@dataclass(frozen=True)
class Images:
    """A column of encoded images, each in memory or in a file."""

    items: Sequence[bytes | Path]

    def __len__(self) -> int:
        return len(self.items)

    def read(self, row: int) -> bytes:
        """Give the encoded bytes of one image.

        Raises:
            BadInput: the file cannot be read, or is too large for an image.
        """
        item = self.items[row]
        if isinstance(item, bytes):
            return item
        try:
            if (size := item.stat().st_size) > MAX_IMAGE_BYTES:
                raise BadInput(f"{item.name} has {in_mib(size)}: too much for one image")
            return item.read_bytes()
        except OSError as error:
            raise BadInput(f"cannot read {item}: {error.strerror}") from error


@dataclass(frozen=True)
class Unusable:
    """A column that cannot be a tensor: an error only where it is needed."""

    reason: str


Column = Array | Images | Unusable


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Columns by name, each of as many rows. ``classes`` names the indices of the column ``label``."""

    by_name: Mapping[str, Column]
    label: str | None = None
    """The label column, where the format says which it is."""
    classes: tuple[str, ...] | None = None
    vocabularies: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Every value of a column of strings in the whole file, also beyond a limit, sorted."""


@dataclass(frozen=True)
class Room:
    """How much memory samples may take, and how many rows are wanted (None: all)."""

    memory_bytes: int
    limit: int | None = None

    def rows(self, there: int) -> int:
        """Rows to take of those that are there."""
        return there if self.limit is None else min(there, self.limit)

    def check(self, needed_bytes: int, what: str, *, at_row: int | None = None) -> None:
        """Check that ``needed_bytes`` fit.

        Raises:
            BadInput: they do not; the message has both sizes and what to do.
        """
        if needed_bytes > self.memory_bytes:
            where = "" if at_row is None else f" after {at_row} rows"
            raise BadInput(
                f"{what} takes {in_mib(needed_bytes)} of memory{where}, more than the {in_mib(self.memory_bytes)} "
                "allowed; read fewer rows with --limit"
            )


def is_array(column: Column) -> TypeGuard[Array]:
    """Say whether a column holds values rather than encoded images or nothing usable."""
    return not isinstance(column, Images | Unusable)


def in_mib(size: int) -> str:
    """Write a size in bytes for a person."""
    return f"{size / 2**20:,.1f} MiB"
