"""What really runs in PyTorch, and how long it takes: nodes one by one, or the kernels of a compiled library."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import onnx
import torch
from torch.profiler import ProfilerActivity, profile

from hasten.engines.torch_compiled import Compiled
from hasten.engines.torch_eager import Eager, filled
from hasten.measurement import Operator
from hasten.tensors import TensorSpec
from hasten.torchview.program import Program, prepare

WARM_UP = 3
"""Runs before those that count: the first ones allocate."""

KERNEL = ("graph_", "aoti_torch_")
"""How the names of the events begin that kernels of a compiled library leave."""


def read_eager(eager: Eager, inputs: Sequence[torch.Tensor], runs: int) -> tuple[Operator, ...]:
    """Run a program step by step and describe each step that makes a tensor, with the median of its times.

    Shape arithmetic is done in Python on the way; it makes no tensors, and its time is in none of the operators.

    Args:
        eager: What to run.
        inputs: Its inputs, in order.
        runs: How many runs count.
    """
    names = [name for node in eager.facts.nodes for name in node.output if name]
    program = prepare(eager.facts, names)
    tapped = dict(zip(program.results[len(eager.program.results) :], names, strict=True))
    slots = {**tapped, **dict(program.tensors)}
    slots |= dict(zip(program.inputs, eager.facts.inputs, strict=True))
    program = filled(program, eager.tensors)
    times: dict[int, list[int]] = {}
    with eager.computing():
        for _ in range(WARM_UP + runs):
            values = _timed(program, inputs, eager.device, times)
    makers = {name: node for node in eager.facts.nodes for name in node.output if name}
    weights = eager.tensors.keys()
    found = []
    for index, (_, reads, made, _) in enumerate(program.steps):
        outs = [slot for slot in ((made,) if isinstance(made, int) else made) if slot in tapped]
        if outs and all(isinstance(values[slot], torch.Tensor) for slot in outs):
            node = makers[tapped[outs[0]]]
            taken = [_spec(slots[s], values[s]) for s in reads if s in slots and isinstance(values[s], torch.Tensor)]
            given = [_spec(tapped[slot], values[slot]) for slot in outs]
            typical = statistics.median(times[index][WARM_UP:])
            found.append(_operator(node, taken, given, weights, max(float(typical), 1.0)))
    return tuple(found)


def read_compiled(library: Compiled, inputs: Sequence[torch.Tensor], runs: int) -> tuple[Operator, ...]:
    """Profile a library and give its kernels the medians of their times.

    Where the profile does not hold as many kernels as the schedule, no time can be told apart, and none is given.

    Args:
        library: What to run.
        inputs: Its inputs, in order.
        runs: How many runs count.
    """
    told = library.told.operators
    for _ in range(WARM_UP):
        library.run(list(inputs))
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(runs):
            library.run(list(inputs))
    events = [event for event in profiler.events() if event.cpu_parent is None and event.name.startswith(KERNEL)]
    events.sort(key=lambda event: event.time_range.start)
    if len(events) != runs * len(told):
        return told
    times = [event.time_range.elapsed_us() * 1e3 for event in events]
    count = len(told)
    return tuple(
        replace(operator, time_ns=max(statistics.median(times[place::count]), 1.0))
        for place, operator in enumerate(told)
    )


def _timed(
    program: Program, inputs: Sequence[torch.Tensor], device: torch.device, times: dict[int, list[int]]
) -> list[Any]:
    values = list(program.template)
    values[0], values[1] = False, device
    for slot, value in zip(program.inputs, inputs, strict=True):
        values[slot] = value
    wait = torch.cuda.synchronize if device.type == "cuda" else None
    for index, (run, reads, made, _) in enumerate(program.steps):
        arguments = [values[slot] for slot in reads]
        start = time.perf_counter_ns()
        result = run(*arguments)
        if wait:
            wait()
        times.setdefault(index, []).append(time.perf_counter_ns() - start)
        if isinstance(made, int):
            values[made] = result
        else:
            for slot, item in zip(made, result, strict=False):
                values[slot] = item
    return values


def _operator(
    node: onnx.NodeProto, inputs: list[TensorSpec], outputs: list[TensorSpec], weights: Any, time_ns: float
) -> Operator:
    floats = [spec.dtype for spec in (*outputs, *inputs) if "float" in spec.dtype]
    return Operator(
        name=node.name or node.output[0],
        kind=node.op_type,
        dtype=floats[0] if floats else outputs[0].dtype,
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        weights=tuple(dict.fromkeys(spec.name for spec in inputs if spec.name in weights)),
        time_ns=time_ns,
        sources=(node.name,) if node.name else (),
    )


def _spec(name: str, tensor: torch.Tensor) -> TensorSpec:
    return TensorSpec(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
