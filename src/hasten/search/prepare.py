"""What a search begins with: the model imported, the samples read, engines and threads chosen."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from hasten import registry
from hasten.artifact import Artifact, hash_file
from hasten.errors import InvalidSetting, UnknownName
from hasten.frontends import import_model
from hasten.host import this_host
from hasten.samples import Samples
from hasten.samples.preprocess import Preprocess
from hasten.samples.readers import read_samples
from hasten.search import space
from hasten.settings import values_of
from hasten.store import Store
from hasten.tensors import DTYPES, Array


@dataclass(frozen=True, kw_only=True)
class Data:
    """How samples are read where they come from a file."""

    inputs: Mapping[str, str] | None = None
    """Which column feeds which model input."""
    label: str | None = None
    limit: int | None = None
    preprocess: Preprocess | None = None


def chosen_engines(names: Sequence[str] | None) -> tuple[str, ...]:
    """Give the engines to try: those named, or all that work here.

    Raises:
        UnknownName: there is no such engine. MissingDependency: one that was named is not installed.
    """
    if names is None:
        return space.available_engines()
    known = registry.entries("engine")
    for name in names:
        if name not in known:
            raise UnknownName("engine", name, known)
        registry.load("engine", name)
    return tuple(names)


def chosen_threads(counts: Sequence[int] | None) -> tuple[int, ...]:
    """Give the thread counts to try, in rising order.

    Raises:
        InvalidSetting: a count is under one, or over the cores of this machine.
    """
    cores = this_host().usable_cores
    chosen = tuple(sorted(set(counts or space.default_threads(cores))))
    if chosen[0] < 1 or chosen[-1] > this_host().cores:
        raise InvalidSetting(f"threads = {list(chosen)}: this machine has {this_host().cores} cores; ask for 1 to that")
    return chosen


def imported(
    model: Any, store: Store, *, data: Data, samples: Samples | None, example: Any, state: Path | None
) -> tuple[Artifact, str]:
    """Import a model, unless it is an artifact already. Gives it with its name. Raises as ``import_model`` does."""
    if isinstance(model, Artifact):
        return model, str(model.lineage[0].settings.get("source", "model")) if model.lineage else "model"
    name = Path(str(model)).name if isinstance(model, str | Path) else type(model).__name__
    made = import_model(model, store, samples=samples, preprocess=data.preprocess, example=example, state=state)
    return made, name


def read_data(samples: str | Path | Samples, source: Artifact, data: Data) -> tuple[Samples, Preprocess | None]:
    """Read samples, unless they are samples already. Gives them with the preprocessing that they were read with."""
    if isinstance(samples, Samples):
        return samples, data.preprocess
    read = read_samples(
        samples,
        source.signature,
        preprocess=data.preprocess,
        inputs=data.inputs,
        label=data.label,
        limit=data.limit,
    )
    return read.samples, read.preprocess


def read_training(
    training: str | Path | Samples, source: Artifact, data: Data, preprocess: Preprocess | None
) -> Samples:
    """Read the samples to train on as the others were read. Raises as ``read_samples`` and ``Samples.check`` do."""
    read, _ = read_data(training, source, replace(data, preprocess=preprocess, limit=None))
    read.check(source.signature)
    return read


def output_shapes(source: Artifact) -> dict[str, Array]:
    """Give zeros in the shape of the outputs for two samples: enough to see whether they are class scores."""
    return {spec.name: np.zeros((2, *spec.concrete({})[1:]), DTYPES[spec.dtype]) for spec in source.signature.outputs}


def with_preprocess(source: Artifact, preprocess: Preprocess, store: Store) -> Artifact:
    """Keep the preprocessing that the samples were read with beside the model."""
    with store.scratch() as folder:
        for name in source.files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source.folder / name, folder / name)
        return store.put(replace(source, folder=folder, preprocess=values_of(preprocess)))


def metric_code(metric: str | None) -> str | None:
    """Give the digest of a metric's own file: once it is edited, the question is another."""
    path = Path((metric or "").rpartition(":")[0])
    return hash_file(path) if path.suffix == ".py" and path.is_file() else None
