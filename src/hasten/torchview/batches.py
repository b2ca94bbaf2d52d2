"""Samples as tensors, batch by batch: the arrays stay where they are, on disk if they are mapped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hasten.errors import SignatureMismatch, Unsupported
from hasten.samples import Samples
from hasten.tensors import Array
from hasten.torchview.arrays import to_numpy, to_torch

HELD_SHARE = 20
"""One row in so many is held out: 5 %."""

HELD_MAX = 2000
"""More rows tell no finer which parameters are better, and cost time after every epoch."""

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Split:
    """The rows to train on and the rows held out, which choose the best parameters and the end."""

    train: Rows
    held: Rows

    @classmethod
    def of(cls, n: int, seed: int) -> Split:
        """Split ``n`` rows by seed. Below 20 rows none is held out."""
        order = np.random.default_rng([seed, 1]).permutation(n)
        held = min(n // HELD_SHARE, HELD_MAX)
        return cls(np.sort(order[held:]), np.sort(order[:held]))


def epoch_order(rows: Rows, batch: int, *, seed: int, epoch: int) -> list[Rows]:
    """Give the batches of one epoch, shuffled by seed and epoch.

    The rest that fills no batch is left out (another one each time): batch-norm would take its statistics from it. If
    there are fewer rows than a batch, they are the batch.
    """
    order = np.random.default_rng([seed, 2, epoch]).permutation(rows)
    whole = max(len(rows) // batch, 1)
    return [order[i * batch : (i + 1) * batch] for i in range(whole)]


def in_turn(rows: Rows, batch: int) -> Iterator[Rows]:
    """Give all rows in batches, the last maybe shorter."""
    for start in range(0, len(rows), batch):
        yield rows[start : start + batch]


def generator_of(seed: int, step: int) -> torch.Generator:
    """Give a generator of the CPU for what is random in one step."""
    state = np.random.SeedSequence([seed, 3, step]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))


def inputs_of(samples: Samples, rows: Rows | slice, names: Sequence[str], device: str) -> dict[str, Tensor]:
    """Give the inputs of some rows by name, each [n, ...], in the order of ``names``.

    Raises:
        SignatureMismatch: the samples have no such input.
        Unsupported: an input is text.
    """
    for name in names:
        if name not in samples.inputs:
            raise SignatureMismatch(f"the samples have no input {name!r}; they have {sorted(samples.inputs)}")
        if samples.inputs[name].dtype.kind in "OSU":
            raise Unsupported("train", f"input {name!r} is text, and a trainable view computes with numbers")
    return {name: to_torch(samples.inputs[name][rows]).to(device) for name in names}


def as_array(tensor: Tensor) -> Array:
    """Copy a tensor into an array to compute with: bfloat16, which NumPy lacks, becomes float32."""
    return to_numpy(tensor.float() if tensor.dtype is torch.bfloat16 else tensor)
