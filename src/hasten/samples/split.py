"""Three splits that share no sample: calibrate for the passes, search for the choices, certify for the final claim."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hasten.errors import BadInput, InvalidSetting
from hasten.samples.samples import Samples

CALIBRATE_MAX = 512
"""Ranges of activations settle after a few hundred samples; more rows serve the other splits better."""


@dataclass(frozen=True, kw_only=True)
class Splits:
    """Samples in three disjoint parts."""

    calibrate: Samples
    search: Samples
    certify: Samples

    @property
    def parts(self) -> Mapping[str, Samples]:
        """The three by name."""
        return {"calibrate": self.calibrate, "search": self.search, "certify": self.certify}

    @property
    def sizes(self) -> dict[str, int]:
        """How many samples each has."""
        return {name: len(samples) for name, samples in self.parts.items()}

    def save(self, folder: Path) -> None:
        """Write each into a folder of its name below ``folder``. Raises StoreError as ``Samples.save`` does."""
        for name, samples in self.parts.items():
            samples.save(folder / name)

    @classmethod
    def load(cls, folder: Path) -> Splits:
        """Open what ``save`` wrote. Raises StoreError as ``Samples.load`` does."""
        return cls(**{name: Samples.load(folder / name) for name in ("calibrate", "search", "certify")})


def split(samples: Samples, *, seed: int, shares: tuple[float, float, float] = (0.2, 0.3, 0.5)) -> Splits:
    """Split samples by seed and content.

    Rows are ordered by a hash of the seed and their inputs, then cut by ``shares``. Rows with equal inputs land in
    the same split, whatever their labels: no split has seen what another one judges by. The order of the rows does
    not matter, not even for the digests of the splits. The calibrate split ends at ``CALIBRATE_MAX`` rows; what is
    left over goes to the other two in their proportion.

    Raises:
        BadInput: there are fewer than three different samples.
        InvalidSetting: the shares are not three positive numbers.
    """
    if len(shares) != 3 or min(shares) <= 0:
        raise InvalidSetting(f"shares = {list(shares)}: give three positive numbers: calibrate, search, certify")
    keys = [_row_key(samples, row, seed) for row in range(len(samples))]
    order = sorted(range(len(samples)), key=lambda row: keys[row])
    # [groups + 1] where each group of equal inputs begins in the order; the last one is the number of rows
    starts = [i for i, row in enumerate(order) if i == 0 or keys[row][0] != keys[order[i - 1]][0]] + [len(order)]
    if len(starts) - 1 < 3:
        raise BadInput(
            f"three splits need at least 3 different samples, and there are {len(starts) - 1}"
            f" ({len(order)} with repetitions); bring more data"
        )
    first, second = _cuts(np.asarray(starts), shares)
    rows = np.asarray(order)
    return Splits(
        calibrate=samples.take(rows[:first]),
        search=samples.take(rows[first:second]),
        certify=samples.take(rows[second:]),
    )


def apart(samples: Samples, *others: Samples) -> Samples | None:
    """Give the samples whose inputs are in none of ``others``: what a model is trained on, it cannot be judged by.

    None where nothing is left.
    """
    seen = {_row_key(other, row, 0)[0] for other in others for row in range(len(other))}
    kept = [row for row in range(len(samples)) if _row_key(samples, row, 0)[0] not in seen]
    if len(kept) == len(samples):
        return samples
    return samples.take(np.asarray(kept)) if kept else None


def _cuts(starts: np.ndarray[tuple[int], np.dtype[np.int64]], shares: tuple[float, float, float]) -> tuple[int, int]:
    """Choose two of the groups' starts, such that each split has at least one group."""
    total = int(starts[-1])
    groups = len(starts) - 1
    calibrate = min(total * shares[0] / sum(shares), CALIBRATE_MAX)
    # The last start within the cap: a group of equal rows is never cut, so the cap is met from below.
    i = int(np.clip(np.searchsorted(starts, calibrate, side="right") - 1, 1, groups - 2))
    wanted = starts[i] + (total - starts[i]) * shares[1] / (shares[1] + shares[2])
    j = int(np.clip(np.abs(starts - wanted).argmin(), i + 1, groups - 1))
    return int(starts[i]), int(starts[j])


def _row_key(samples: Samples, row: int, seed: int) -> tuple[bytes, bytes]:
    state = hashlib.sha256(f"{seed}\0".encode())
    for name, array in sorted(samples.inputs.items()):
        state.update(f"{name}\0".encode())
        state.update(np.ascontiguousarray(array[row]).tobytes())
    label = b"" if samples.labels is None else np.ascontiguousarray(samples.labels[row]).tobytes()
    return state.digest(), label
