"""The trainable view compiled ahead of time by PyTorch's Inductor: a shared library with its weights frozen into it."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import onnx
import torch

from hasten.artifact import Json
from hasten.engines.torch_eager import allow_no_less
from hasten.engines.torch_graph import PRODUCTS, with_int8_weights
from hasten.engines.torch_quantized import CompiledFacts
from hasten.errors import Unsupported
from hasten.measurement import Operator
from hasten.tensors import TensorSpec
from hasten.torchview.view import View

NAME = "torch"
LIBRARY = "model.so"
TOLD = "told.json"

OPTIONS: Mapping[str, Any] = {
    "freezing": True,
    "cpp.enable_kernel_profile": True,  # each kernel tells the profiler when it runs; without one that costs nothing
    "size_asserts": False,  # their messages hold addresses, so that no two builds were the same
    "aot_inductor.precompile_headers": False,  # making them takes longer than they save here
    "aot_inductor.enable_line_tables": False,
    "aot_inductor.enable_frame_pointer": False,
}
"""Of ``torch._inductor.config``; which of them there are depends on PyTorch's version."""

GPU_OPTIONS: Mapping[str, Any] = {"aot_inductor.embed_kernel_binary": True}
"""A library for a GPU has its kernels within: else it looks for them in the folder that it was made in."""

HASH_NAME = re.compile(rb"c[a-z2-7]{51}(?=\.(?:wrapper|kernel|weights))")
BUILD_ID = re.compile(rb"(\x04\0\0\0\x14\0\0\0\x03\0\0\0GNU\0).{20}", re.DOTALL)
"""What depends on the folder in which a library was made: names of temporary files, and the linker's hash of all."""


class Told(msgspec.Struct, frozen=True):
    """What the compiler tells of a library."""

    operators: tuple[Operator, ...] = ()
    """Its kernels, in the order they run."""
    overwritten: tuple[str, ...] = ()
    """Inputs that it writes into."""


class Computing(torch.nn.Module):  # type: ignore[misc]
    """A view whose products compute in a dtype."""

    def __init__(self, view: View, dtype: torch.dtype) -> None:
        super().__init__()
        self.view = view
        self.dtype = dtype

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run the view."""
        if self.dtype is torch.float32:
            return self.view(*inputs)  # type: ignore[no-any-return]
        with torch.autocast(inputs[0].device.type, self.dtype, cache_enabled=False):
            return self.view(*inputs)  # type: ignore[no-any-return]


def build(
    *, model: str, folder: str, inputs: list[tuple[str, list[int]]], threads: int, precision: str, device: str
) -> Json:
    """Compile a model for one shape, in a process that does nothing else.

    Args:
        model: The ONNX file.
        folder: Where ``LIBRARY`` and ``TOLD`` go.
        inputs: Dtype and shape of each input.
        threads: The number of threads that the library will use.
        precision: The dtype in which products compute.
        device: "cpu" or "cuda".

    Raises:
        Unsupported: the view lacks an operator, or the compiler takes no int8 kernel for a quantized model.
    """
    # The compiler, which this loads, wants a folder for temporary files: running a model must do without.
    from hasten.engines.torch_schedule import describe, overwritten

    torch.set_num_threads(threads)
    allow_no_less(device)
    graph, quantized = with_int8_weights(onnx.load(model))
    view = View(CompiledFacts.of(graph)).eval().requires_grad_(False).to(device)
    example = tuple(torch.zeros(shape, dtype=getattr(torch, dtype), device=device) for dtype, shape in inputs)
    heard: list[Told] = []

    def listen(nodes: list[Any]) -> list[Any]:
        heard.append(Told(tuple(describe(nodes, view.inputs)), tuple(overwritten(nodes, view.inputs))))
        return nodes

    with torch.no_grad(), tempfile.TemporaryDirectory() as scratch:
        program = torch.export.export(Computing(view, getattr(torch, precision)), example, strict=False)
        target = Path(scratch) / LIBRARY
        options = {
            **options_for(device),
            "aot_inductor.output_path": str(target),
            "_post_fusion_custom_pass": listen,
        }
        torch._inductor.aot_compile(program.module(), example, options=options)
        (Path(folder) / LIBRARY).write_bytes(_settled(target.read_bytes(), scratch))
    told = heard[-1]
    check_told(told, quantized if device == "cpu" else 0, precision)
    (Path(folder) / TOLD).write_bytes(msgspec.json.encode(told))
    return len(told.operators)


def options_for(device: str) -> dict[str, Any]:
    """Give the options of a build for a device, as far as this PyTorch has them."""
    asked = {**OPTIONS, **({} if device == "cpu" else GPU_OPTIONS)}
    known = torch._inductor.config.get_config_copy()
    return {name: value for name, value in asked.items() if name in known}


def check_told(told: Told, quantized: int, precision: str) -> None:
    """Check in what the kernels of a library compute.

    Raises:
        Unsupported: none of the ``quantized`` products does in int8, or another product not in the precision.
    """
    if quantized and not any(operator.dtype == "int8" for operator in told.operators):
        raise Unsupported(NAME, f"it compiles none of the {quantized} quantized products into an int8 kernel")
    for operator in told.operators:
        if precision != "float32" and operator.kind in PRODUCTS and operator.dtype not in (precision, "int8"):
            raise Unsupported(NAME, f"it runs {operator.kind} {operator.name!r} in {operator.dtype}, not {precision}")


class Compiled:
    """A loaded library."""

    def __init__(self, folder: Path, inputs: Sequence[str], device: str) -> None:
        """Load from the folder that ``build`` wrote into.

        Raises:
            RuntimeError, msgspec.DecodeError: the files cannot be read.
        """
        self.told = msgspec.json.decode((folder / TOLD).read_bytes(), type=Told)
        path = str(folder / LIBRARY)
        runners = torch._C._aoti
        if device == "cpu":
            self._runner = runners.AOTIModelContainerRunnerCpu(path, 1)
        else:
            self._runner = runners.AOTIModelContainerRunnerCuda(path, 1, device)
        allow_no_less(device)
        self._overwritten = [place for place, name in enumerate(inputs) if name in self.told.overwritten]

    def run(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """Give the outputs for the inputs, both in order. The inputs stay as they are."""
        for place in self._overwritten:
            inputs[place] = inputs[place].clone()
        return self._runner.run(inputs)  # type: ignore[no-any-return]


def _settled(library: bytes, folder: str) -> bytes:
    """Give a library's bytes without the traces of the folder that it was made in."""
    plain = library.replace(folder.encode(), b"/" * len(folder.encode()))
    return BUILD_ID.sub(rb"\g<1>" + b"\0" * 20, HASH_NAME.sub(b"c" * 52, plain))


def shapes_of(specs: Sequence[TensorSpec]) -> list[tuple[str, list[int]]]:
    """Give dtypes and shapes as ``build`` takes them."""
    return [(spec.dtype, [int(dim) for dim in spec.shape]) for spec in specs]
