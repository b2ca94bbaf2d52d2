from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper

from hasten.graph.constants import NEVER, NO_LARGER, evaluate
from hasten.graph.model import Graph
from hasten.graph.patterns import polynomial, same_polynomial, scalar, source_of
from hasten.testing.models import Builder


def graph_of(build) -> tuple[Graph, str]:
    net = Builder(0)
    result = build(net)
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ("b",)) for name in ("x", "t")]
    outputs = [helper.make_tensor_value_info(result, TensorProto.FLOAT, ("b",))]
    model = helper.make_model(helper.make_graph(net.nodes, "g", values, outputs, net.weights))
    return Graph(model), result


def n(net: Builder, value: float) -> str:
    return net.constant(np.float32(value))


SPELLINGS = {
    "2 x + 2": lambda net: net.add("Mul", n(net, 2), net.add("Add", "x", n(net, 1))),
    "x + x + 2": lambda net: net.add("Add", net.add("Add", "x", "x"), n(net, 2)),
    "(x + 1) / 0.5": lambda net: net.add("Div", net.add("Add", n(net, 1), "x"), n(net, 0.5)),
    "-(-2 - 2 x)": lambda net: net.add("Neg", net.add("Sub", n(net, -2), net.add("Mul", "x", n(net, 2)))),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_polynomial_is_the_same_however_it_is_written(spelling):
    graph, result = graph_of(SPELLINGS[spelling])
    assert same_polynomial(polynomial(graph, result, ("x",)), {(1,): 2.0, (0,): 2.0})


def test_powers_and_two_atoms():
    graph, result = graph_of(lambda net: net.add("Mul", net.add("Pow", "x", n(net, 3)), net.add("Add", "t", n(net, 1))))
    assert same_polynomial(polynomial(graph, result, ("x", "t")), {(3, 1): 1.0, (3, 0): 1.0})


@pytest.mark.parametrize(
    "build",
    [
        lambda net: net.add("Exp", "x"),
        lambda net: net.add("Pow", "x", n(net, 0.5)),
        lambda net: net.add("Div", n(net, 1), "x"),
        lambda net: net.add("Add", "x", net.weight(3)),
        lambda net: net.add("Add", "x", "t"),
    ],
)
def test_what_is_no_polynomial_in_the_atoms_is_none(build):
    graph, result = graph_of(build)
    assert polynomial(graph, result, ("x",)) is None


def test_coefficients_may_differ_by_the_rounding_of_float32_only():
    assert same_polynomial({(1,): 0.70710677}, {(1,): 0.5**0.5})
    assert not same_polynomial({(1,): 0.7070}, {(1,): 0.5**0.5})


def test_the_tensors_behind_arithmetic_come_from_near_to_far():
    graph, result = graph_of(lambda net: net.add("Mul", net.add("Add", net.add("Exp", "x"), n(net, 1)), n(net, 2)))
    assert list(source_of(graph, result)) == [result, graph.nodes[1].output[0], graph.nodes[0].output[0]]


def test_a_scalar_is_a_constant_of_one_element():
    graph, _ = graph_of(
        lambda net: net.add("Sum", net.constant(np.array([[3]], np.float32)), net.weight(2), net.constant(np.int64(4)))
    )
    assert [scalar(graph, name) for name in graph.nodes[0].input] == [3.0, None, 4.0]
    assert scalar(graph, "x") is None


def test_no_operator_is_both_never_computed_and_known_to_be_small():
    assert not NEVER.keys() & NO_LARGER


def test_an_optional_input_that_is_absent_is_none():
    clip = helper.make_node("Clip", ["x", "", "high"], ["y"])
    assert evaluate(clip, [np.array([-5.0, 5.0]), None, np.array(1.0)], 20)[0].tolist() == [-5.0, 1.0]


def test_the_shortcut_for_transpose_does_what_the_definition_says():
    x = np.arange(24).reshape(2, 3, 4)
    assert evaluate(helper.make_node("Transpose", ["x"], ["y"]), [x], 20)[0].shape == (4, 3, 2)
    assert evaluate(helper.make_node("Transpose", ["x"], ["y"], perm=[1, 0, 2]), [x], 20)[0].shape == (3, 2, 4)
