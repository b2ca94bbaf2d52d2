from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

import onnxruntime
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_cases import CASES, Case, Draw

from hasten.tensors import relative_error
from hasten.torchview.arrays import to_numpy, to_torch
from hasten.torchview.operators import OPERATORS, OTHERS
from hasten.torchview.view import View


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
