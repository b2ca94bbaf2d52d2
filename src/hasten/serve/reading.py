"""A bundle as a model needs it: read, verified, its engine had and its steps fitted."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from hasten.artifact import Artifact
from hasten.deployment import Deployment, read_deployment
from hasten.engine import Engine
from hasten.errors import StoreError
from hasten.golden import Golden, read_golden
from hasten.host import this_host
from hasten.plan import Part, load_part
from hasten.serve.intake import batch_axis
from hasten.serve.pace import Pace
from hasten.serve.repository import Bundle
from hasten.steps.pipeline import Pipeline, Table, open_pipeline
from hasten.steps.step import Around, Place

ANY_NUMBER = 1 << 31
"""More requests or rows than ever are in a service at once."""


@dataclass(frozen=True)
class Read:
    """A bundle that was read and verified, with its engine, and its steps where it has any."""

    deployment: Deployment
    artifact: Artifact
    engine: Engine
    golden: Golden | None
    pipeline: Pipeline | None = None


def read_bundle(bundle: Bundle, code: Path | None = None, pace: Pace | None = None) -> Read:
    """Read a bundle, check its digests, that this host can run it, and that its steps fit. Blocks.

    Args:
        bundle: Where it lies.
        code: The folder whose Python files its steps may run; None: none.
        pace: Rests between the steps; None: at once.

    Raises:
        StoreError: it is damaged, was built for another processor, or a step does not fit. HastenError: its engine
            cannot be had.
    """
    pace = pace or Pace()
    deployment, artifact = read_deployment(bundle.path, pace.rest)
    pace.rest()
    here = this_host()
    if artifact.host not in (None, here.binding):
        raise StoreError(
            f"{bundle.path} was built for another processor ({artifact.host}) than this one ({here.binding}); "
            "build it here"
        )
    engine: Engine = load_part("engine", Part(deployment.engine, deployment.settings))
    pipeline = open_steps(bundle.path, deployment, artifact, code)
    pace.rest()
    return Read(deployment, artifact, engine, read_golden(bundle.path.parent), pipeline)


def offline(read: Read) -> Read:
    """Give a bundle as it is run over a file: in no time that anybody set, and all that its caller keeps under way.

    Its objective and its bounds are for clients that are told to come again later. Here one caller sends as much as
    the instances take, and waits; only memory is bounded.
    """
    deployment = read.deployment
    serving = replace(
        deployment.serving,
        objective_ms=None,
        timeout_ms=None,
        concurrency=ANY_NUMBER,
        queue_rows=ANY_NUMBER,
        queue_bytes=max(deployment.serving.queue_bytes, this_host().memory_bytes // 4),
    )
    return replace(read, deployment=replace(deployment, p99_ms=None, serving=serving))


def open_steps(path: Path, deployment: Deployment, artifact: Artifact, code: Path | None) -> Pipeline | None:
    """Fit the steps of a deployment, whose TOML file is ``path``; None where it has none. Raises StoreError."""
    tables: dict[Place, tuple[Table, ...]] = {"pre": deployment.pre, "post": deployment.post}
    if any(tables.values()) and batch_axis(artifact.signature, deployment.batch) is None:
        raise StoreError(f"{path}: steps work on rows, and this model has no batch axis")
    around = Around(folder=path.parent, classes=tuple(deployment.classes or ()), code=code)
    return open_pipeline(tables, artifact.signature, around, where=str(path))
