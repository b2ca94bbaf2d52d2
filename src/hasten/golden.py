"""Golden answers: samples in a bundle with the outputs that the built model gave where it was measured."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from hasten.errors import StoreError, Untrusted
from hasten.store import write_atomically
from hasten.tensors import NOT_LITERAL, NPZ_DAMAGES, Array, Feed, assert_agrees, relative_error, restored, storable

GOLDEN = "golden.npz"
"""The file beside the deployment's TOML: arrays ``inputs:NAME`` and ``outputs:NAME``, each [n, ...], and numbers
``within:NAME``: how far an output may lie from its golden one, relative, where that is more than its dtype allows.
Of bfloat16 the bits are there as ``inputs.bits:NAME``."""

OF_BITS = ".bits"

LARGEST_BYTES = 256 << 20


@dataclass(frozen=True)
class Golden:
    """Inputs [n, ...] and the outputs [n, ...] that are right for them."""

    inputs: Feed
    outputs: Feed
    within: Mapping[str, float] = field(default_factory=dict)
    """What an output may be off by, relative, where that is more than ``tensors.TOLERANCES`` has for its dtype: a model
    that scales its integers by the batch it is in answers one row a little differently in another batch."""

    def check(self, got: Feed, *, precision: str | None = None) -> None:
        """Check answers [n, ...] against the golden ones.

        Raises:
            Untrusted: one is missing or off; says which, by how much, and how much is allowed.
        """
        wide = {name: array for name, array in self.outputs.items() if self.within.get(name, 0.0) > 0}
        narrow = {name: array for name, array in self.outputs.items() if name not in wide}
        assert_agrees(narrow, got, dtype=precision, what="golden output")
        for name, array in wide.items():
            if name not in got:
                raise Untrusted(f"golden output {name!r} is missing; got {sorted(got)}")
            error, limit = relative_error(array, got[name]), self.within[name]
            if error > limit:
                text = f"is off by {error:.2g} of its largest value (allowed: {limit:.2g})"
                raise Untrusted(f"golden output {name!r} {text}")


def write_golden(folder: Path, golden: Golden) -> Path:
    """Put golden answers into a bundle's folder. Raises StoreError."""
    write_atomically(folder / GOLDEN, encode_golden(golden))
    return folder / GOLDEN


def encode_golden(golden: Golden) -> bytes:
    """Give the file's bytes."""
    arrays: dict[str, Array] = {}
    for side, named in (("inputs", golden.inputs), ("outputs", golden.outputs)):
        for name, array in named.items():
            kept = storable(array)
            arrays[f"{side}{'' if kept.dtype == array.dtype else OF_BITS}:{name}"] = kept
    arrays |= {f"within:{name}": np.array(limit) for name, limit in golden.within.items()}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, array in arrays.items():
            with file.open(f"{name}.npy", "w") as entry:
                np.lib.format.write_array(entry, np.asarray(array), allow_pickle=False)
    return buffer.getvalue()


def read_golden(folder: Path) -> Golden | None:
    """Read a bundle's golden answers; None where it has none.

    Raises:
        StoreError: the file is damaged or too large.
    """
    path = folder / GOLDEN
    if not path.exists():
        return None
    found: dict[str, dict[str, Array]] = {"inputs": {}, "outputs": {}, "within": {}}
    try:
        with zipfile.ZipFile(path) as file:
            total = sum(entry.file_size for entry in file.infolist())
            if total > LARGEST_BYTES:
                raise StoreError(f"{path} holds {total} bytes; at most {LARGEST_BYTES} are read")
            for entry in file.infolist():
                side, _, name = entry.filename.removesuffix(".npy").partition(":")
                of_bits, side = side.endswith(OF_BITS), side.removesuffix(OF_BITS)
                if side not in found or not name:
                    raise StoreError(f"{path} holds {entry.filename!r}, which is no part of golden answers")
                with file.open(entry) as stream:
                    array = np.lib.format.read_array(stream, allow_pickle=False)
                found[side][name] = restored(array, "bfloat16") if of_bits else array
        within = {name: float(limit) for name, limit in found["within"].items()}
    except (*NPZ_DAMAGES, *NOT_LITERAL) as error:
        raise StoreError(f"{path} cannot be read: {error}; delete it or write it anew") from error
    if not found["inputs"] or not found["outputs"]:
        raise StoreError(f"{path} lacks inputs or outputs; write it anew")
    return Golden(found["inputs"], found["outputs"], within)
