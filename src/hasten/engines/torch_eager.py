"""A graph that PyTorch runs node by node, with everything that does not change looked up before."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import onnx
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hasten.engines.torch_graph import PRODUCTS, with_float_constants
from hasten.engines.torch_quantized import EagerFacts
from hasten.errors import Unsupported
from hasten.torchview.facts import Facts
from hasten.torchview.program import Program, execute, prepare
from hasten.torchview.view import View

NAME = "torch"
WATCHED = frozenset(("convolution", "mm", "addmm", "bmm", "baddbmm", "linear", "mkldnn_convolution"))
"""PyTorch's own operators that hold nearly all arithmetic: in them the precision must be the one that was asked for."""


@dataclass(frozen=True)
class Eager:
    """A program with its tensors in it."""

    facts: Facts
    program: Program
    tensors: Mapping[str, torch.Tensor]
    """The constants by their names in the graph."""
    precision: str
    device: torch.device

    @classmethod
    def of(cls, model: onnx.ModelProto, *, precision: str, device: str) -> Eager:
        """Make a model ready. Constants that are stored quantized become float, once.

        Raises:
            Unsupported: names the node and the operator that the view lacks.
        """
        allow_no_less(device)
        facts = EagerFacts.of(with_float_constants(model))
        view = View(facts).eval().requires_grad_(False).to(device)
        program = prepare(facts)
        tensors = {name: view.constant(name).detach() for _, name in program.tensors}
        if precision != "float32":
            for name in _weights_of_products(facts) & tensors.keys():
                tensors[name] = tensors[name].to(getattr(torch, precision))
        return cls(facts, filled(program, tensors), tensors, precision, torch.device(device))

    def run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Give the outputs for the inputs, both in order."""
        with self.computing():
            return execute(self.program, _never, inputs, training=False, device=self.device)

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """Let products compute in the precision meanwhile."""
        if self.precision == "float32":
            yield
            return
        with torch.autocast(self.device.type, getattr(torch, self.precision)):
            yield


def allow_no_less(device: str) -> None:
    """Let float32 be float32 on a GPU: PyTorch's convolutions take 10 bits of mantissa there by default (TF32)."""
    if device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False


def check_precision(run: Callable[[], object], precision: str) -> None:
    """Run something once, and look at what computes.

    Raises:
        Unsupported: a product computes in another dtype than ``precision``.
    """
    with torch.inference_mode(), _Watch(getattr(torch, precision)) as watch:
        run()
    if watch.other:
        raise Unsupported(NAME, f"it runs {watch.other}, not in {precision}")


def filled(program: Program, tensors: Mapping[str, torch.Tensor]) -> Program:
    """Give a program with its tensors in their slots."""
    template: list[Any] = list(program.template)
    for slot, name in program.tensors:
        template[slot] = tensors.get(name)
    return replace(program, template=tuple(template), tensors=())


class _Watch(TorchDispatchMode):  # type: ignore[misc]
    """Sees each operator that PyTorch runs, and notes the first product in another floating dtype."""

    def __init__(self, wanted: torch.dtype) -> None:
        super().__init__()
        self._wanted = wanted
        self.other: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in WATCHED and result.is_floating_point() and result.dtype is not self._wanted:
            self.other = self.other or f"{name} in {str(result.dtype).removeprefix('torch.')}"
        return result


def _weights_of_products(facts: Facts) -> set[str]:
    """Name the constants that only products read."""
    uses: dict[str, set[bool]] = {}
    for node in facts.nodes:
        for name in node.input:
            uses.setdefault(name, set()).add(node.op_type in PRODUCTS)
    return {name for name, kinds in uses.items() if kinds == {True} and name not in facts.graph.outputs}


def _never(name: str) -> torch.Tensor:
    raise AssertionError(f"the tensor {name!r} was not looked up before")
