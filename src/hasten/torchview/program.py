"""A graph made ready to run: its nodes in order, each a function bound to its attributes and the slots it reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import onnx
import torch

from hasten.graph.constants import NEVER, evaluate
from hasten.graph.model import is_standard
from hasten.tensors import Array
from hasten.torchview.facts import Facts
from hasten.torchview.operators import find_operator
from hasten.torchview.operators.elementwise import cast
from hasten.torchview.operators.operator import TORCH_DTYPES, Function, Operator, Site, refusal
from hasten.torchview.operators.recurrent import TORCH_ORDER, read_layer, run_fused
from hasten.torchview.recurrent_weights import whole_parameters

TRAINING, DEVICE = 0, 1
"""The first two slots: whether the view trains, and the device that it is on."""

HOST_LENGTH = 1024
"""Constants up to this length may take part in shape arithmetic."""

Step = tuple[Function, tuple[int, ...], int | tuple[int, ...], tuple[int, ...]]
"""What to run, the slots it reads, the slot or slots it fills, and the slots that nobody reads afterwards."""


@dataclass(frozen=True)
class Program:
    """What one forward pass does. Holds no tensors: those come by name, so it survives copies and moves."""

    template: tuple[Any, ...]
    """The slots at the start: Python values, and None where a tensor will be."""
    tensors: tuple[tuple[int, str], ...]
    """Which slot takes which tensor of the view."""
    constants: Mapping[str, Array]
    """The values of those tensors that are neither parameters nor statistics."""
    inputs: tuple[int, ...]
    steps: tuple[Step, ...]
    results: tuple[int, ...]
    """The slots of the graph's outputs, and behind them those of the taps."""


def execute(
    program: Program,
    tensors: Callable[[str], torch.Tensor],
    inputs: Sequence[torch.Tensor],
    *,
    training: bool,
    device: torch.device,
) -> list[Any]:
    """Run a program. ``tensors`` gives the view's tensors by name."""
    values = list(program.template)
    values[TRAINING], values[DEVICE] = training, device
    for slot, name in program.tensors:
        values[slot] = tensors(name)
    for slot, value in zip(program.inputs, inputs, strict=True):
        values[slot] = value
    for run, reads, made, dead in program.steps:
        result = run(*[values[slot] for slot in reads])
        if isinstance(made, int):
            values[made] = result
        else:
            for slot, item in zip(made, result, strict=False):
                values[slot] = item
        for slot in dead:
            values[slot] = None
    return [values[slot] for slot in program.results]


def prepare(facts: Facts, taps: Sequence[str] = ()) -> Program:
    """Make the program of a model that gives its outputs, and inner tensors by name.

    Raises:
        Unsupported: names the node and the operator or attribute that the table lacks.
    """
    return _Planner(facts, taps).plan()


