"""What an ONNX artifact gives for a feed, run by the reference engine in a process of its own."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx

from hasten import registry
from hasten.artifact import Artifact
from hasten.engine import Engine, Session
from hasten.graph.model import signature_of
from hasten.isolation import Child, Limits, Reply
from hasten.settings import build
from hasten.tensors import DTYPES, Array, Feed, Signature
from hasten.transform import Context

ENGINE = "onnxruntime"
"""Part of the base install, and the one that exporters are written against."""

SYMBOLIC_LENGTH = 8
"""Length of a symbolic axis that nothing else decides."""


def run_reference(model: Path, feed: Feed) -> dict[str, Array]:
    """Run the ONNX file ``model`` once; its folder holds nothing but the model.

    Raises:
        Unsupported, BuildFailed: the engine cannot take the model, or crashed on it.
    """
    (outputs,) = run_references(model, [feed])
    return outputs


def run_references(model: Path, feeds: Sequence[Feed], limits: Limits | None = None) -> list[dict[str, Array]]:
    """Run an ONNX file once for each feed, in one process; see ``run_reference``."""
    # Beside the model, so that a copy of several gigabytes lands on the disk that is meant for it.
    with (
        tempfile.TemporaryDirectory(dir=model.parent.parent) as work,
        Child.start("hasten.frontends.reference:Reference", limits=limits, model=str(model), work=work) as child,
    ):
        return [child.call("run", arrays=feed).arrays for feed in feeds]


class Reference:
    """What ``run_reference`` starts in the child."""

    def __init__(self, model: str, work: str) -> None:
        path = Path(model)
        signature = signature_of(onnx.load(path, load_external_data=False))
        source = Artifact.of(path.parent, path.name, format="onnx", signature=signature)
        engine: Engine = build(registry.load("engine", ENGINE), {}, name=ENGINE)
        context = Context(folder=Path(work), samples=None, seed=0, progress=lambda text, share: None)
        self._session: Session = engine.open(engine.apply(source, context))

    def run(self, arrays: Feed) -> Reply:
        """Run the model. Texts come in arrays of a fixed width."""
        outputs = self._session.run(arrays)
        return Reply(None, {name: a.astype(str) if a.dtype == object else a for name, a in outputs.items()})


def random_feed(signature: Signature, *, seed: int = 0, lengths: Mapping[str, int] | None = None) -> dict[str, Array]:
    """Draw inputs that fit a signature: standard normal floats, integers 0 and 1 (any index table has those).

    ``lengths``: of symbolic axes, by name; ``SYMBOLIC_LENGTH`` of others.
    """
    lengths = lengths or {}
    random = np.random.default_rng(seed)
    feed: dict[str, Array] = {}
    for spec in signature.inputs:
        shape = tuple(lengths.get(dim, SYMBOLIC_LENGTH) if isinstance(dim, str) else dim for dim in spec.shape)
        if spec.dtype == "string":
            feed[spec.name] = np.full(shape, "a")
        elif spec.dtype.startswith(("float", "bfloat")):
            feed[spec.name] = random.standard_normal(shape).astype(DTYPES[spec.dtype])
        else:
            feed[spec.name] = random.integers(0, 2, shape).astype(DTYPES[spec.dtype])
    return feed
