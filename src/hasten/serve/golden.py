"""Golden answers: samples in a bundle with the outputs that the built model gave where it was measured."""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hasten.errors import StoreError
from hasten.store import write_atomically
from hasten.tensors import Array, Feed

GOLDEN = "golden.npz"
"""The file beside the deployment's TOML: arrays ``inputs:NAME`` and ``outputs:NAME``, each [n, ...]."""

LARGEST_BYTES = 256 << 20


@dataclass(frozen=True)
class Golden:
    """Inputs [n, ...] and the outputs [n, ...] that are right for them."""

    inputs: Feed
    outputs: Feed


def write_golden(folder: Path, golden: Golden) -> Path:
    """Put golden answers into a bundle's folder. Raises StoreError."""
    arrays = {f"inputs:{name}": array for name, array in golden.inputs.items()}
    arrays |= {f"outputs:{name}": array for name, array in golden.outputs.items()}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, array in arrays.items():
            with file.open(f"{name}.npy", "w") as entry:
                np.lib.format.write_array(entry, np.asarray(array), allow_pickle=False)
    write_atomically(folder / GOLDEN, buffer.getvalue())
    return folder / GOLDEN


def read_golden(folder: Path) -> Golden | None:
    """Read a bundle's golden answers; None where it has none.

    Raises:
        StoreError: the file is damaged or too large.
    """
    path = folder / GOLDEN
    if not path.exists():
        return None
    found: dict[str, dict[str, Array]] = {"inputs": {}, "outputs": {}}
    try:
        with zipfile.ZipFile(path) as file:
            total = sum(entry.file_size for entry in file.infolist())
            if total > LARGEST_BYTES:
                raise StoreError(f"{path} holds {total} bytes; at most {LARGEST_BYTES} are read")
            for entry in file.infolist():
                side, _, name = entry.filename.removesuffix(".npy").partition(":")
                if side not in found or not name:
                    raise StoreError(f"{path} holds {entry.filename!r}, which is neither an input nor an output")
                with file.open(entry) as stream:
                    found[side][name] = np.lib.format.read_array(stream, allow_pickle=False)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise StoreError(f"{path} cannot be read: {error}; delete it or write it anew") from error
    if not found["inputs"] or not found["outputs"]:
        raise StoreError(f"{path} lacks inputs or outputs; write it anew")
    return Golden(found["inputs"], found["outputs"])
