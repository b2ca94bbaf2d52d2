"""Bundles of small real models, as the optimizer writes them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from hasten.deployment import Serving
from hasten.protocol.messages import InferRequest, Tensor
from hasten.tensors import Array
from hasten.testing.deployments import deployed
from hasten.testing.models import mlp

FEATURES = 16


def bundle(
    folder: Path,
    *,
    model: onnx.ModelProto | None = None,
    serving: Serving | None = None,
    engine: str = "onnxruntime",
    batch: int | None = None,
    **more: Any,
) -> Path:
    """Build a model for ONNX Runtime and write a bundle of it; gives its TOML file. ``more``: of the deployment."""
    served = _on_threads(serving or Serving(instances=1), engine)
    return deployed(model or mlp(), folder, batch=batch, engine=engine, serving=served, **more)


def _on_threads(serving: Serving, engine: str) -> Serving:
    """Keep sessions that fail or hang on purpose off the event loop's thread."""
    alone = engine != "onnxruntime" and serving.isolation == "auto"
    return replace(serving, isolation="thread") if alone else serving


def rows(n: int, *, seed: int = 0) -> Array:
    """Give rows [n, features]."""
    return np.random.default_rng(seed).standard_normal((n, FEATURES)).astype(np.float32)


def request(x: Array, *, model: str = "net", **more: Any) -> InferRequest:
    """Ask for everything that a model says of ``x``."""
    return InferRequest(model=model, inputs=(Tensor.of("x", x),), **more)


def run(work: Coroutine[Any, Any, None]) -> None:
    """Run a test's coroutine, for at most a minute."""

    async def limited() -> None:
        await asyncio.wait_for(work, 60)

    asyncio.run(limited())


def instances_left() -> list[threading.Thread]:
    """Give the instance threads that go on though they were told to end: on a busy machine that takes a moment."""
    told = [thread for thread in threading.enumerate() if thread.name.startswith("hasten")]
    for thread in told:
        thread.join(10)
    return [thread for thread in told if thread.is_alive()]
