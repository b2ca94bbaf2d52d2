"""Checkpoints: the state of a training on disk, whole or not there, and never taken for another training's.

A file is one line of JSON (the question that the training answers, the step, the SHA-256 of what follows), then what
``torch.save`` writes. It is read with ``weights_only=True``: no code in it runs.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import nn

from hasten.artifact import Json
from hasten.samples import Samples
from hasten.store import write_atomically
from hasten.torchview.arrays import to_numpy

KEPT = 2
"""Checkpoints kept: should the disk damage the newest, there is the one before."""

SUFFIX = ".checkpoint"


@dataclass(frozen=True)
class _Header:
    """The first line of a file."""

    question: str
    step: int
    sha256: str


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints in ``folder`` of the training with the key ``question``: of model, samples and settings.

    Those of other trainings lie beside them, unread: a pass may train several times.
    """

    folder: Path
    question: str

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write the state after ``step`` steps, then drop all but the newest ``KEPT``.

        Args:
            step: How many steps are done.
            state: Tensors and plain values, nested.

        Raises:
            StoreError: the disk is full or cannot be written; the checkpoints before are as they were.
        """
        buffer = io.BytesIO()
        torch.save(state, buffer)
        body = buffer.getvalue()
        header = _Header(self.question, step, hashlib.sha256(body).hexdigest())
        write_atomically(
            self.folder / f"{self.question[:16]}-{step:09d}{SUFFIX}", msgspec.json.encode(header) + b"\n" + body
        )
        for old in self._files()[KEPT:]:
            old.unlink(missing_ok=True)

    def load(self) -> tuple[int, dict[str, Any]] | None:
        """Give step and state of the newest checkpoint that is whole and this training's, or None."""
        for path in self._files():
            try:
                line, _, body = path.read_bytes().partition(b"\n")
                header = msgspec.json.decode(line, type=_Header)
            except (OSError, msgspec.DecodeError, UnicodeDecodeError):  # damaged: the one before is there for that
                continue
            if header.question == self.question and header.sha256 == hashlib.sha256(body).hexdigest():
                with contextlib.suppress(pickle.UnpicklingError):  # whole, and yet not ours: it would run code
                    return header.step, torch.load(io.BytesIO(body), weights_only=True, map_location="cpu")
        return None

    def _files(self) -> list[Path]:
        """Give this training's files, newest first."""
        return sorted(self.folder.glob(f"{self.question[:16]}-*{SUFFIX}"), reverse=True)


def question_of(modules: Sequence[nn.Module], samples: Samples, settings: Json) -> str:
    """Give the key of a training: it differs where parameters, samples, settings or PyTorch do.

    Args:
        modules: The one to train and its teacher, before the first step.
        samples: What it is trained on.
        settings: Plain values.
    """
    state = hashlib.sha256(f"{torch.__version__}\0{samples.digest}\0".encode())
    state.update(msgspec.json.encode(settings, order="deterministic"))
    for module in modules:
        for name, tensor in module.state_dict().items():
            state.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
            state.update(to_numpy(tensor).tobytes())
    return state.hexdigest()
