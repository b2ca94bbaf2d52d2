"""A frontend: what turns a trained model from elsewhere into an ONNX artifact."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from hasten.artifact import Artifact, Json
from hasten.samples import Samples
from hasten.tensors import Array, Feed


@dataclass(frozen=True, kw_only=True)
class ImportRequest:
    """What to import, and what is known of its inputs."""

    model: Any
    """A path, ``module.py:factory``, or a live model of the frontend's own library."""
    state: Path | None = None
    """A file of weights for a factory's model."""
    example: Any = None
    """Example inputs: an array, a tuple of them in the order of the inputs, or a dictionary by name."""
    samples: Samples | None = None
    """Samples to check the imported graph on; without an example, the first rows are one."""
    dynamic_batch: bool = True


@dataclass(frozen=True, kw_only=True)
class Imported:
    """What a frontend made. The checks are done where the artifact is stored: ``import_model``."""

    artifact: Artifact
    """Without lineage, in the folder that the frontend was given."""
    settings: Mapping[str, Json] = field(default_factory=dict)
    """What the lineage says about how it was imported; no path of this machine."""
    feed: Feed | None = None
    """The inputs that ``expected`` came from."""
    expected: Mapping[str, Array] | None = None
    """What the source gives for ``feed``; None where the graph itself is the only source."""
    unchecked: str = "no: the graph is its own source"
    """What the lineage says where ``expected`` is None."""


class Frontend(Protocol):
    """A way to import models. Its registry name is ``name``."""

    name: ClassVar[str]

    def convert(self, request: ImportRequest, folder: Path) -> Imported:
        """Write the model into the empty ``folder`` as ONNX (``write_model``), and run its source once.

        Raises:
            BadInput: the file, the factory, the state or the example cannot be used; one line says why.
            BuildFailed: the exporter failed.
        """
