import numpy as np
import onnxruntime
import pytest

torch = pytest.importorskip("torch")

from hasten.errors import SignatureMismatch, Unsupported  # noqa: E402
from hasten.samples import Samples  # noqa: E402
from hasten.testing.models import MODELS, Builder, random_samples, stored  # noqa: E402
from hasten.torchview.checks import check_rows_independent, outputs_of  # noqa: E402
from hasten.torchview.view import View  # noqa: E402


def samples(n=40, features=8):
    return Samples({"x": np.random.default_rng(0).standard_normal((n, features)).astype(np.float32)})


def across_the_batch(kind):
    """x [batch, 8] -> y [batch, 8] in which samples touch each other."""
    net = Builder(0)
    h = net.add("MatMul", "x", net.weight(8, 8))
    axis = net.constant(np.array([0], np.int64))
    if kind == "norm":  # batch-norm as it is exported in training mode
        h = net.add("Sub", h, net.add("ReduceMean", h, axis))
    else:
        h = net.add("Div", h, net.add("ReduceSum", net.add("Abs", h), axis))
    net.add("Identity", h)
    return View.of(net.model(("x", ("batch", 8)), ("y", ("batch", 8))))


@pytest.mark.parametrize("name", MODELS)
def test_ordinary_networks_pass(name, store):
    source = stored(MODELS[name](), store)
    check_rows_independent(View.of(MODELS[name]()), random_samples(source), seed=3)


@pytest.mark.parametrize("kind", ["norm", "sum"])
def test_a_model_that_mixes_samples_is_refused_by_the_name_of_its_output(kind):
    with pytest.raises(Unsupported, match=r"output 'y' of a sample changes by .* export the model in evaluation mode"):
        check_rows_independent(across_the_batch(kind), samples())


def test_an_output_without_a_row_for_each_sample_is_refused():
    net = Builder(0)
    net.add("ReduceMean", net.add("MatMul", "x", net.weight(8, 4)), net.constant(np.array([0], np.int64)), keepdims=0)
    view = View.of(net.model(("x", ("batch", 8)), ("y", (4,))))
    with pytest.raises(Unsupported, match=r"output 'y' is \[4\] for 16 samples: it has none for each"):
        check_rows_independent(view, samples())


def test_a_graph_of_one_batch_length_is_refused_with_what_to_do():
    net = Builder(0)
    h = net.add("Reshape", net.add("MatMul", "x", net.weight(8, 4)), net.constant(np.array([1, 4], np.int64)))
    net.add("MatMul", h, net.weight(4, 4))
    view = View.of(net.model(("x", (1, 8)), ("y", (1, 4))))
    with pytest.raises(Unsupported, match=r"cannot take a batch of 16 .* export it with an open batch axis"):
        check_rows_independent(view, samples())


def test_a_graph_whose_batch_length_is_declared_only_passes():
    net = Builder(0)
    net.add("MatMul", "x", net.weight(8, 4))
    check_rows_independent(View.of(net.model(("x", (1, 8)), ("y", (1, 4)))), samples())


def test_a_graph_without_weights_is_looked_at_too():
    net = Builder(0)
    net.add("Relu", "x")
    check_rows_independent(View.of(net.model(("x", ("batch", 8)), ("y", ("batch", 8)))), samples())


def test_a_missing_input_is_named():
    with pytest.raises(SignatureMismatch, match="the samples have no input 'x'; they have"):
        check_rows_independent(across_the_batch("norm"), Samples({"other": np.zeros((4, 8), np.float32)}))


def test_text_is_refused():
    net = Builder(0)
    net.add("MatMul", "x", net.weight(8, 4))
    view = View.of(net.model(("x", ("batch", 8)), ("y", ("batch", 4))))
    with pytest.raises(Unsupported, match="input 'x' is text"):
        outputs_of(view, Samples({"x": np.full((4, 8), "a")}))


@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_those_of_onnx_runtime_whatever_the_batch(name, store):
    source = stored(MODELS[name](), store)
    given = random_samples(source, n=21)
    expected = onnxruntime.InferenceSession(str(source.entry)).run(["y"], dict(given.inputs))[0]
    view = View.of(MODELS[name]())
    for batch in (4, 21, 64):
        got = outputs_of(view, given, batch)
        assert list(got) == ["y"]
        np.testing.assert_allclose(got["y"], expected, rtol=1e-4, atol=1e-4)
    assert view.training
