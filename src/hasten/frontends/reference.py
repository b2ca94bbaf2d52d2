"""What an ONNX artifact gives for a feed, run by the reference engine in a process of its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hasten import registry
from hasten.artifact import Artifact
from hasten.engine import Engine, Session
from hasten.isolation import Child, Reply
from hasten.settings import build
from hasten.store import Store, read_artifact
from hasten.tensors import DTYPES, Array, Feed, Signature
from hasten.transform import Context

ENGINE = "onnxruntime"
"""Part of the base install, and the one that exporters are written against."""

SYMBOLIC_LENGTH = 8
"""Length of a symbolic axis that nothing else decides."""


def run_reference(stored: Artifact, feed: Feed) -> dict[str, Array]:
    """Run a stored ONNX artifact once.

    Raises:
        Unsupported, BuildFailed: the engine cannot take the model, or crashed on it.
    """
    with Child.start("hasten.frontends.reference:Reference", folder=str(stored.folder)) as child:
        return child.call("run", arrays=feed).arrays


class Reference:
    """What ``run_reference`` starts in the child. Graph optimization stays off: nothing is to be folded into it."""

    def __init__(self, folder: str) -> None:
        source = read_artifact(Path(folder))
        engine: Engine = build(registry.load("engine", ENGINE), {"optimization": "none"}, name=ENGINE)
        # Beside the source, so that a model of several gigabytes lands on the disk that is meant for it.
        with Store(source.folder.parent.parent).scratch() as scratch:
            context = Context(folder=scratch, samples=None, seed=0, progress=lambda text, share: None)
            self._session: Session = engine.open(engine.apply(source, context))

    def run(self, arrays: Feed) -> Reply:
        """Run the model."""
        return Reply(None, self._session.run(arrays))


def random_feed(signature: Signature, *, seed: int = 0) -> dict[str, Array]:
    """Draw inputs that fit a signature: standard normal floats, integers 0 and 1 (any index table has those)."""
    random = np.random.default_rng(seed)
    feed: dict[str, Array] = {}
    for spec in signature.inputs:
        shape = tuple(SYMBOLIC_LENGTH if isinstance(dim, str) else dim for dim in spec.shape)
        if spec.dtype == "string":
            feed[spec.name] = np.full(shape, "a")
        elif spec.dtype.startswith(("float", "bfloat")):
            feed[spec.name] = random.standard_normal(shape).astype(DTYPES[spec.dtype])
        else:
            feed[spec.name] = random.integers(0, 2, shape).astype(DTYPES[spec.dtype])
    return feed
