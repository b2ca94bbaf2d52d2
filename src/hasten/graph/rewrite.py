"""Changing a graph: collect what shall change, then change it at once; and rules applied until nothing changes."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from hasten.errors import BuildFailed
from hasten.graph.model import Graph, made_in, refresh_shapes, subgraphs
from hasten.tensors import Array

Rule = Callable[[onnx.ModelProto], int]
"""Changes a model in place and gives the number of changes. It may read ``value_info``, if that is fresh."""

MAX_ROUNDS = 200
"""Far beyond any real model: more rounds than this mean that two rules undo each other."""


@dataclass
class Edit:
    """Changes to the main graph of ``graph``, collected; ``commit`` makes them. Neither is of use afterwards.

    The names of the graph's inputs and outputs stay. What nobody uses any more is left for ``remove_dead``.
    """

    graph: Graph
    _uses: dict[str, str] = field(default_factory=dict)
    _makes: dict[str, str] = field(default_factory=dict)
    _removed: set[int] = field(default_factory=set)
    _before: dict[int, list[onnx.NodeProto]] = field(default_factory=dict)
    _new: list[onnx.TensorProto] = field(default_factory=list)
    _taken: set[str] | None = None
    _changes: int = 0

    def __post_init__(self) -> None:
        self._nodes = self.graph.nodes
        self._place = {id(node): i for i, node in enumerate(self._nodes)}

    def name(self, hint: str) -> str:
        """Give a name that no tensor and no node has yet."""
        if self._taken is None:
            self._taken = all_names(self.graph.model.graph)
        name = fresh_name(hint, self._taken)
        self._taken.add(name)
        return name

    def constant(self, value: Array, hint: str) -> str:
        """Add an initializer and give its name."""
        tensor = numpy_helper.from_array(np.ascontiguousarray(value).reshape(value.shape), self.name(hint))
        self._new.append(tensor)
        return tensor.name

    def make(self, kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> onnx.NodeProto:
        """Make a node of one output, named after it; ``domain`` is among the attributes."""
        return helper.make_node(kind, inputs, [output], name=self.name(f"{output}/{kind}"), **attributes)

    def alias(self, old: str, new: str) -> bool:
        """Let everyone who uses ``old`` use ``new`` instead, or say that it cannot be.

        Where ``old`` is an output of the graph, ``new`` takes its name, unless ``new`` is an input, an initializer
        or an output itself.
        """
        new = self._uses.get(new, new)
        if old in self._makes or old in self._uses or old == new:
            return False
        if old not in self.graph.outputs:
            for user, target in self._uses.items():
                if target == old:
                    self._uses[user] = new
            self._uses[old] = new
        elif new in self.graph.outputs or new not in self.graph.producers or new in self._makes:
            return False
        else:
            for user, target in self._uses.items():
                if target == new:
                    self._uses[user] = old
            self._uses[new] = self._makes[new] = old
        self._changes += 1
        return True

    def bypass(self, node: onnx.NodeProto, source: str | None = None) -> bool:
        """Drop a node of one output that gives back its input (``source``, the first by default), if it can be."""
        if not self.alias(node.output[0], source or node.input[0]):
            return False
        self.remove(node)
        return True

    def remove(self, node: onnx.NodeProto) -> None:
        """Drop a node."""
        self._removed.add(self._place[id(node)])
        self._changes += 1

    def insert(self, *nodes: onnx.NodeProto, before: onnx.NodeProto) -> None:
        """Put nodes in front of another."""
        self._before.setdefault(self._place[id(before)], []).extend(nodes)
        self._changes += 1

    def replace(self, node: onnx.NodeProto, *nodes: onnx.NodeProto) -> None:
        """Put nodes in the place of one; together they make what it made, under the same names."""
        self.insert(*nodes, before=node)
        self.remove(node)

    def set_constant(self, name: str, value: Array) -> None:
        """Make a tensor an initializer; the node that made it is to be removed."""
        self._new.append(numpy_helper.from_array(np.ascontiguousarray(value).reshape(value.shape), name))
        self._changes += 1

    def commit(self) -> int:
        """Make the changes. Gives how many there were."""
        if not self._changes:
            return 0
        graph = self.graph.model.graph
        nodes: list[onnx.NodeProto] = []
        for i, node in enumerate(self._nodes):
            nodes += self._before.get(i, [])
            if i not in self._removed:
                nodes.append(node)
        for node in nodes:
            rename_uses(node, self._uses)
            for i, name in enumerate(node.output):
                if name in self._makes:
                    node.output[i] = self._makes[name]
        kept = [copied(node) for node in nodes]
        del graph.node[:]
        graph.node.extend(kept)
        graph.initializer.extend(self._new)
        stale = [i for i, value in enumerate(graph.value_info) if value.name in self._makes.values()]
        for i in reversed(stale):
            del graph.value_info[i]
        return self._changes


def copied(node: onnx.NodeProto) -> onnx.NodeProto:
    """Give a copy of a node that its graph does not own."""
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    return copy


def rename_uses(node: onnx.NodeProto, names: Mapping[str, str]) -> None:
    """Rename the tensors that a node, and the graphs inside it, take from outside."""
    if not names:
        return
    for i, name in enumerate(node.input):
        if name in names:
            node.input[i] = names[name]
    for graph in subgraphs(node):
        own = made_in(graph)
        outer = {old: new for old, new in names.items() if old not in own}
        for inner in graph.node:
            rename_uses(inner, outer)


def fresh_name(hint: str, taken: Container[str]) -> str:
    """Give ``hint``, with a number behind it where it is taken."""
    name, n = hint, 1
    while name in taken:
        name, n = f"{hint}_{n}", n + 1
    return name


def all_names(graph: onnx.GraphProto) -> set[str]:
    """Give every name in a graph and in the graphs inside it: of tensors and of nodes."""
    names = made_in(graph) | {node.name for node in graph.node} | {value.name for value in graph.output}
    for node in graph.node:
        names.update(node.input)
        for inner in subgraphs(node):
            names |= all_names(inner)
    return names


def remove_dead(model: onnx.ModelProto) -> int:
    """Remove the nodes and initializers that no output depends on, and inputs that are initializers. Gives how many.

    Before IR version 4 every initializer had to be listed among the inputs; hasten takes them for constants.
    """
    graph = Graph(model)
    needed = set(graph.outputs)
    readers: dict[int, list[str]] = {}
    for name, users in graph.consumers.items():
        for node in users:
            readers.setdefault(id(node), []).append(name)
    edit = Edit(graph)
    for node in reversed(graph.nodes):
        if needed.isdisjoint(node.output):
            edit.remove(node)
        else:
            needed.update(readers.get(id(node), []))
    constant = graph.initializers.keys()
    unused = [i for i, tensor in enumerate(model.graph.initializer) if tensor.name not in needed]
    default = [i for i, value in enumerate(model.graph.input) if value.name in constant]
    changes = edit.commit() + len(unused) + len(default)
    for i in reversed(unused):
        del model.graph.initializer[i]
    for i in reversed(default):
        del model.graph.input[i]
    return changes


def until_stable(model: onnx.ModelProto, rules: Iterable[Rule], *, who: str) -> int:
    """Apply rules in order, with fresh shapes, until a whole round changes nothing. Gives the number of changes.

    Raises:
        BuildFailed: the rules never come to rest.
    """
    rules = tuple(rules)
    total, stale = 0, True
    for _ in range(MAX_ROUNDS):
        changes = 0
        for rule in rules:
            if stale:
                refresh_shapes(model)
            stale = bool(found := rule(model))
            changes += found
        total += changes
        if not changes:
            return total
    raise BuildFailed(who, f"the graph still changes after {MAX_ROUNDS} rounds; please report it")
