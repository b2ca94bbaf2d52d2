"""Following channels through a graph: which entries of which axes have to be cut together.

Every entry along every axis of every tensor has a label. An operator hands the labels of its inputs on to its output,
and joins those that can only go together: the columns of a weight with the channels that it reads, the two sides of an
addition, the channels of an attention head. What is joined with an axis of the graph's inputs or outputs, or goes into
an operator that mixes channels, stays. What is left falls into classes of labels: the dependency graph of G. Fang et
al., "DepGraph: towards any structural pruning", arXiv 2301.12900, channel by channel, so that concatenated, split and
folded channels need no rules of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt
import onnx
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from hasten.graph.costs import bind
from hasten.graph.model import Graph, is_standard, spec_of
from hasten.tensors import Array

Ints = npt.NDArray[np.int64]

Labels = tuple[Ints, ...]
"""Of one tensor: for each axis, the label of each entry along it."""

MANY = 1 << 12
"""Entries of two axes that are joined, from which repeated pairs are left out."""

WHOLE_NUMBERS = frozenset(("int64", "bool", "string", "uint64"))
"""Constants of these types are indices, shapes or masks: they have no channels."""

LENGTHS = ((5, 11), (7, 17), (13, 29), (19, 41), (23, 53), (31, 71), (37, 83))
"""Two lengths for each symbolic dimension. Their differences differ, so that no two dimensions are taken for one."""

SIDES = ((96, 160), (128, 224), (192, 320), (256, 416))
"""The same for the sides of images, which networks halve again and again."""


@dataclass(frozen=True)
class Bound:
    """A graph twice over, its symbolic dimensions set to two different lengths: what agrees does not depend on them."""

    graph: Graph
    other: Graph
    lengths: Mapping[str, int]
    """Of each symbolic dimension in ``graph``."""
    symbols: Mapping[tuple[int, int], tuple[str, int]]
    """A graph input and its axis, by the two lengths that the symbolic dimension there has."""

    @classmethod
    def of(cls, model: onnx.ModelProto) -> Bound:
        """Bind a model's symbolic dimensions and infer its shapes."""
        lengths, symbols = _lengths(model)
        first, second = ({name: pair[i] for name, pair in lengths.items()} for i in (0, 1))
        return cls(Graph(bind(model, first)), Graph(bind(model, second)), first, symbols)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Give a tensor's shape in ``graph``, or None where it is not known."""
        return _known_shape(self.graph, name)

    def pairs(self, name: str) -> tuple[tuple[int, int], ...] | None:
        """Give each axis' two lengths, or None where they are not known."""
        first, second = _known_shape(self.graph, name), _known_shape(self.other, name)
        if first is None or second is None or len(first) != len(second):
            return None
        return tuple(zip(first, second, strict=True))

    def constant(self, node: onnx.NodeProto, place: int) -> Array | None:
        """Give the value of a node's input if it is there, constant, and does not depend on symbolic dimensions."""
        if place >= len(node.input) or not node.input[place]:
            return None
        value = self.graph.constant(node.input[place])
        second = self.other.constant(self._others[node.output[0]].input[place])
        return value if value is not None and second is not None and np.array_equal(value, second) else None

    def twin(self, node: onnx.NodeProto) -> onnx.NodeProto:
        """Give the node of ``graph`` that a node of the model became."""
        return self._mine[node.output[0]]

    @cached_property
    def _mine(self) -> dict[str, onnx.NodeProto]:
        return {node.output[0]: node for node in self.graph.nodes}

    @cached_property
    def _others(self) -> dict[str, onnx.NodeProto]:
        return {node.output[0]: node for node in self.other.nodes}


