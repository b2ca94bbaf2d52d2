"""Small deployments, as the optimizer writes them: what the serving tests and the benchmarks serve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx

from hasten.artifact import Json
from hasten.deployment import Deployment, Serving, write_deployment
from hasten.engine import Engine
from hasten.engines.onnxruntime import OnnxRuntime
from hasten.host import this_host
from hasten.settings import values_of
from hasten.store import Store
from hasten.testing.models import stored
from hasten.transform import Context, run_pass


def deployed(
    model: onnx.ModelProto,
    folder: Path,
    *,
    name: str = "net",
    threads: int | None = None,
    batch: int | None = None,
    engine: str = "onnxruntime",
    runtime: Engine | None = None,
    serving: Serving | None = None,
    **more: Any,
) -> Path:
    """Build a model for ONNX Runtime and write a bundle of it.

    Args:
        model: What is served.
        folder: Where the bundle goes; the store that it is built in lies beside it.
        name: The model's, to its clients.
        threads: Of a session; None: the engine's default.
        batch: Fixed at so many rows; None: open.
        engine: The name of what opens it, where that is not ONNX Runtime itself (``hasten.testing.faults``).
        runtime: What builds and opens it, in place of ONNX Runtime with ``threads`` and ``batch``.
        serving: How it is served.
        more: Other fields of the deployment.

    Returns:
        Its deployment.toml.
    """
    store = Store(folder.parent / f".store-{folder.name}")
    ctx = Context(folder=store.root, samples=None, seed=0, progress=lambda text, share: None)
    settings: dict[str, Json] = {} if threads is None else {"threads": threads}
    if runtime is not None:
        engine, settings = runtime.name, values_of(runtime)
        batch = settings.get("batch")
    elif threads is None:
        runtime = OnnxRuntime(batch=batch)
    else:
        runtime = OnnxRuntime(batch=batch, threads=threads)
    built = run_pass(runtime, stored(model, store), store, ctx)
    deployment = Deployment(
        name=name,
        artifact=built.digest,
        engine=engine,
        settings=settings,
        source=built.digest,
        plan="",
        verdict="MEETS",
        host=this_host().binding,
        batch=batch or 1,
        serving=serving or Serving(),
        **more,
    )
    return write_deployment(deployment, built, folder)