@dataclass
class _Planner:
    """Fills slots and steps, node by node."""

    facts: Facts
    taps: Sequence[str]
    template: list[Any] = field(default_factory=lambda: [False, None])
    tensors: dict[str, int] = field(default_factory=dict)
    host: dict[str, int] = field(default_factory=dict)
    slots: dict[str, int] = field(default_factory=dict)
    steps: list[tuple[Function, tuple[int, ...], int | tuple[int, ...]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.known = self.facts.known | self.facts.quantization.starts
        self.dims = {name: spec.shape for name, spec in self.facts.graph.specs.items()}

    def plan(self) -> Program:
        model = self.facts.model
        inputs = [self._fill(name) for name in self.facts.inputs]
        for node in self.facts.nodes:
            self._node(node)
        results = [self._result(name) for name in (*(v.name for v in model.graph.output), *self.taps)]
        steps = self._with_deaths(results)
        used = {slot for _, reads, _, _ in steps for slot in reads} | set(results)
        tensors = {name: slot for name, slot in self.tensors.items() if slot in used}
        return Program(
            template=tuple(self.template),
            tensors=tuple((slot, name) for name, slot in tensors.items()),
            constants={name: self.known[name] for name in tensors if name in self.known},
            inputs=tuple(inputs),
            steps=steps,
            results=tuple(results),
        )

    def _node(self, node: onnx.NodeProto) -> None:
        if self._quantized(node) or self._compute(node):
            return
        entry = find_operator(node)
        if entry is None:
            raise refusal(node, "is no operator of the table; it cannot be trained")
        unknown = sorted({item.name for item in node.attribute} - entry.attributes)
        if unknown:
            raise refusal(node, f"has the attribute {unknown[0]!r}, which the table does not know")
        site = Site(node, self.facts.opsets.get("" if is_standard(node) else node.domain, 1), self.known, self.dims)
        if node.op_type in TORCH_ORDER and self._recurrent(site):
            return
        if not self._on_host(site, entry):
            self._on_tensors(site, entry)

    def _quantized(self, node: onnx.NodeProto) -> bool:
        """Run a node as part of the quantization, if it is."""
        steps = self.facts.quantization.steps
        if not is_standard(node) or node.output[0] not in steps:
            return False
        step = steps[node.output[0]]
        if step is not None:
            reads = tuple(self._tensor(name) for name in step.reads)
            self.steps.append((step.run, reads, self._fill(step.makes)))
        return True

    def _compute(self, node: onnx.NodeProto) -> bool:
        """Compute a node now, if all it reads never changes."""
        if not is_standard(node) or node.op_type in NEVER:
            return False
        if not all(not name or name in self.known for name in node.input):
            return False
        values = evaluate(node, [self.known.get(name) for name in node.input], self.facts.opsets.get("", 1))
        self.known.update((name, value) for name, value in zip(node.output, values, strict=True) if name)
        return True

    def _on_host(self, site: Site, entry: Operator) -> bool:
        """Let a node of shape arithmetic compute with Python values, if it reads nothing else."""
        node = site.node
        if entry.bind_host is None or not all(self._may_be_host(name) for name in node.input if name):
            return False
        if all(name in self.known for name in node.input if name) or len(self.dims.get(node.output[0], ())) > 1:
            return False
        run = entry.bind_host(site)
        reads = tuple(self._python(site, name) for name in node.input)
        self.host[node.output[0]] = made = self._new()
        self.steps.append((run, reads, made))
        return True

    def _recurrent(self, site: Site) -> bool:
        """Let a recurrent node read its parameters as they are, if what it reads is nothing but them, moved."""
        layer = read_layer(site)
        names = whole_parameters(self.facts.graph, site, layer, self.facts.trained, self.known)
        if names is None:
            return False
        rest = [self._tensor(site.node.input[i]) if site.has(i) else self._value(None) for i in (3, 5, 6)]
        reads = (self._tensor(site.node.input[0]), *rest, *(self._tensor(name) for name in names))
        outs = tuple(self._fill(name) if name else self._new() for name in site.node.output)
        self.steps.append((partial(run_fused, layer), reads, outs))
        return True

    def _may_be_host(self, name: str) -> bool:
        value = self.known.get(name)
        return name in self.host or (value is not None and value.ndim <= 1 and value.size <= HOST_LENGTH)

    def _on_tensors(self, site: Site, entry: Operator) -> None:
        node = site.node
        scalars = entry.scalars and any(name and name not in self.known for name in node.input)
        reads = [{"training": TRAINING, "device": DEVICE}[entry.first]] if entry.first else []
        for i, name in enumerate(node.input):
            if not name or (node.op_type == "Conv" and i == 2 and self._is_zero(name)):
                reads.append(self._value(None))
            elif i in entry.host or -1 in entry.host:
                reads.append(self._python(site, name))
            elif scalars and name in self.known and self.known[name].ndim == 0:
                reads.append(self._value(self.known[name].item()))
            else:
                reads.append(self._tensor(name))
        run = entry.bind(site)
        if entry.gives_host:
            self.host[node.output[0]] = made = self._new()
            self.steps.append((run, tuple(reads), made))
        elif entry.many:
            outs = tuple(self._fill(name) if name else self._new() for name in node.output)
            self.steps.append((run, tuple(reads), outs))
        else:
            self.steps.append((run, tuple(reads), self._fill(node.output[0])))

    def _is_zero(self, name: str) -> bool:
        return name in self.known and not self.known[name].any()

    def _fill(self, name: str) -> int:
        self.slots[name] = slot = self._new()
        return slot

    def _new(self) -> int:
        self.template.append(None)
        return len(self.template) - 1

    def _value(self, value: Any) -> int:
        self.template.append(value)
        return len(self.template) - 1

    def _tensor(self, name: str) -> int:
        """Give the slot of a tensor; what is a Python value so far becomes one."""
        if name in self.slots:
            return self.slots[name]
        if name in self.host:
            dtype = TORCH_DTYPES[_element_type(self.facts.graph.dtypes.get(name, "int64"))]
            source, made = self.host[name], self._fill(name)
            self.steps.append((partial(_to_tensor, dtype=dtype), (DEVICE, source), made))
            return made
        if name not in self.tensors:
            self.tensors[name] = self._new()
        return self.tensors[name]

    def _result(self, name: str) -> int:
        """Give the slot of a tensor as it leaves the view: quantized values, floats inside, are integers again."""
        slot, dtype = self._tensor(name), self.facts.graph.dtypes.get(name, "float32")
        if dtype.startswith(("float", "bfloat")):
            return slot
        made = self._new()
        self.steps.append((partial(cast, dtype=TORCH_DTYPES[_element_type(dtype)]), (slot,), made))
        return made

    def _python(self, site: Site, name: str) -> int:
        """Give the slot of a Python value; a tensor is read back."""
        if not name:
            return self._value(None)
        if name in self.known:
            value = self.known[name]
            if value.ndim > 1:
                raise site.refuse(f"reads {name!r}, which has {value.ndim} axes and should have 0 or 1")
            self.host.setdefault(name, self._value(value.item() if value.ndim == 0 else tuple(value.tolist())))
        elif name not in self.host:
            source = self._tensor(name)
            self.host[name] = made = self._new()
            self.steps.append((_to_host, (source,), made))
        return self.host[name]

    def _with_deaths(self, results: Iterable[int]) -> tuple[Step, ...]:
        """Note behind each step which of the slots that steps fill are not read any more; drop idle steps."""
        alive = set(results)
        filled = {slot for _, _, made in self.steps for slot in _slots(made)}
        steps: list[Step] = []
        for run, reads, made in reversed(self.steps):
            if alive.isdisjoint(_slots(made)):
                continue
            ends = {slot for slot in (*reads, *_slots(made)) if slot in filled} - alive
            alive |= set(reads)
            steps.append((run, reads, made, tuple(sorted(ends))))
        return tuple(reversed(steps))


def _slots(made: int | tuple[int, ...]) -> tuple[int, ...]:
    return (made,) if isinstance(made, int) else made


def _element_type(name: str) -> int:
    return int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(name)))


def _to_tensor(device: torch.device, value: Any, *, dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor(value, dtype=dtype, device=device)


def _to_host(tensor: torch.Tensor) -> Any:
    value = tensor.tolist()
    return tuple(value) if isinstance(value, list) else value
