"""The space: which plans there are to try."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Literal, get_args, get_origin

from hasten import registry
from hasten.artifact import Artifact, Json
from hasten.errors import MissingDependency
from hasten.plan import Part, Plan
from hasten.settings import Setting, settings_of

REFERENCE_ENGINE = "onnxruntime"
"""The original runs here, where it may: the base install has it."""

ON_REQUEST = ("torch",)
"""Engines that a search tries only where they are named: slower here than any other, or slow to build."""

FOLD = Part("fold")


def original_plan(engines: Sequence[str], threads: Sequence[int]) -> Plan:
    """Give the baseline: the untouched model in the reference engine, with the most threads."""
    engine = REFERENCE_ENGINE if REFERENCE_ENGINE in engines else engines[0]
    return Plan(Part(engine, {"threads": max(threads)}))


def available_engines() -> tuple[str, ...]:
    """Name the engines whose runtime is installed here and loads, the reference first, but for ``ON_REQUEST``."""
    here = []
    for name, entry in registry.entries("engine").items():
        if not entry.missing and name not in ON_REQUEST:
            with contextlib.suppress(MissingDependency):  # ``hasten doctor`` says why one does not load
                registry.load("engine", name)
                here.append(name)
    return tuple(sorted(here, key=lambda name: (name != REFERENCE_ENGINE, name)))


def default_threads(cores: int) -> tuple[int, ...]:
    """Give the thread counts to try: the powers of two below ``cores``, and ``cores``."""
    return tuple(sorted({2**i for i in range(cores.bit_length()) if 2**i < cores} | {cores}))


def engine_part(engine: str, *, threads: int, precision: str = "float32", batch: int | None = None) -> Part:
    """Name an engine with what the search varies. ``batch`` fixes the batch axis where the engine can do that."""
    declared = {setting.name for setting in settings_of(registry.load("engine", engine))}
    settings: dict[str, Json] = {"threads": threads}
    if precision != "float32":
        settings["precision"] = precision
    if batch is not None and "batch" in declared:
        settings["batch"] = batch
    return Part(engine, settings)


def fixed_batch(source: Artifact, batch: int) -> int | None:
    """Give the batch that a plan may fix: None where the model's own batch axis is fixed already."""
    symbolic = any(isinstance(spec.shape[0], str) for spec in source.signature.inputs if spec.shape)
    return batch if symbolic else None


def precisions(engine: str) -> tuple[str, ...]:
    """Give the precisions that an engine declares, float32 first."""
    return _allowed(_setting("engine", engine, "precision"))


def observers() -> tuple[str, ...]:
    """Give the observers that static quantization declares."""
    return _allowed(_setting("pass", "quantize-static", "observer"))


def fuse_part(engine: str) -> Part:
    """Name the fusing pass for an engine: only ONNX Runtime knows its own operators."""
    return Part("fuse", {"target": "onnxruntime"} if engine == "onnxruntime" else {})


def lossless_plans(part: Part) -> Iterator[Plan]:
    """Give the plans that change no result, for one engine."""
    yield Plan(part, (FOLD,))
    yield Plan(part, (FOLD, fuse_part(part.name)))


def _setting(kind: Literal["pass", "engine"], plugin: str, name: str) -> Setting:
    return next(setting for setting in settings_of(registry.load(kind, plugin)) if setting.name == name)


def _allowed(setting: Setting) -> tuple[str, ...]:
    hint = setting.type
    while get_origin(hint) is not None and get_origin(hint) is not Literal:
        hint = get_args(hint)[0]
    return tuple(str(value) for value in get_args(hint)) or tuple(str(value) for value in setting.choices)
