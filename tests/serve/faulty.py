"""Engines whose sessions fail on purpose, on a run whose first value says so. The rest is ONNX Runtime."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar

from msgspec import Meta

from hasten.artifact import Artifact
from hasten.engine import Session
from hasten.engines.onnxruntime import OnnxRuntime
from hasten.measurement import Operator
from hasten.registry import Entry
from hasten.settings import Doc
from hasten.tensors import Array, Feed, Signature
from hasten.transform import Context

RAISES, HANGS = 1000.0, 2000.0
"""First values of a batch on which its run raises, or hangs until ``release`` is set."""

release = threading.Event()
hanging = threading.Event()
may_open = threading.Event()
may_open.set()
opening = threading.Event()
"""Set once a session waits for ``may_open``."""
ENTRY = Entry("serve.faulty:FaultyEngine")


class FaultySession:
    def __init__(self, inner: Session) -> None:
        self._inner = inner
        self.run: Callable[[Feed], dict[str, Array]] = self._run

    @property
    def signature(self) -> Signature:
        return self._inner.signature

    def _run(self, feed: Feed) -> dict[str, Array]:
        first = float(feed["x"].ravel()[0])
        if first == RAISES:
            raise ValueError("this session raises")
        if first == HANGS:
            hanging.set()
            release.wait()
        return self._inner.run(feed)

    def close(self) -> None:
        self._inner.close()


@dataclass(frozen=True, kw_only=True)
class FaultyEngine:
    name: ClassVar[str] = "faulty"
    uses_samples: ClassVar[bool] = False
    uses_training: ClassVar[bool] = False

    threads: Annotated[int, Doc("threads that one run may use"), Meta(ge=1)] = 1
    precision: str = "float32"

    def why_not(self, source: Artifact) -> str | None:
        return OnnxRuntime().why_not(source)

    def apply(self, source: Artifact, ctx: Context) -> Artifact:
        return OnnxRuntime().apply(source, ctx)

    def open(self, built: Artifact) -> Session:
        if not may_open.is_set():
            opening.set()
            may_open.wait()
        return FaultySession(OnnxRuntime().open(built))

    def operators(self, built: Artifact, feed: Feed, *, runs: int) -> tuple[Operator, ...]:
        return OnnxRuntime().operators(built, feed, runs=runs)