@dataclass
class Channels:
    """Labels of a graph's tensors, and what is said of them. It grows while ``trace`` goes through the nodes."""

    bound: Bound
    labels: dict[str, Labels] = field(default_factory=dict)
    constants: set[str] = field(default_factory=set)
    """The tensors that are known before the run."""
    makes: list[tuple[onnx.NodeProto, Ints]] = field(default_factory=list)
    """Nodes that make channels of their own, with the labels of the weights' entries that make them."""
    reads: list[Ints] = field(default_factory=list)
    """Labels of weights' entries that are multiplied with channels and summed over."""
    mixed: list[Ints] = field(default_factory=list)
    """Labels of axes over which something is averaged: what is cut is missing from it, zeros are not."""
    count: int = 0
    _joins: list[tuple[Ints, Ints]] = field(default_factory=list)
    _stays: list[tuple[Ints, str]] = field(default_factory=list)
    _classes: tuple[tuple[int, int], Ints] = ((0, 0), np.zeros(0, np.int64))
    """Of how many labels and joins, and the class of each label by these."""

    @property
    def graph(self) -> Graph:
        """The graph whose shapes are known."""
        return self.bound.graph

    def fresh(self, n: int) -> Ints:
        """Give ``n`` new labels."""
        self.count += n
        return np.arange(self.count - n, self.count, dtype=np.int64)

    def fixed(self, n: int, why: str) -> Ints:
        """Give an axis of ``n`` entries that stay."""
        labels = np.repeat(self.fresh(1), n)
        self.stay(labels, why)
        return labels

    def join(self, a: Ints, b: Ints) -> None:
        """Say that entries go together, one by one. The shorter one is repeated, as NumPy does."""
        if a is not b and a.size and b.size:
            one, two = (each.reshape(-1) for each in np.broadcast_arrays(a, b))
            if one.size > MANY:  # of a folded axis nearly all say the same
                pairs = np.unique(one * self.count + two)
                one, two = pairs // self.count, pairs % self.count
            self._joins.append((one, two))

    def stay(self, labels: Ints, why: str) -> None:
        """Say that entries stay, and why."""
        if labels.size:
            self._stays.append((np.unique(labels), why))

    def of(self, name: str) -> Labels:
        """Give a tensor's labels."""
        return self.labels[name]

    def given(self, node: onnx.NodeProto, place: int) -> Labels | None:
        """Give the labels of a node's input, or None where it is left out."""
        return self.labels[node.input[place]] if place < len(node.input) and node.input[place] else None

    def shape(self, name: str) -> tuple[int, ...]:
        """Give the shape of a tensor of a node that is being traced: it is known."""
        shape = self.bound.shape(name)
        assert shape is not None, name  # noqa: S101 - ``trace`` stops before nodes whose shapes are not known
        return shape

    def classes(self) -> Ints:
        """Give the class of each label, [count]: labels that were joined, over any number of steps, are in one."""
        (count, joined), found = self._classes
        if (count, joined) != (self.count, len(self._joins)):
            known = int(found.max(initial=-1)) + 1
            total = known + self.count - count
            own = np.concatenate([found, np.arange(known, total)])  # the classes so far, and new labels by themselves
            new = self._joins[joined:]
            a, b = (own[np.concatenate([*(pair[i] for pair in new), np.zeros(0, np.int64)])] for i in (0, 1))
            edges = coo_array((np.ones(len(a), np.bool_), (a, b)), shape=(total, total))
            found = connected_components(edges, directed=False)[1].astype(np.int64)[own]
            self._classes = ((self.count, len(self._joins)), found)
        return found

    def reasons(self) -> dict[int, str]:
        """Give the classes that stay, each with the first reason that was found."""
        classes, found = self.classes(), dict[int, str]()
        for labels, why in self._stays:
            for item in np.unique(classes[labels]):
                found.setdefault(int(item), why)
        return found

    def free(self, labels: Ints) -> bool:
        """Tell whether any of these entries may be cut, as far as is known by now."""
        classes = self.classes()
        stuck = np.zeros(int(classes.max(initial=-1)) + 1, np.bool_)
        for stay, _ in self._stays:
            stuck[classes[stay]] = True
        return not bool(stuck[classes[labels]].all())


Rule = Callable[[Channels, onnx.NodeProto], Sequence[Labels] | str]
"""Joins the labels of a node's inputs as they must and gives those of its outputs, in order; those that it leaves out
are no channels. Or a sentence that says why it cannot be known: then nothing that goes in may be cut."""


def trace(model: onnx.ModelProto, rules: Mapping[str, Rule]) -> Channels:
    """Label every tensor of a model. Operators that are not in ``rules`` stop the channels that they meet."""
    bound = Bound.of(model)
    channels = Channels(bound)
    _begin(channels, {tensor.name for tensor in model.graph.initializer})
    for node in bound.graph.nodes:
        _follow(channels, node, rules)
    for value in bound.graph.model.graph.output:
        for axis in channels.labels.get(value.name, ()):
            channels.stay(axis, f"its channels reach the graph's output {value.name!r}")
    return channels


def said(node: onnx.NodeProto) -> str:
    """Name a node and its operator, for a sentence."""
    return f"node {name_of(node)!r} ({node.op_type})"


