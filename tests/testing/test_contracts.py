"""Every pass and engine that is registered keeps its contract; the suites see it when one does not."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import pytest

from hasten import registry
from hasten.artifact import Artifact
from hasten.engine import Session
from hasten.engines.onnxruntime import OnnxRuntime
from hasten.graph.model import read_model, write_model
from hasten.settings import Doc
from hasten.tensors import Array, Feed
from hasten.testing.contracts import (
    ENGINE_CHECKS,
    PASS_CHECKS,
    ContractBroken,
    case_of,
    check_engine,
    check_pass,
)
from hasten.testing.faults import FaultySession, NanEngine
from hasten.testing.models import MODELS, mlp
from hasten.transform import Context

BUILT_IN_PASSES = sorted(registry.BUILT_IN["pass"])
BUILT_IN_ENGINES = sorted(registry.BUILT_IN["engine"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One store for the whole module: the checks share what was built."""
    return tmp_path_factory.mktemp("contracts")


def made_with_defaults(kind: registry.Kind, name: str) -> Any:
    entry = registry.entries(kind)[name]
    if entry.missing:
        pytest.skip(f"{name} needs {', '.join(entry.missing)}: {entry.fix}")
    if importlib.util.find_spec(entry.target.partition(":")[0]) is None:
        pytest.skip(f"{name} has no module yet")
    return registry.load(kind, name)()


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("check", PASS_CHECKS)
@pytest.mark.parametrize("name", BUILT_IN_PASSES)
def test_every_pass_keeps_its_contract(name: str, check: str, model: str, folder: Path) -> None:
    subject = made_with_defaults("pass", name)
    PASS_CHECKS[check](case_of(subject, MODELS[model](), folder / name))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("check", ENGINE_CHECKS)
@pytest.mark.parametrize("name", BUILT_IN_ENGINES)
def test_every_engine_keeps_its_contract(name: str, check: str, model: str, folder: Path) -> None:
    subject = made_with_defaults("engine", name)
    ENGINE_CHECKS[check](case_of(subject, MODELS[model](), folder / name))


@dataclass(frozen=True, kw_only=True)
class Scaled:
    """A pass that multiplies the first weight by a factor: right only where the factor is 1."""

    name: ClassVar[str] = "scaled"
    uses_samples: ClassVar[bool] = False
    uses_training: ClassVar[bool] = False

    factor: Annotated[float, Doc("what the first weight is multiplied by")] = 1.0

    def why_not(self, source: Artifact) -> str | None:
        return None if source.format == "onnx" else "it changes ONNX graphs only"

    def apply(self, source: Artifact, ctx: Context) -> Artifact:
        model = read_model(source)
        weight = model.graph.initializer[0]
        weight.raw_data = (np.frombuffer(weight.raw_data, np.float32) * np.float32(self.factor)).tobytes()
        return write_model(model, ctx.folder, source)


class StrayFile(Scaled):
    name: ClassVar[str] = "stray-file"

    def apply(self, source: Artifact, ctx: Context) -> Artifact:
        (ctx.folder.parent / "stray").write_text("here")
        return super().apply(source, ctx)


class OtherSignature(Scaled):
    name: ClassVar[str] = "other-signature"

    def apply(self, source: Artifact, ctx: Context) -> Artifact:
        model = read_model(source)
        for value in (*model.graph.input, *model.graph.output):
            value.type.tensor_type.shape.dim[0].dim_value = 1
        return write_model(model, ctx.folder, source)


class SilentRefusal(Scaled):
    name: ClassVar[str] = "silent-refusal"

    def why_not(self, source: Artifact) -> str | None:
        return "" if source.format == "onnx" else "it changes ONNX graphs only"


def test_a_pass_that_does_nothing_wrong_passes(tmp_path: Path) -> None:
    check_pass(Scaled, tmp_path=tmp_path, models={"mlp": mlp})


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: Scaled(factor=2.0), "outputs agree with the source"),
        (StrayFile, "outside ctx.folder"),
        (OtherSignature, "signature is kept"),
        (SilentRefusal, "no sentence"),
    ],
)
def test_a_pass_that_breaks_its_contract_is_told_which_part(
    make: Callable[[], Scaled], complaint: str, tmp_path: Path
) -> None:
    with pytest.raises(ContractBroken, match=complaint):
        check_pass(make, tmp_path=tmp_path, models={"mlp": mlp})


@dataclass(frozen=True, kw_only=True)
class Overwriting(OnnxRuntime):
    """Gives the same arrays from every run, with new values in them."""

    name: ClassVar[str] = "overwriting"

    def open(self, built: Artifact) -> Session:  # type: ignore[override]
        kept: dict[str, Array] = {}

        def run(inner: Session, feed: Feed) -> dict[str, Array]:
            for name, array in inner.run(feed).items():
                if name in kept and kept[name].shape == array.shape:
                    kept[name][...] = array
                else:
                    kept[name] = array
            return dict(kept)

        return FaultySession(super().open(built), run)


@dataclass(frozen=True, kw_only=True)
class Careless(OnnxRuntime):
    """Casts whatever comes to the dtype that it wants."""

    name: ClassVar[str] = "careless"

    def open(self, built: Artifact) -> Session:  # type: ignore[override]
        return FaultySession(
            super().open(built), lambda inner, feed: inner.run({n: a.astype(np.float32) for n, a in feed.items()})
        )


@dataclass(frozen=True, kw_only=True)
class Vague(OnnxRuntime):
    """Tells shapes with an open dimension."""

    name: ClassVar[str] = "vague"

    def operators(self, built: Artifact, feed: Feed, *, runs: int) -> Any:
        told = super().operators(built, feed, runs=runs)
        first = replace(told[0], outputs=(replace(told[0].outputs[0], shape=("batch", 1)),))
        return (first, *told[1:])


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (NanEngine, "off by inf"),
        (Overwriting, "overwrote an earlier result"),
        (Careless, "runs on another dtype"),
        (Vague, "open dimension"),
    ],
)
def test_an_engine_that_breaks_its_contract_is_told_which_part(
    make: Callable[[], Any], complaint: str, tmp_path: Path
) -> None:
    with pytest.raises(ContractBroken, match=complaint):
        check_engine(make, tmp_path=tmp_path, models={"mlp": mlp})
