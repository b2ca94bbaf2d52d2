"""What passes, engines, frontends and steps there are, known without importing them.

An entry names a class and what it needs; the class is imported when it is first asked for. Other distributions add
theirs through the entry-point groups ``hasten.passes``, ``hasten.engines``, ``hasten.frontends`` and ``hasten.steps``.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from hasten.errors import MissingDependency, UnknownName

Kind = Literal["pass", "engine", "frontend", "step"]


@dataclass(frozen=True)
class Entry:
    """Where a plug-in lives (``module:Class``), the modules it imports, and the extra that installs them."""

    target: str
    needs: tuple[str, ...] = ()
    extra: str | None = None

    @property
    def missing(self) -> tuple[str, ...]:
        """The needed modules that are not installed here."""
        return tuple(name for name in self.needs if importlib.util.find_spec(name) is None)

    @property
    def fix(self) -> str:
        """The command that installs what is missing."""
        return f"pip install 'hasten[{self.extra}]'" if self.extra else f"pip install {' '.join(self.needs)}"


BUILT_IN: Mapping[Kind, Mapping[str, Entry]] = {
    "pass": {
        "fold": Entry("hasten.passes.fold:Fold"),
        "fuse": Entry("hasten.passes.fuse:Fuse"),
        "cast": Entry("hasten.passes.cast:Cast"),
        "quantize-static": Entry("hasten.passes.quantize_static:QuantizeStatic"),
        "quantize-dynamic": Entry("hasten.passes.quantize_dynamic:QuantizeDynamic"),
        "prune-channels": Entry("hasten.passes.prune_channels:PruneChannels"),
        "finetune": Entry("hasten.passes.finetune:Finetune", ("torch",), "train"),
        "distill": Entry("hasten.passes.distill:Distill", ("torch",), "train"),
    },
    "engine": {
        "onnxruntime": Entry("hasten.engines.onnxruntime:OnnxRuntime", ("onnxruntime",)),
        "openvino": Entry("hasten.engines.openvino:OpenVino", ("openvino",), "openvino"),
        "torch": Entry("hasten.engines.torch:Torch", ("torch",), "train"),
    },
    "frontend": {
        "onnx": Entry("hasten.frontends.onnx:OnnxFrontend"),
        "pytorch": Entry("hasten.frontends.pytorch:PytorchFrontend", ("torch", "onnxscript", "safetensors"), "train"),
    },
    "step": {
        "decode-image": Entry("hasten.steps.decode_image:DecodeImage"),
        "resize": Entry("hasten.steps.resize:Resize"),
        "center-crop": Entry("hasten.steps.center_crop:CenterCrop"),
        "normalise": Entry("hasten.steps.normalise:Normalise"),
        "tokenise": Entry("hasten.steps.tokenise:Tokenise", ("tokenizers",), "text"),
        "cast": Entry("hasten.steps.cast:Cast"),
        "rename": Entry("hasten.steps.rename:Rename"),
        "softmax": Entry("hasten.steps.softmax:Softmax"),
        "top-k": Entry("hasten.steps.top_k:TopK"),
        "argmax": Entry("hasten.steps.argmax:Argmax"),
        "threshold": Entry("hasten.steps.threshold:Threshold"),
        "non-maximum-suppression": Entry("hasten.steps.non_maximum_suppression:NonMaximumSuppression"),
        "function": Entry("hasten.steps.function:Function"),
    },
}

_registered: dict[Kind, dict[str, Entry]] = {"pass": {}, "engine": {}, "frontend": {}, "step": {}}


def register(kind: Kind, name: str, entry: Entry) -> None:
    """Add a plug-in to this process and to the child processes that it starts."""
    _registered[kind][name] = entry


def registered() -> list[tuple[Kind, str, Entry]]:
    """List what ``register`` added: a child process is told of it when it starts."""
    return [(kind, name, entry) for kind, entries in _registered.items() for name, entry in entries.items()]


def entries(kind: Kind) -> dict[str, Entry]:
    """Give every entry of a kind by name: built in, from other distributions, then registered."""
    return {**BUILT_IN[kind], **_outside(kind), **_registered[kind]}


def load(kind: Kind, name: str) -> type[Any]:
    """Import a plug-in's class.

    Raises:
        UnknownName: nothing of that kind is called so.
        MissingDependency: it needs something that is not installed; the message has the command.
    """
    table = entries(kind)
    if name not in table:
        raise UnknownName(kind, name, table)
    entry = table[name]
    if entry.missing:
        raise MissingDependency(f"{kind} {name!r} needs {', '.join(entry.missing)}, which", entry.fix)
    module, _, attribute = entry.target.partition(":")
    try:
        loaded: type[Any] = getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise MissingDependency(f"{kind} {name!r} cannot be loaded ({error}): what it needs", entry.fix) from error
    return loaded


@functools.cache
def _outside(kind: Kind) -> Mapping[str, Entry]:
    """Read the entry points once: it takes milliseconds, and installing while we run is not supported."""
    points = importlib.metadata.entry_points(group=f"hasten.{_GROUPS[kind]}")
    return {point.name: Entry(point.value) for point in points}


_GROUPS: Mapping[Kind, str] = {"pass": "passes", "engine": "engines", "frontend": "frontends", "step": "steps"}
