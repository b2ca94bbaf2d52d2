"""Recognising what a piece of graph computes, however it was written."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping

import onnx

from hasten.graph.model import Graph, attribute

Polynomial = Mapping[tuple[int, ...], float]
"""Coefficient by the exponents of each atom: with atoms x, t, {(1, 0): 0.5, (1, 1): 0.5} is 0.5 x + 0.5 x t."""

CLOSE = 3e-5
"""Relative difference up to which two coefficients are one: float32 constants, some written with six digits."""

DEEPEST = 12
"""Arithmetic nested deeper than this is none of the known activations."""


def scalar(graph: Graph, name: str) -> float | None:
    """Give the value of a constant of one element, else None."""
    tensor = graph.initializers.get(name)
    if tensor is None or math.prod(tensor.dims) != 1:
        return None
    value = graph.constant(name)
    return None if value is None or value.dtype.kind not in "fiu" else float(value.reshape(-1)[0])


def polynomial(graph: Graph, name: str, atoms: tuple[str, ...], depth: int = DEEPEST) -> Polynomial | None:
    """Read the arithmetic behind a tensor as a polynomial in the tensors ``atoms``; None where it is none.

    Knows Add, Sub, Mul, Neg, division by a constant, and Pow to a small whole power, of one-element constants.
    """
    if name in atoms:
        return {tuple(int(atom == name) for atom in atoms): 1.0}
    if (value := scalar(graph, name)) is not None:
        return {(0,) * len(atoms): value}
    node = graph.producer(name, "Add", "Sub", "Mul", "Div", "Pow", "Neg")
    if node is None or depth == 0:
        return None
    a = polynomial(graph, node.input[0], atoms, depth - 1)
    if a is None or node.op_type == "Neg":
        return None if a is None else _times(a, {(0,) * len(atoms): -1.0})
    if node.op_type in ("Div", "Pow"):
        return _by_constant(node.op_type, a, scalar(graph, node.input[1]), len(atoms))
    b = polynomial(graph, node.input[1], atoms, depth - 1)
    if b is None:
        return None
    return _times(a, b) if node.op_type == "Mul" else _plus(a, b, 1.0 if node.op_type == "Add" else -1.0)


def same_polynomial(a: Polynomial | None, b: Polynomial) -> bool:
    """Tell whether two polynomials agree, coefficient by coefficient."""
    if a is None:
        return False
    return all(math.isclose(a.get(key, 0.0), b.get(key, 0.0), rel_tol=CLOSE, abs_tol=1e-9) for key in {*a, *b})


def source_of(graph: Graph, name: str, depth: int = DEEPEST) -> Iterator[str]:
    """Give the tensors, from near to far, that could be the only variable behind a piece of arithmetic."""
    yield name
    node = graph.producer(name, "Add", "Sub", "Mul", "Div", "Pow", "Neg")
    if node is None or depth == 0:
        return
    inputs = [item for item in dict.fromkeys(node.input) if scalar(graph, item) is None]
    seen = {name}
    for item in inputs:
        for found in source_of(graph, item, depth - 1):
            if found not in seen:
                seen.add(found)
                yield found


def users_above(graph: Graph, name: str, levels: int) -> Iterator[onnx.NodeProto]:
    """Give the arithmetic nodes that use a tensor, directly or through up to ``levels`` others, nearest first."""
    near = [name]
    for _ in range(levels):
        users = [
            node for item in near for node in graph.consumers.get(item, []) if node.op_type in ("Add", "Mul", "Div")
        ]
        yield from users
        near = [node.output[0] for node in users]


def split_constant(graph: Graph, node: onnx.NodeProto) -> tuple[str, str] | None:
    """Give (variable, constant) of a node with one constant input of two, in either order; else None."""
    if len(node.input) != 2:
        return None
    first, second = (name in graph.initializers for name in node.input)
    if first == second:
        return None
    return (node.input[1], node.input[0]) if first else (node.input[0], node.input[1])


def reduced_axes(graph: Graph, node: onnx.NodeProto) -> list[int] | None:
    """Give the axes of a Reduce node with kept dimensions (attribute or input), or None where they are not known."""
    if not attribute(node, "keepdims", 1):
        return None
    axes = attribute(node, "axes")
    if axes is None and len(node.input) > 1 and node.input[1]:
        value = graph.constant(node.input[1])
        return None if value is None else [int(axis) for axis in value.reshape(-1)]
    return list(axes) if isinstance(axes, list) else None


def _by_constant(kind: str, a: Polynomial, value: float | None, atoms: int) -> Polynomial | None:
    if value is None or (kind == "Div" and value == 0):
        return None
    if kind == "Div":
        return _times(a, {(0,) * atoms: 1 / value})
    if value not in (1.0, 2.0, 3.0):
        return None
    result: Polynomial = {(0,) * atoms: 1.0}
    for _ in range(int(value)):
        result = _times(result, a)
    return result


def _times(a: Polynomial, b: Polynomial) -> Polynomial:
    result: Counter[tuple[int, ...]] = Counter()
    for p, x in a.items():
        for q, y in b.items():
            result[tuple(m + n for m, n in zip(p, q, strict=True))] += x * y  # type: ignore[assignment]
    return dict(result)


def _plus(a: Polynomial, b: Polynomial, sign: float) -> Polynomial:
    return {key: a.get(key, 0.0) + sign * b.get(key, 0.0) for key in {*a, *b}}
