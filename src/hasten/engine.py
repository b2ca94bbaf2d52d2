"""An engine: a pass whose result can be opened and run."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from hasten.artifact import Artifact
from hasten.measurement import Operator
from hasten.tensors import Array, Feed, Signature
from hasten.transform import Pass

CPU = "cpu"


class Session(Protocol):
    """A loaded model. One thread at a time."""

    @property
    def signature(self) -> Signature:
        """What it takes and gives."""

    def run(self, feed: Feed) -> dict[str, Array]:
        """Run once. The arrays that come back are the caller's to keep."""

    def close(self) -> None:
        """Free it. Closing twice is fine."""


@runtime_checkable
class Engine(Pass, Protocol):
    """A runtime. ``apply`` builds (ONNX artifact to the runtime's own), ``open`` loads what was built.

    Every engine has the settings ``threads`` (int) and ``precision`` (a Literal of dtypes: "float32" computes as the
    graph says; QuantizeLinear/DequantizeLinear in the graph make int8 in any). A precision that the runtime does not
    really take is an ``Unsupported``, found by reading the compiled model back.

    One that computes elsewhere than on the processor says where by an attribute ``device`` ("cuda"); see ``device_of``.
    """

    @property
    def threads(self) -> int:
        """Threads that one run may use."""

    @property
    def precision(self) -> str:
        """The dtype in which float operators compute."""

    def open(self, built: Artifact) -> Session:
        """Load what ``apply`` built, on this host.

        Raises:
            StoreError: the files are not what this engine writes. BuildFailed: the runtime refuses them.
        """

    def operators(self, built: Artifact, feed: Feed, *, runs: int) -> tuple[Operator, ...]:
        """Read back the graph that really runs, with concrete shapes and the median time of each operator.

        Opens the model in the runtime's profiling mode, runs it ``runs`` times after warm-up, and closes it.
        """


def device_of(engine: Engine) -> str:
    """Say where an engine computes: "cpu", "cuda", ..."""
    return str(getattr(engine, "device", CPU))
