"""The model and the samples that a verb is told of, in the words of the command line."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from hasten.artifact import Artifact
from hasten.cli import units
from hasten.errors import BadInput
from hasten.frontends import import_model
from hasten.samples import Samples
from hasten.samples.preprocess import Preprocess
from hasten.samples.readers import read_samples
from hasten.settings import build
from hasten.store import Store
from hasten.tensors import DTYPES, Array

DIGEST = re.compile(r"[0-9a-f]{6,64}")


def read_preprocess(text: str) -> Preprocess:
    """Read declared preprocessing. Raises ValueError, InvalidSetting or UnknownName."""
    return build(Preprocess, units.settings(text), name="preprocess")


@Parameter(name="*", group="Samples")
@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """How samples are read."""

    label: str | None = None
    """Column of the labels; by default it is found by its name."""
    inputs: Annotated[dict[str, str] | None, units.read_by(units.pairs)] = None
    """Which column feeds which input, as input=column,input=column."""
    limit: int | None = None
    """Read so many rows at most."""
    preprocess: Annotated[Preprocess | None, units.read_by(read_preprocess, metavar="KEY=VALUE,...")] = None
    """How images become inputs, as resize=[224,224],mean=[0.5],std=[0.25]; by default after the input's shape."""

    def read(self, data: str, artifact: Artifact) -> Samples:
        """Read samples for a model. Raises as ``read_samples`` does."""
        return self.read_with_preprocess(data, artifact)[0]

    def read_with_preprocess(self, data: str, artifact: Artifact) -> tuple[Samples, Preprocess | None]:
        """Read samples for a model, and say how images became inputs. Raises as ``read_samples`` does."""
        declared = self.preprocess or (Preprocess.of(artifact.preprocess) if artifact.preprocess else None)
        found = read_samples(
            data, artifact.signature, preprocess=declared, inputs=self.inputs, label=self.label, limit=self.limit
        )
        found.samples.check(artifact.signature)
        return found.samples, found.preprocess

    def python(self) -> list[str]:
        """Write the keyword arguments that are not the defaults."""
        told = {"label": self.label, "inputs": self.inputs, "limit": self.limit}
        lines = [f"{name}={value!r}" for name, value in told.items() if value is not None]
        if self.preprocess is not None:
            given = {k: v for k, v in vars(self.preprocess).items() if v != getattr(Preprocess(), k)}
            lines.append(f"preprocess=hasten.Preprocess({', '.join(f'{k}={v!r}' for k, v in given.items())})")
        return lines


DATA = DataOptions()
"""The defaults."""


def find_model(model: str, store: Store, *, state: Path | None = None) -> Artifact:
    """Give the artifact of a model file, of ``module.py:factory``, or of a digest in the store.

    Raises:
        BadInput: there is no such file, or it is no model; or weights are given for a digest. StoreError: no such
            digest.
    """
    return find_stored(model, store, state=state) or import_model(model, store, state=state)


def find_stored(model: str, store: Store, *, state: Path | None = None) -> Artifact | None:
    """Give the artifact that a digest stands for; None where the word is no digest, or a file has that name.

    Raises:
        BadInput: weights are given for a digest. StoreError: no such digest, or several that begin so.
    """
    if not is_digest(model):
        return None
    if state is not None:
        raise BadInput(f"{model} is a model in the store, which has its weights; --state is for module.py:factory")
    return store.get(model)


def is_digest(model: str) -> bool:
    """Say whether a word stands for a model in the store: it reads as a digest, and no file has that name."""
    return DIGEST.fullmatch(model) is not None and not Path(model).exists()


def name_of(artifact: Artifact) -> str:
    """Give the name of what an artifact was imported from; its digest's beginning where nobody knows."""
    first = artifact.lineage[0].settings.get("source") if artifact.lineage else None
    return str(first) if first else artifact.digest[:16]


def stand_in_samples(artifact: Artifact, *, rows: int, seed: int = 0) -> Samples:
    """Draw samples that fit a model's inputs: floats from the standard normal, integers 0 or 1.

    For times alone: they say nothing about quality.

    Raises:
        BadInput: an input has a symbolic axis besides the batch; only real data knows its length.
    """
    import numpy as np

    random = np.random.default_rng(seed)
    inputs: dict[str, Array] = {}
    for spec in artifact.signature.inputs:
        free = [dim for dim in spec.shape[1:] if isinstance(dim, str)]
        if free or spec.dtype == "string":
            raise BadInput(f"input {spec} can have any {free[0] if free else 'text'}; give real samples with --data")
        shape = (rows, *(int(dim) for dim in spec.shape[1:]))
        floats = spec.dtype.startswith(("float", "bfloat"))
        values = random.standard_normal(shape) if floats else random.integers(0, 2, shape)
        inputs[spec.name] = values.astype(DTYPES[spec.dtype])
    return Samples(inputs)


def import_lines(model: str, common_home: Path, state: Path | None) -> list[str]:
    """Write the Python lines that open the store and find the model."""
    lines = ["from pathlib import Path", "import hasten", "", f"store = hasten.Store(Path({str(common_home)!r}))"]
    if is_digest(model):
        return [*lines, f"model = store.get({model!r})"]
    more = f", state=Path({str(state)!r})" if state else ""
    return [*lines, f"model = hasten.import_model({model!r}, store{more})"]
