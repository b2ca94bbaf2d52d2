from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest

from hasten.errors import UnknownName
from hasten.graph.model import read_model
from hasten.passes.fold import Fold
from hasten.passes.quantize_dynamic import QuantizeDynamic
from hasten.testing.models import MODELS, convnet, encoder, mlp, random_samples, stored
from hasten.transform import run_pass


def outputs(artifact):
    session = onnxruntime.InferenceSession(str(artifact.entry))
    return session.run(None, dict(random_samples(artifact, n=256, seed=1).inputs))[0]


def fused_kinds(artifact, folder):
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "fused.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(str(artifact.entry), options)
    return Counter(node.op_type for node in onnx.load(folder / "fused.onnx").graph.node)


@pytest.mark.parametrize("name", MODELS)
def test_quantized_outputs_agree_with_float(name, store, ctx):
    source = run_pass(Fold(), stored(MODELS[name](), store), store, ctx)
    exact, got = outputs(source), outputs(run_pass(QuantizeDynamic(), source, store, ctx))
    assert (exact.argmax(1) == got.argmax(1)).mean() >= 0.95
    assert (exact * got).sum() / np.linalg.norm(exact) / np.linalg.norm(got) > 0.999


def test_onnx_runtime_fuses_every_product(store, ctx, tmp_path):
    kinds = fused_kinds(run_pass(QuantizeDynamic(), stored(mlp(), store), store, ctx), tmp_path)
    assert kinds["DynamicQuantizeMatMul"] == 3
    assert kinds["MatMulInteger"] == kinds["Gemm"] == kinds["Mul"] == 0


def test_an_input_of_several_products_is_quantized_once(store, ctx, tmp_path):
    source = run_pass(Fold(), stored(encoder(), store), store, ctx)
    kinds = fused_kinds(run_pass(QuantizeDynamic(), source, store, ctx), tmp_path)
    assert kinds["DynamicQuantizeLinear"] == 1
    assert kinds["MatMulIntegerToFloat"] == 3


def test_convolutions_stay_in_float(store, ctx):
    source = run_pass(Fold(), stored(convnet(), store), store, ctx)
    kinds = Counter(node.op_type for node in read_model(run_pass(QuantizeDynamic(), source, store, ctx)).graph.node)
    assert kinds["Conv"] == 4
    assert kinds["MatMulInteger"] == 1


def test_an_excluded_node_stays_in_float(store, ctx):
    made = run_pass(QuantizeDynamic(exclude=("gemm_0",)), stored(mlp(), store), store, ctx)
    kinds = Counter(node.op_type for node in read_model(made).graph.node)
    assert kinds["Gemm"] == 1
    assert kinds["MatMulInteger"] == 2


def test_an_unknown_node_to_exclude_is_an_error(store, ctx):
    with pytest.raises(UnknownName, match="no node is called 'head'"):
        run_pass(QuantizeDynamic(exclude=("head",)), stored(mlp(), store), store, ctx)


def test_the_result_is_marked_and_small(store, ctx):
    source = stored(mlp(features=256, hidden=256), store)
    made = run_pass(QuantizeDynamic(), source, store, ctx)
    assert made.traits == {"int8", "dynamic"}
    assert made.size_bytes < 0.3 * source.size_bytes


def test_convolutions_are_declined_with_the_operators_that_can(store):
    reason = QuantizeDynamic(operators=("Conv",)).why_not(stored(mlp(), store))
    assert reason == "'Conv' cannot be quantized at run time; operators that can: Gemm, MatMul"
