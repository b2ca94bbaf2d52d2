"""The trainable view: a PyTorch module that runs an ONNX graph with the operator table."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import onnx
import torch
from onnx import numpy_helper

from hasten.artifact import Artifact
from hasten.errors import UnknownName
from hasten.graph.model import write_model
from hasten.torchview.arrays import to_numpy, to_torch
from hasten.torchview.facts import Facts
from hasten.torchview.operators.operator import Tensor
from hasten.torchview.program import Program, execute, prepare


class View(torch.nn.Module):  # type: ignore[misc]
    """An ONNX graph as a module. Its float initializers are parameters, ``model`` writes them back.

    Not trained are lone numbers (rank 0), masks, and what an operator reads as a setting, as a Clip's bounds: they
    say what the graph computes. Running means and variances are buffers, which batch-norm moves while training.
    One thread at a time.
    """

    def __init__(self, facts: Facts) -> None:
        super().__init__()
        self._facts = facts
        self.inputs = facts.inputs
        self.trained = facts.trained
        """The initializers that are parameters, in the order of the file."""
        self.outputs = tuple(v.name for v in facts.model.graph.output)
        self.tensors = torch.nn.Module()
        """The parameters and buffers, under names that PyTorch allows."""
        self._keys: dict[str, str] = {}
        self._kept = (*facts.trained, *sorted(facts.statistics))
        for name in facts.trained:
            start = facts.quantization.start(name)
            self.tensors.register_parameter(self._key(name), torch.nn.Parameter(to_torch(start)))
        for name in self._kept[len(facts.trained) :]:
            self.tensors.register_buffer(self._key(name), to_torch(facts.value(name)))
        self.register_buffer("_place", torch.empty(0), persistent=False)
        self._programs: dict[tuple[str, ...], Program] = {(): prepare(facts)}
        self._add_constants(())

    @classmethod
    def of(cls, model: onnx.ModelProto) -> View:
        """Make the view of a model, in training mode as every module; the model itself is not touched.

        Raises:
            Unsupported: names the node and the operator or attribute that the table lacks.
        """
        return cls(Facts.of(model))

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Give the graph's outputs in order; ``inputs`` are its inputs in order."""
        return tuple(self._run((), inputs))

    def with_taps(self, inputs: Sequence[Tensor], taps: Sequence[str]) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """Give the graph's outputs, and inner tensors by their names in the graph.

        Raises:
            UnknownName: the graph has no such tensor.
        """
        key = tuple(taps)
        if key not in self._programs:
            for name in key:
                if name not in self._facts.names:
                    raise UnknownName("tensor of the graph", name, self._facts.names)
            self._programs[key] = prepare(self._facts, key)
            self._add_constants(key)
        results = self._run(key, inputs)
        count = len(self.outputs)
        return tuple(results[:count]), dict(zip(key, results[count:], strict=True))

    def tensor(self, initializer: str) -> Tensor:
        """Give the parameter, or the buffer, of an initializer by its name in the graph.

        Raises:
            UnknownName: the graph has no such initializer, or it is a constant of another kind.
        """
        name = self._facts.quantization.scales.get(initializer, initializer)
        if name not in self._kept:
            raise UnknownName("initializer that is trained or a running statistic", initializer, self._kept)
        return self._tensor(name)

    def constant(self, name: str) -> Tensor:
        """Give any constant of the program, trained or not, by its name in the graph. Raises KeyError."""
        return self._tensor(name)

    @property
    def device(self) -> torch.device:
        """Where it computes, also where it has no parameter."""
        return self._place.device

    def model(self) -> onnx.ModelProto:
        """Give the graph with the parameters as they are now; those that did not change, to the bit."""
        copy = onnx.ModelProto()
        copy.CopyFrom(self._facts.model)
        facts = self._facts
        now = {name: to_numpy(self._tensor(name)) for name in self._kept}
        written = facts.quantization.written(now)
        for tensor in copy.graph.initializer:
            if tensor.name in written:
                tensor.CopyFrom(numpy_helper.from_array(written[tensor.name], tensor.name))
        return copy

    def save(self, folder: Path, source: Artifact, *, add: Collection[str] = frozenset()) -> Artifact:
        """Write ``model()`` into ``folder`` and describe it, with the traits of ``source`` and those of ``add``."""
        return write_model(self.model(), folder, source, add=add)

    def _run(self, taps: tuple[str, ...], inputs: Sequence[Tensor]) -> list[Tensor]:
        place = self._place
        return execute(self._programs[taps], self._tensor, inputs, training=self.training, device=place.device)

    def _tensor(self, name: str) -> Tensor:
        found: Tensor = getattr(self.tensors, self._keys[name])
        return found

    def _key(self, name: str) -> str:
        key = "t_" + name.replace(".", "_")
        while hasattr(self.tensors, key):
            key += "_"
        self._keys[name] = key
        return key

    def _add_constants(self, taps: tuple[str, ...]) -> None:
        for name, value in self._programs[taps].constants.items():
            if name not in self._keys:
                tensor = to_torch(value).to(self._place.device)
                self.tensors.register_buffer(self._key(name), tensor, persistent=False)
