from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from operator_cases import CASES, Case, Draw

torch = pytest.importorskip("torch")

from hasten.errors import Unsupported  # noqa: E402
from hasten.tensors import relative_error  # noqa: E402
from hasten.torchview.arrays import to_numpy, to_torch  # noqa: E402
from hasten.torchview.operators import OPERATORS, OTHERS  # noqa: E402
from hasten.torchview.view import View  # noqa: E402


def answers(made: Case):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    model = made.model().SerializeToString()
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"]).run(None, made.feed())


def test_every_operator_of_the_table_has_a_case():
    others = (f"{domain}.{kind}" for domain, table in OTHERS.items() for kind in table)
    assert {*OPERATORS, *others} == set(CASES)


@pytest.mark.parametrize("kind", CASES)
@given(data=st.data())
@settings(max_examples=12, deadline=None, derandomize=True)
def test_the_view_agrees_with_onnx_runtime(kind, data):
    made = CASES[kind](Draw(data))
    view = View.of(made.model()).eval()
    with torch.no_grad():
        got = [to_numpy(value) for value in view(*(to_torch(made.feed()[name]) for name in view.inputs))]
    for reference, array in zip(answers(made), got, strict=True):
        assert array.dtype == reference.dtype
        assert relative_error(reference, array) < made.tolerance


@pytest.mark.parametrize("kind", CASES)
@given(data=st.data())
@settings(max_examples=2, deadline=None, derandomize=True)
def test_gradients_are_those_of_finite_differences(kind, data):
    made = CASES[kind](Draw(data))
    view = View.of(made.model()).double().eval()
    names = [name for name, _ in view.named_parameters()]
    inputs = [to_torch(made.feed()[name]) for name in view.inputs]
    inputs = [t.double().requires_grad_() if t.is_floating_point() else t for t in inputs]
    weights = [p.detach().clone().requires_grad_() for p in view.parameters()]
    if not made.smooth or not any(t.requires_grad for t in (*inputs, *weights)):
        return

    def run(*tensors):
        given_weights = dict(zip(names, tensors[len(inputs) :], strict=True))
        made_outputs = torch.func.functional_call(view, given_weights, tuple(tensors[: len(inputs)]))
        return tuple(y for y in made_outputs if y.requires_grad)

    if run(*inputs, *weights):
        assert torch.autograd.gradcheck(run, (*inputs, *weights), fast_mode=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU and PyTorch with CUDA")
@pytest.mark.filterwarnings("ignore:RNN module weights")
@pytest.mark.parametrize("kind", CASES)
@given(data=st.data())
@settings(max_examples=4, deadline=None, derandomize=True)
def test_the_view_agrees_with_itself_on_a_gpu(kind, data):
    made = CASES[kind](Draw(data))
    view = View.of(made.model()).eval()
    inputs = [to_torch(made.feed()[name]) for name in view.inputs]
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        here = [to_numpy(value) for value in view(*inputs)]
        there = [to_numpy(value.cpu()) for value in view.to("cuda")(*(value.to("cuda") for value in inputs))]
    for reference, array in zip(here, there, strict=True):
        assert array.dtype == reference.dtype
        assert relative_error(reference, array) < max(made.tolerance, 1e-4)


def refused(model) -> str:
    with pytest.raises(Unsupported) as caught:
        View.of(model)
    return str(caught.value)


def one(kind, inputs=("x",), weights=(), domain="", opset=20, outputs=("y",), **attributes):
    """Make a model of one node named ``here``."""
    node = helper.make_node(kind, inputs, outputs, name="here", domain=domain, **attributes)
    given = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3, 4, 4])]
    made = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    constants = [numpy_helper.from_array(value, name) for name, value in weights]
    graph = helper.make_graph([node], "net", given, made, constants)
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.example", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def test_an_operator_that_the_table_lacks_is_refused_by_its_node():
    assert refused(one("Strange", domain="com.example")) == (
        "trainable view: node 'here' (com.example.Strange) is no operator of the table; it cannot be trained"
    )
    assert "node 'here' (Det)" in refused(one("Det"))


def test_an_attribute_that_the_table_lacks_is_refused_by_its_name():
    broadcast = one("Add", ("x", "w"), [("w", np.ones(3, np.float32))], opset=6, broadcast=1, axis=1)
    assert "node 'here' (Add) has the attribute 'axis'" in refused(broadcast)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (one("Cast", to=TensorProto.STRING), "casts to element type 8"),
        (
            one(
                "Resize",
                ("x", "", "s"),
                [("s", np.ones(4, np.float32))],
                coordinate_transformation_mode="tf_crop_and_resize",
            ),
            "tf_crop_and_resize",
        ),
        (one("MaxPool", outputs=("y", "i"), kernel_shape=[2, 2], storage_order=1), "storage_order"),
        (one("Conv", ("x", "w"), [("w", np.ones((1, 3, 1, 1), np.float32))], auto_pad="SOME"), "'SOME'"),
        (one("Pad", ("x", "p"), [("p", np.zeros(8, np.int64))], mode="mirror"), "'mirror'"),
        (one("Dropout", outputs=("y", "mask")), "mask"),
        (
            one(
                "BatchNormalization",
                ("x", "s", "s", "s", "s"),
                [("s", np.ones(3, np.float32))],
                outputs=("y", "m", "v"),
                training_mode=1,
            ),
            "running statistics",
        ),
        (
            one(
                "DequantizeLinear",
                ("q", "s"),
                [("q", np.zeros((2, 2), np.int8)), ("s", np.ones((2, 2), np.float32))],
                opset=21,
                block_size=1,
            ),
            "block_size",
        ),
    ],
)
def test_a_form_that_would_be_a_guess_is_refused(model, words):
    message = refused(model)
    assert "node 'here'" in message
    assert words in message


def test_a_node_with_a_graph_inside_is_refused():
    branch = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["z"])], "b", [], [helper.make_value_info("z", onnx.TypeProto())]
    )
    condition = [("c", np.array(True))]
    model = one("If", ("c",), condition, then_branch=branch, else_branch=branch)
    assert "node 'here' (If) holds a graph of its own" in refused(model)
