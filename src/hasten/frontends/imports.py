"""Importing: choose the frontend, check what it made against its source, keep it."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from hasten import registry
from hasten.artifact import Artifact, Step
from hasten.errors import BadInput, Unsupported
from hasten.frontends.frontend import Frontend, Imported, ImportRequest
from hasten.frontends.reference import run_reference
from hasten.host import versions
from hasten.samples import Samples
from hasten.samples.preprocess import Preprocess
from hasten.store import Store, writing
from hasten.tensors import assert_agrees

ACCEPTED = (
    "an .onnx file, a .pt2 file of torch.export.save, module.py:factory with a state file, or a torch.nn.Module with "
    "an example input"
)

ENDINGS = {".onnx": "onnx", ".pt2": "pytorch"}
"""The frontend of a file, by its ending."""

WEIGHTS_ENDINGS = {".pt", ".pth", ".safetensors", ".bin", ".ckpt"}

TORCH_CLASSES = {"torch.nn.modules.module.Module", "torch.export.exported_program.ExportedProgram"}
"""Classes of live models, by name: looking must not import torch."""


def import_model(
    model: Any,
    store: Store,
    *,
    samples: Samples | None = None,
    example: Any = None,
    state: Path | None = None,
    preprocess: Preprocess | None = None,
    dynamic_batch: bool = True,
) -> Artifact:
    """Turn a trained model into a stored ONNX artifact, checked against its source.

    Where the source can be run (PyTorch), or the graph had to be changed (an old opset, local functions), source and
    artifact run on the samples, the example or seeded random inputs, and must agree within ``tensors.TOLERANCES``.
    The lineage says under ``checked`` whether they could.

    Args:
        model: A path to an ``.onnx`` or ``.pt2`` file, ``module.py:factory``, or a live PyTorch model.
        store: Where the artifact is kept.
        samples: What to check on: its first rows.
        example: Example inputs of a PyTorch model: an array, a tuple, or a dictionary by argument.
        state: Weights of a factory's model: ``.safetensors``, or ``.pt`` with nothing but weights.
        preprocess: The preprocessing of its inputs, kept with the artifact.
        dynamic_batch: Export the first axis of a PyTorch model's inputs as symbolic.

    Raises:
        BadInput: the model, state or example cannot be used; one line says why.
        MissingDependency: its frontend needs an extra. BuildFailed: its exporter failed.
        Untrusted: the imported graph disagrees with its source; names the worst output.
        StoreError: the store cannot be written.
    """
    name = frontend_name(model)
    frontend: Frontend = registry.load("frontend", name)()
    request = ImportRequest(model=model, state=state, example=example, samples=samples, dynamic_batch=dynamic_batch)
    start = time.perf_counter()
    with store.scratch() as folder:
        with writing(folder):
            made = frontend.convert(request, folder)
        checked = _check(made)
        step = Step(
            name="import",
            settings={"frontend": name, "source": source_name(model), **made.settings, "checked": checked},
            seconds=time.perf_counter() - start,
            versions=versions(),
        )
        artifact = replace(made.artifact, preprocess=preprocess.values) if preprocess else made.artifact
        return store.put(artifact.after(step, source=None))


def frontend_name(model: Any) -> str:
    """Say which frontend takes a model, without importing it.

    Raises:
        BadInput: none does; the message lists what is accepted.
    """
    if isinstance(model, str | Path):
        text = str(model)
        if ".py:" in text:
            return "pytorch"
        ending = Path(text).suffix.lower()
        if ending in ENDINGS:
            return ENDINGS[ending]
        if ending in WEIGHTS_ENDINGS:
            raise BadInput(f"{text} holds weights without a network; give module.py:factory and it as the state file")
        raise BadInput(f"hasten cannot import {text!r}; give {ACCEPTED}")
    names = {f"{cls.__module__}.{cls.__qualname__}" for cls in type(model).__mro__}
    if names & TORCH_CLASSES:
        return "pytorch"
    raise BadInput(f"hasten cannot import a {type(model).__name__}; give {ACCEPTED}")


def source_name(model: Any) -> str:
    """Name a model's source without the folder that it was in."""
    return Path(str(model)).name if isinstance(model, str | Path) else type(model).__name__


def _check(made: Imported) -> bool | str:
    """Compare the artifact with its source. Gives True, or why there was nothing to compare or no way to."""
    if made.expected is None or made.feed is None:
        return made.unchecked
    try:
        got = run_reference(made.artifact.entry, made.feed)
    except Unsupported as error:
        return f"no: {error.reason}"
    assert_agrees(made.expected, got, what="imported output")
    return True
