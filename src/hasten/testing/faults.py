"""Engines that fail on purpose: what a search must survive. Each is ONNX Runtime with one fault planted.

They are registered by ``register_faults``; child processes import them from here.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
from msgspec import Meta

from hasten import registry
from hasten.artifact import Artifact
from hasten.engine import Session
from hasten.engines.onnxruntime import OnnxRuntime
from hasten.measurement import Operator
from hasten.settings import Doc
from hasten.tensors import Array, Feed, Signature
from hasten.transform import Context

Moment = Literal["apply", "open", "run"]
Outputs = dict[str, Array]


class FaultySession:
    """A session of ONNX Runtime with something done to each run."""

    def __init__(self, inner: Session, run: Callable[[Session, Feed], Outputs]) -> None:
        self._inner = inner
        self._run = run

    @property
    def signature(self) -> Signature:
        """What it takes and gives."""
        return self._inner.signature

    def run(self, feed: Feed) -> Outputs:
        """Run once, with the fault."""
        return self._run(self._inner, feed)

    def close(self) -> None:
        """Free it. Closing twice is fine."""
        self._inner.close()


@dataclass(frozen=True, kw_only=True)
class TwinEngine:
    """ONNX Runtime under another name: it must never be called faster, nor slower."""

    name: ClassVar[str] = "twin"
    uses_samples: ClassVar[bool] = False
    uses_training: ClassVar[bool] = False

    threads: Annotated[int, Doc("threads that one run may use"), Meta(ge=1)] = 1
    precision: Annotated[Literal["float32"], Doc("dtype in which float operators compute")] = "float32"

    def why_not(self, source: Artifact) -> str | None:
        """Say what ONNX Runtime says."""
        return self._inner().why_not(source)

    def apply(self, source: Artifact, ctx: Context) -> Artifact:
        """Build with ONNX Runtime."""
        return self._inner().apply(source, ctx)

    def open(self, built: Artifact) -> Session:
        """Open with ONNX Runtime."""
        return self._inner().open(built)

    def operators(self, built: Artifact, feed: Feed, *, runs: int) -> tuple[Operator, ...]:
        """Read back with ONNX Runtime."""
        return self._inner().operators(built, feed, runs=runs)

    def _inner(self) -> OnnxRuntime:
        return OnnxRuntime(threads=self.threads)


@dataclass(frozen=True, kw_only=True)
class NanEngine(TwinEngine):
    """Gives NaN in every float output."""

    name: ClassVar[str] = "nan"

    def open(self, built: Artifact) -> Session:
        """Open with the fault."""
        return FaultySession(super().open(built), _poisoned)


@dataclass(frozen=True, kw_only=True)
class SlowEngine(TwinEngine):
    """Does the same work several times over: slower by a ratio that is known."""

    name: ClassVar[str] = "slow"

    repeats: Annotated[int, Doc("how often it does the work of one run"), Meta(ge=1)] = 3

    def open(self, built: Artifact) -> Session:
        """Open with the fault."""

        def run(inner: Session, feed: Feed) -> Outputs:
            for _ in range(self.repeats - 1):
                inner.run(feed)
            return inner.run(feed)

        return FaultySession(super().open(built), run)


@dataclass(frozen=True, kw_only=True)
class _Striking(TwinEngine):
    """An engine whose fault strikes at one moment."""

    when: Annotated[Moment, Doc("the moment at which the fault strikes")] = "run"

    def apply(self, source: Artifact, ctx: Context) -> Artifact:
        """Build, unless this is the moment."""
        if self.when == "apply":
            self._strike()
        return super().apply(source, ctx)

    def open(self, built: Artifact) -> Session:
        """Open, unless this is the moment; with the fault if it strikes in runs."""
        if self.when == "open":
            self._strike()
        inner = super().open(built)
        return FaultySession(inner, self._struck) if self.when == "run" else inner

    def _struck(self, inner: Session, feed: Feed) -> Outputs:
        self._strike()
        return inner.run(feed)

    def _strike(self) -> None:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class CrashingEngine(_Striking):
    """Kills its own process with SIGABRT, as a runtime with a bug does. Only ever use it in a child process."""

    name: ClassVar[str] = "crashing"

    def _strike(self) -> None:
        os.abort()


@dataclass(frozen=True, kw_only=True)
class HangingEngine(_Striking):
    """Never comes back. Only ever use it in a child process with a time limit."""

    name: ClassVar[str] = "hanging"

    def _strike(self) -> None:
        threading.Event().wait()


@dataclass(frozen=True, kw_only=True)
class LeakingEngine(_Striking):
    """Takes memory each time and never gives it back. Only ever use it in a child process with a memory limit."""

    name: ClassVar[str] = "leaking"

    mebibytes: Annotated[int, Doc("memory that it takes each time"), Meta(ge=1)] = 64

    def _strike(self) -> None:
        _leaked.append(np.ones(self.mebibytes << 20, np.uint8))  # ones, since untouched zeros take no memory


FAULTS: dict[str, registry.Entry] = {
    cls.name: registry.Entry(f"{__name__}:{cls.__name__}", ("onnxruntime",))
    for cls in (TwinEngine, NanEngine, SlowEngine, CrashingEngine, HangingEngine, LeakingEngine)
}
"""Every engine of this module by its registry name."""

_leaked: list[Array] = []


def register_faults() -> None:
    """Add the engines of this module to the registry of this process and of the children that it starts."""
    for name, entry in FAULTS.items():
        registry.register("engine", name, entry)


def _poisoned(inner: Session, feed: Feed) -> Outputs:
    outputs = inner.run(feed)
    return {name: np.full_like(a, np.nan) if a.dtype.kind == "f" else a for name, a in outputs.items()}
