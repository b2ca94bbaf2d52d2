"""What Inductor's schedule tells: the kernels that it will run, in order, with what they read and make."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch._inductor.dependencies import WeakDep
from torch._inductor.ir import MultiOutput
from torch._inductor.scheduler import BaseSchedulerNode, ExternKernelSchedulerNode, NopKernelSchedulerNode
from torch._inductor.virtualized import V

from hasten.measurement import Operator
from hasten.tensors import TensorSpec

FUSED = "Fused"
"""The kind of a kernel that Inductor wrote itself, out of any number of elementwise operators and reductions."""

INT8 = "onednn.q"
"""In the names of oneDNN's int8 convolutions and products."""

KINDS = (
    *(("transpose_pointwise", "ConvTranspose"), ("conv", "Conv")),
    *(("linear", "Gemm"), ("addmm", "Gemm"), ("mm", "MatMul")),
)
"""Operators that Inductor calls rather than writes: a part of their name, and the kind in ONNX."""


def overwritten(nodes: Sequence[BaseSchedulerNode], inputs: Sequence[str]) -> list[str]:
    """Name the graph's inputs that a schedule writes into. Arguments are those of ``describe``.

    Inductor lets oneDNN's int8 product add its result to a residual in place, also where that is the caller's.
    """
    names = dict(zip(V.graph.graph_input_names, inputs, strict=True))
    changed = nodes[0].scheduler.mutation_real_name
    made = {changed.get(name, name) for node in nodes for name in node.get_buffer_names()}
    return [names[name] for name in names if name in made]


def describe(nodes: Sequence[BaseSchedulerNode], inputs: Sequence[str]) -> list[Operator]:
    """Describe a schedule. Kernels of Inductor's own that follow each other run as one, so they are told as one.

    Args:
        nodes: The schedule.
        inputs: What the graph's inputs are called, in order.
    """
    real = [node for node in nodes if not isinstance(node, NopKernelSchedulerNode)]
    parts: dict[str, list[BaseSchedulerNode]] = {}
    for node in real:
        if isinstance(node.node, MultiOutput):  # no kernel, but the name of what another one makes
            parts.setdefault(node.node.inputs[0].get_name(), []).append(node)
    runs = itertools.groupby(enumerate(real), key=lambda item: _is_extern(item[1]) and item[0] + 1)
    groups = [[node for _, node in run] for _, run in runs]
    names = dict(zip(V.graph.graph_input_names, inputs, strict=True))
    return [
        _operator([*group, *parts.get(_buffer(group[0]), ())], names)
        for group in groups
        if not isinstance(group[0].node, MultiOutput)
    ]


def _buffer(node: BaseSchedulerNode) -> str:
    """Name what a called operator makes; several outputs are parts of it."""
    return node.node.get_name() if _is_extern(node) else ""


def _is_extern(node: BaseSchedulerNode) -> bool:
    return isinstance(node, ExternKernelSchedulerNode) or bool(node.is_extern())


def _operator(nodes: Sequence[BaseSchedulerNode], names: Mapping[str, str]) -> Operator:
    own = {name for node in nodes for name in node.get_operation_names()}
    made = {name for node in nodes for name in node.get_buffer_names()}
    extern = nodes[0].node if _is_extern(nodes[0]) else None
    read = [item.get_name() for item in _flat(extern.inputs)] if extern is not None else []
    # A weak dependency is an order to keep, not something to read.
    read += [dep.name for node in nodes for dep in node.read_writes.reads if not isinstance(dep, WeakDep)]
    kept = [out.get_name() for node in nodes for out in node.get_outputs() if _leaves(out, own)]
    kernel, changed = _kernel(extern), nodes[0].scheduler.mutation_real_name
    inputs = sorted(_specs((n for n in read if n not in made), names, changed), key=lambda spec: len(spec.shape) < 2)
    outputs = _specs(kept, names, changed) or _specs(sorted(made), names, changed)
    floats = [spec.dtype for spec in (*outputs, *inputs) if "float" in spec.dtype]
    return Operator(
        name=min(made),
        kind=_kind(kernel) if extern is not None else FUSED,
        dtype="int8" if INT8 in kernel else floats[0] if floats else outputs[0].dtype,
        inputs=tuple(inputs),
        outputs=outputs,
        weights=tuple(spec.name for spec in inputs if spec.name in V.graph.constants),
    )


def _specs(found: Iterable[str], names: Mapping[str, str], changed: Mapping[str, str]) -> tuple[TensorSpec, ...]:
    """Describe tensors; what is a tensor ``changed`` in place is described as that one."""
    real = dict.fromkeys(changed.get(name, name) for name in found)
    return tuple(spec for name in real if (spec := _spec(name, names)) is not None)


def _flat(inputs: Iterable[Any]) -> Iterable[Any]:
    for item in inputs:
        yield from _flat(item) if isinstance(item, list | tuple) else (item,)


def _leaves(out: Any, own: set[str]) -> bool:
    """Tell whether a buffer is read outside the kernel, by another one or by the caller."""
    return any(not own >= set(_operations(user.node)) for user in out.users if not user.is_weak)


def _operations(node: Any) -> Iterable[str]:
    return node.get_operation_names() if isinstance(node, BaseSchedulerNode) else ("caller",)


def _kernel(extern: Any) -> str:
    if extern is None:
        return ""
    return str(getattr(extern, "python_kernel_name", None) or getattr(extern, "op_overload", None) or "")


def _kind(kernel: str) -> str:
    return next((kind for part, kind in KINDS if part in kernel), kernel.rpartition("ops.")[2].replace(".", "_"))


def _spec(name: str, names: Mapping[str, str]) -> TensorSpec | None:
    """Describe a tensor of the schedule, or give None for what is none."""
    if name in V.graph.constants:
        tensor = V.graph.constants[name]
        return TensorSpec(name, _dtype(tensor.dtype), tuple(tensor.shape))
    buffer = V.graph.try_get_buffer(name)
    if buffer is None or not hasattr(buffer, "get_size") or buffer.maybe_get_layout() is None:
        return None
    try:
        shape = tuple(int(size) for size in buffer.get_size())
    except (TypeError, NotImplementedError):
        return None
    return TensorSpec(names.get(name, name), _dtype(buffer.get_dtype()), shape)


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
