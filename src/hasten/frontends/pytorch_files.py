"""What PyTorch has on disk: weights and exported programs, read without running what is in them."""

from __future__ import annotations

import contextlib
import io
import logging
import pickle
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.export.pt2_archive._package import PT2ArchiveReader

from hasten.errors import BadInput, HastenError
from hasten.frontends.pt2 import check_records, screen


def load_state(module: torch.nn.Module, path: Path) -> None:
    """Load weights into a module: ``.safetensors``, or a file of ``torch.save`` with nothing but weights.

    Raises:
        BadInput: the file cannot be read, holds more than weights, or does not fit; names the first that does not.
    """
    state = read_state(path)
    try:
        result = module.load_state_dict(state, strict=False)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:] if line.strip()]
        raise BadInput(f"{path.name} does not fit the model: {lines[0] if lines else error}") from error
    if result.missing_keys or result.unexpected_keys:
        said = [
            f"{what} {', '.join(map(repr, keys[:3]))}{f' and {len(keys) - 3} more' if len(keys) > 3 else ''}"
            for what, keys in (("it lacks", result.missing_keys), ("the model has no", result.unexpected_keys))
            if keys
        ]
        raise BadInput(f"{path.name} does not fit the model: {'; '.join(said)}")


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """Read weights by name, unpickling nothing but tensors. Raises BadInput as ``load_state`` does."""
    if not path.is_file():
        raise BadInput(f"there is no state file {str(path)!r}")
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise BadInput(
            f"{path.name} holds more than weights, and hasten unpickles nothing else; save model.state_dict()"
        ) from error
    except Exception as error:
        raise BadInput(f"{path.name} cannot be read as weights: {one_line(error)}") from error
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]  # what training frameworks save
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise BadInput(f"{path.name} holds no dictionary of weights; save model.state_dict()")
    return dict(state)


def load_program(path: Path) -> Any:
    """Load a ``.pt2`` file after ``pt2.screen`` and torch's restricted unpickler have passed all of it.

    Raises:
        BadInput: it is missing or damaged, or loading it would run what it holds or take more memory than it has bytes.
    """
    if not path.is_file():
        raise BadInput(f"there is no file {str(path)!r}")
    data = path.read_bytes()
    try:
        names = _records(data)
        reader = PT2ArchiveReader(io.BytesIO(data))
        if sorted(name.partition("/")[2] for name in names) != sorted(reader.get_file_names()):
            raise BadInput("its records differ between two ways of reading it; save it again with torch.export.save")
        for pickled in screen(reader.get_file_names(), reader.read_bytes):
            _records(pickled)
            torch.load(io.BytesIO(pickled), weights_only=True)
        with quiet():
            return torch.export.load(io.BytesIO(data))
    except HastenError as error:
        raise BadInput(f"{path}: {error}") from error
    except pickle.UnpicklingError as error:
        raise BadInput(f"{path}: it pickles more than tensors, and hasten unpickles nothing else") from error
    except Exception as error:
        raise BadInput(f"{path} cannot be read as an exported program: {one_line(error)}") from error


def _records(data: bytes) -> list[str]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return check_records(archive.infolist(), len(data))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what the exporter prints, warns and logs off the user's terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(action="ignore"),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            yield
    finally:
        logging.disable(before)


def one_line(error: BaseException) -> str:
    """Give the first line of a message that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
