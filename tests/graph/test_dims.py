from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from hasten.graph.dims import Known, Shapes
from hasten.graph.model import Graph, refresh_shapes


class Net:
    """Nodes on x [batch, 3, length, 4]."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def c(self, value: object, dtype: type = np.int64) -> str:
        self.constants.append(numpy_helper.from_array(np.array(value, dtype), f"c{len(self.constants)}"))
        return self.constants[-1].name

    def __call__(self, kind: str, *inputs: str, **attributes: object) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [f"t{len(self.nodes)}"], **attributes))
        return str(self.nodes[-1].output[0])

    def value(self, name: str) -> Known | None:
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ("batch", 3, "length", 4))
        y = helper.make_tensor_value_info(name, TensorProto.INT64, None)
        graph = helper.make_graph(self.nodes, "g", [x], [y], self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
        refresh_shapes(model)
        return Shapes(Graph(model)).value(name)


@pytest.fixture
def net() -> Net:
    return Net()


@pytest.fixture
def shape(net: Net) -> str:
    return net("Shape", "x")


def test_a_shape_has_numbers_and_names(net, shape):
    assert net.value(shape) == Known(("batch", 3, "length", 4))


@pytest.mark.parametrize(
    ("ends", "wanted"), [({"start": 1}, (3, "length", 4)), ({"start": -2, "end": -1}, ("length",)), ({"end": 0}, ())]
)
def test_a_part_of_a_shape(net, ends, wanted):
    assert net.value(net("Shape", "x", **ends)) == Known(wanted)


@pytest.mark.parametrize(
    ("index", "wanted"), [(1, Known((3,), scalar=True)), ([-1, 0], Known((4, "batch"))), (9, None)]
)
def test_gathered_entries(net, shape, index, wanted):
    assert net.value(net("Gather", shape, net.c(index))) == wanted


@pytest.mark.parametrize(
    ("start", "end", "wanted"), [(1, 3, (3, "length")), (-2, 2**62, ("length", 4)), (-(2**63), 1, ("batch",))]
)
def test_sliced_entries(net, shape, start, end, wanted):
    assert net.value(net("Slice", shape, net.c([start]), net.c([end]))) == Known(wanted)


def test_joined_entries(net, shape):
    first = net("Slice", shape, net.c([0]), net.c([1]))
    assert net.value(net("Concat", first, net.c([12, -1]), axis=0)) == Known(("batch", 12, -1))


def test_products_keep_their_names_and_do_not_mind_the_order(net, shape):
    batch, length = (net("Gather", shape, net.c(i)) for i in (0, 2))
    both = [net("Mul", batch, length), net("Mul", length, batch)]
    wide = net("Mul", net("Gather", shape, net.c(1)), net("Gather", shape, net.c(3)))
    assert net.value(both[0]) == net.value(both[1]) == Known(("batch*length",), scalar=True)
    assert net.value(wide) == Known((12,), scalar=True)


@pytest.mark.parametrize(("a", "b", "wanted"), [(7, 2, 3), (-7, 2, -3), (7, -2, -3), (6, 3, 2)])
def test_division_goes_towards_zero(net, a, b, wanted):
    assert net.value(net("Div", net.c(a), net.c(b))) == Known((wanted,), scalar=True)


def test_division_by_zero_is_not_known(net):
    assert net.value(net("Div", net.c(1), net.c(0))) is None


def test_what_is_taken_from_itself_is_zero_and_other_sums_of_names_are_not_known(net, shape):
    batch = net("Gather", shape, net.c(0))
    assert net.value(net("Sub", batch, batch)) == Known((0,), scalar=True)
    assert net.value(net("Add", batch, net.c(1))) is None


def test_a_scalar_becomes_a_list_and_back(net, shape):
    scalar = net("Gather", shape, net.c(0))
    listed = net("Unsqueeze", scalar, net.c([0]))
    assert net.value(listed) == net.value(net("Reshape", scalar, net.c([-1]))) == Known(("batch",))
    assert net.value(net("Squeeze", listed)) == Known(("batch",), scalar=True)


def test_a_cast_to_float_is_no_shape_any_more(net, shape):
    assert net.value(net("Cast", shape, to=TensorProto.INT32)) == Known(("batch", 3, "length", 4))
    assert net.value(net("Cast", shape, to=TensorProto.FLOAT)) is None


def test_pads_turned_round_as_a_matrix_are_known(net, shape):
    """What torch's older exporter writes for F.pad: pairs from the last axis on become all begins, then all ends."""
    width = net("Unsqueeze", net("Gather", shape, net.c(3)), net.c([0]))
    zeros = net("ConstantOfShape", net.c([6]), value=numpy_helper.from_array(np.array([0])))
    pairs = net("Reshape", net("Concat", net.c([1]), width, zeros, axis=0), net.c([-1, 2]))
    turned = net("Slice", pairs, net.c([-1]), net.c([-(2**63) + 1]), net.c([0]), net.c([-1]))
    rows = net("Transpose", turned, perm=[1, 0])
    assert net.value(net("Reshape", rows, net.c([-1]))) == Known((0, 0, 0, 1, 0, 0, 0, 4))
    assert net.value(pairs) is None  # a matrix is no shape


@pytest.mark.parametrize(
    ("start", "end", "axes", "steps", "wanted"),
    [
        ([3], [0], [0], [-2], (4, 3)),
        ([0], [9], [-1], [3], ("batch", 4)),
        ([0], [9], [1], [1], None),
        ([0], [9], [0], [0], None),
        ([0, 1], [9], [0], [1], None),
    ],
)
def test_entries_sliced_by_steps(net, shape, start, end, axes, steps, wanted):
    got = net.value(net("Slice", shape, *(net.c(given) for given in (start, end, axes, steps))))
    assert got == (None if wanted is None else Known(wanted))


def test_a_reshape_that_does_not_fit_is_not_known(net, shape):
    assert net.value(net("Reshape", shape, net.c([3]))) is None
    assert net.value(net("Reshape", shape, net.c([3, -1]))) is None
    assert net.value(net("Reshape", shape, net.c([4]))) == Known(("batch", 3, "length", 4))


def test_long_integer_tensors_are_data(net):
    assert net.value(net.c(range(65))) is None
