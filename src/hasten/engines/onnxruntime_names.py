"""The same names in every build: ONNX Runtime numbers what it adds in an order that differs from run to run."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx

TOKEN = re.compile(r"_token_\d+$")
"""What ONNX Runtime appends to a name that is taken: the number depends on the addresses of its nodes."""


def settle_names(path: Path) -> None:
    """Number the names that ONNX Runtime made up by their place in the graph, in the file it wrote. Changes no more."""
    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    fixed = {value.name for value in (*graph.input, *graph.output)}
    tensors = _renumbered((name for node in graph.node for name in (*node.input, *node.output)), fixed)
    nodes = _renumbered((node.name for node in graph.node), set())
    for node in graph.node:
        node.name = nodes.get(node.name, node.name)
    for inner in all_nodes(graph):
        for field in (inner.input, inner.output):
            field[:] = [tensors.get(name, name) for name in field]
    for item in (*graph.initializer, *graph.value_info):
        item.name = tensors.get(item.name, item.name)
    path.write_bytes(model.SerializeToString(deterministic=True))


def _renumbered(names: Iterable[str], fixed: set[str]) -> dict[str, str]:
    """Map each numbered name, and the first of its family that has no number, to a number by appearance."""
    order = list(dict.fromkeys(name for name in names if name and name not in fixed))
    families = {TOKEN.sub("", name) for name in order if TOKEN.search(name)}
    found: dict[str, str] = {}
    counts = dict.fromkeys(families, 0)
    for name in order:
        family = TOKEN.sub("", name)
        if family in families:
            while f"{family}_token_{counts[family]}" in fixed:
                counts[family] += 1
            found[name] = f"{family}_token_{counts[family]}"
            counts[family] += 1
    return found


def name_nodes(path: Path) -> None:
    """Give each node without a name one by its place, in the file: what is told of a node is told by its name."""
    model = onnx.load(path, load_external_data=False)
    for place, node in enumerate(all_nodes(model.graph)):
        node.name = node.name or f"{node.op_type}#{place}"
    path.write_bytes(model.SerializeToString(deterministic=True))


def all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Give the nodes of a graph, and of the graphs in them, in the order they stand."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else ())):
                yield from all_nodes(inner)