def name_of(node: onnx.NodeProto) -> str:
    """Give a node's name, or that of its first output where it has none."""
    return node.name or node.output[0]


def _begin(channels: Channels, initializers: set[str]) -> None:
    graph = channels.graph
    for name, tensor in graph.initializers.items():
        channels.constants.add(name)
        if graph.dtypes[name] in WHOLE_NUMBERS:
            labels = [channels.fixed(n, f"they are indices of the constant {name!r}") for n in tensor.dims]
        elif name not in initializers:
            why = f"the weight {name!r} is a Constant node; make it an initializer"
            labels = [channels.fresh(n) if n == 1 else channels.fixed(n, why) for n in tensor.dims]
        else:
            labels = [channels.fresh(n) for n in tensor.dims]
        channels.labels[name] = tuple(labels)
    for value in graph.model.graph.input:
        shape = channels.bound.shape(value.name)
        if shape is not None and value.name not in channels.labels:
            why = f"its channels are joined with the graph's input {value.name!r}"
            channels.labels[value.name] = tuple(channels.fixed(n, why) for n in shape)


def _follow(channels: Channels, node: onnx.NodeProto, rules: Mapping[str, Rule]) -> None:
    rule = rules.get(node.op_type) if is_standard(node) else None
    inside = _captured(channels.graph, node)
    names = [name for name in (*node.input, *node.output) if name]
    unknown = next((name for name in names if channels.bound.pairs(name) is None), None)
    if rule is None:
        return _stop(channels, node, {*node.input, *inside}, f"{said(node)} is not known to keep channels apart")
    if unknown is not None:
        return _stop(channels, node, node.input, f"the shape of {unknown!r} at {said(node)} is not known")
    made = rule(channels, node)
    if isinstance(made, str):
        return _stop(channels, node, node.input, made)
    for name, labels in zip(node.output, made, strict=False):
        if name:
            assert tuple(map(len, labels)) == channels.shape(name), (name, labels)  # noqa: S101 - a rule's own mistake
            channels.labels[name] = labels
    _rest(channels, node, f"{said(node)} makes no channels of its output")
    if all(name in channels.constants for name in node.input if name) and any(node.input):
        channels.constants.update(node.output)
    return None


def _stop(channels: Channels, node: onnx.NodeProto, inputs: Iterable[str], why: str) -> None:
    for name in inputs:
        for axis in channels.labels.get(name, ()):
            channels.stay(axis, why)
    _rest(channels, node, why)


def _rest(channels: Channels, node: onnx.NodeProto, why: str) -> None:
    """Label the outputs that have no labels yet as entries that stay."""
    for name in node.output:
        shape = channels.bound.shape(name) if name and name not in channels.labels else None
        if shape is not None:
            channels.labels[name] = tuple(channels.fixed(n, why) for n in shape)


def _captured(graph: Graph, node: onnx.NodeProto) -> set[str]:
    """Name the tensors that the graphs inside a node take from outside."""
    if not any(item.HasField("g") or item.graphs for item in node.attribute):
        return set()
    return {name for name, users in graph.consumers.items() if any(user is node for user in users)}


def _known_shape(graph: Graph, name: str) -> tuple[int, ...] | None:
    spec = graph.specs.get(name)
    if spec is None:
        return None
    dims = tuple(dim for dim in spec.shape if isinstance(dim, int))
    return dims if len(dims) == len(spec.shape) else None


def _lengths(model: onnx.ModelProto) -> tuple[dict[str, tuple[int, int]], dict[tuple[int, int], tuple[str, int]]]:
    """Give two lengths for each symbolic dimension of the inputs, and where each pair of lengths stands."""
    constant = {tensor.name for tensor in model.graph.initializer}
    lengths: dict[str, tuple[int, int]] = {}
    places: dict[str, tuple[str, int]] = {}
    used = {True: 0, False: 0}
    for value in model.graph.input:
        shape = () if value.name in constant else spec_of(value).shape
        for axis, dim in enumerate(shape):
            if not isinstance(dim, str) or dim in lengths:
                continue
            side = len(shape) >= 4 and axis >= 2
            table, place = SIDES if side else LENGTHS, used[side]
            rounds = (place // len(table)) * (512 if side else 90)
            first, second = table[place % len(table)]
            lengths[dim], places[dim] = (first + rounds, second + rounds), (value.name, axis)
            used[side] += 1
    return lengths, {pair: places[dim] for dim, pair in lengths.items()}
