from collections import Counter
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from hasten.errors import UnknownName, Unsupported
from hasten.graph.model import Graph, read_model
from hasten.host import this_host
from hasten.passes import activations
from hasten.passes.fold import Fold
from hasten.passes.fuse import Fuse
from hasten.passes.placement import named
from hasten.passes.quantize_static import QuantizeStatic, needs_reduced_range
from hasten.testing.models import MODELS, Builder, convnet, encoder, mlp, random_samples, stored
from hasten.transform import run_pass

WHOLE = ("QuantizeLinear", "DequantizeLinear")


def folded(model, store, ctx):
    return run_pass(Fold(), stored(model, store), store, ctx)


def quantized(source, store, ctx, **settings):
    return run_pass(QuantizeStatic(**settings), source, store, replace(ctx, samples=random_samples(source)))


def outputs(artifact, n=256, seed=1):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(artifact.entry), options)
    return session.run(None, dict(random_samples(artifact, n=n, seed=seed).inputs))[0]


def fused_kinds(artifact, folder):
    """What ONNX Runtime makes of it."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    options.optimized_model_filepath = str(folder / "fused.onnx")
    onnxruntime.InferenceSession(str(artifact.entry), options)
    return Counter(node.op_type for node in onnx.load(folder / "fused.onnx").graph.node)


def cosine(a, b):
    return float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("observer", ["min-max", "percentile", "entropy", "mse"])
def test_quantized_outputs_agree_with_float(name, observer, store, ctx):
    source = folded(MODELS[name](), store, ctx)
    exact, got = outputs(source), outputs(quantized(source, store, ctx, observer=observer))
    assert (exact.argmax(1) == got.argmax(1)).mean() >= 0.95
    assert cosine(exact, got) > 0.99


def test_onnx_runtime_fuses_every_node_of_a_convnet(store, ctx, tmp_path):
    kinds = fused_kinds(quantized(folded(convnet(), store, ctx), store, ctx), tmp_path)
    assert kinds["QLinearConv"] == 4
    assert kinds["QLinearAdd"] == kinds["QLinearGlobalAveragePool"] == kinds["QGemm"] == 1
    assert kinds["Conv"] == kinds["Relu"] == kinds["Clip"] == kinds["DequantizeLinear"] == 0
    assert kinds["QuantizeLinear"] == 1  # the input


def test_onnx_runtime_fuses_every_product_of_an_mlp(store, ctx, tmp_path):
    kinds = fused_kinds(quantized(stored(mlp(), store), store, ctx), tmp_path)
    assert kinds == {"QuantizeLinear": 1, "QGemm": 3}


def test_an_encoder_keeps_sums_norms_and_attention_in_float(store, ctx, tmp_path):
    kinds = fused_kinds(quantized(folded(encoder(), store, ctx), store, ctx), tmp_path)
    assert kinds["MatMulIntegerToFloat"] == 6
    assert kinds["QLinearAdd"] == kinds["QLinearMatMul"] == kinds["DequantizeLinear"] == 0
    assert kinds["QuantizeLinear"] == 5  # x serves query, key and value at once


def test_attention_products_can_be_quantized_too(store, ctx):
    source = folded(encoder(), store, ctx)
    plain = read_model(quantized(source, store, ctx))
    more = quantized(source, store, ctx, attention=True)
    count = [sum(node.op_type == "QuantizeLinear" for node in m.graph.node) for m in (plain, read_model(more))]
    assert count[1] == count[0] + 4
    assert cosine(outputs(source), outputs(more)) > 0.99


def test_with_through_eight_bits_flow_on_from_matrix_products(store, ctx):
    source = run_pass(Fuse(), folded(encoder(), store, ctx), store, ctx)
    made = quantized(source, store, ctx, through=True)
    model = read_model(made)
    producer = {name: node.op_type for node in model.graph.node for name in node.output}
    residual = [
        node
        for node in model.graph.node
        if node.op_type == "Add" and all(producer.get(name) == "DequantizeLinear" for name in node.input)
    ]
    assert len(residual) == 2
    assert cosine(outputs(source), outputs(made)) > 0.99


def test_with_through_a_moved_value_is_not_quantized_again(store, ctx):
    model = read_model(quantized(folded(encoder(), store, ctx), store, ctx, through=True))
    producer = {name: node.op_type for node in model.graph.node for name in node.output}
    behind = {producer.get(node.input[0]) for node in model.graph.node if node.op_type == "QuantizeLinear"}
    assert not behind & {"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split", "Gather"}


def test_with_through_only_what_meets_weights_has_a_zero_point(store, ctx):
    step = QuantizeStatic(through=True)
    model = named(read_model(folded(encoder(), store, ctx)))
    placement = step.placement(model)
    scales = step.scales(placement, dict.fromkeys(placement.tensors, (-1.0, 2.0)))
    assert {name for name, scale in scales.items() if scale.zero_point} == set(placement.weighed)
    assert set(placement.weighed) < set(scales)


def test_openvino_computes_the_same_file_in_int8(store, ctx):
    openvino = pytest.importorskip("openvino")
    made = quantized(folded(convnet(), store, ctx), store, ctx)
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = openvino.Core().compile_model(str(made.entry), "CPU", settings)
    told = [op.get_rt_info() for op in compiled.get_runtime_model().get_ordered_ops()]
    ran = [i["runtimePrecision"].value for i in told if i["layerType"].value in ("Convolution", "FullyConnected")]
    assert len(ran) == 5
    assert set(ran) <= {"u8", "i8"}


def test_weights_are_stored_in_one_byte_each(store, ctx):
    source = stored(mlp(features=256, hidden=256), store)
    assert quantized(source, store, ctx).size_bytes < 0.3 * source.size_bytes


def test_the_result_is_marked_int8_and_not_quantized_twice(store, ctx):
    made = quantized(stored(mlp(), store), store, ctx)
    assert made.traits == {"int8"}
    assert QuantizeStatic().why_not(made) == "the model is quantized already"


def test_scales_by_channel_lose_less_than_one_for_all(store, ctx):
    net = Builder(0)
    rows = net.random.standard_normal((8, 16)) * np.geomspace(0.01, 1, 8)[:, None]
    net.add("Gemm", "x", net.constant(rows.astype(np.float32)), transB=1)
    source = stored(net.model(("x", ("batch", 16)), ("y", ("batch", 8))), store)
    exact = outputs(source)
    small = [
        np.abs(outputs(quantized(source, store, ctx, per_channel=per_channel)) - exact)[:, 0].mean()
        for per_channel in (True, False)
    ]
    assert small[0] < 0.1 * small[1]


@pytest.mark.parametrize("make", [mlp, convnet])
def test_bias_correction_makes_the_mean_error_smaller(make, store, ctx):
    # Weights of few bits by tensor and inputs away from zero: the error has a mean, as in real networks.
    source = folded(make(), store, ctx)
    samples = random_samples(source)
    shifted = replace(samples, inputs={name: array + np.float32(1.5) for name, array in samples.inputs.items()})
    exact = run(source, shifted)
    bias = []
    for correction in (True, False):
        step = QuantizeStatic(per_channel=False, reduce_range=True, bias_correction=correction)
        made = run_pass(step, source, store, replace(ctx, samples=shifted))
        bias.append(np.linalg.norm((run(made, shifted) - exact).mean(axis=0)))
    assert bias[0] < 0.7 * bias[1]


def run(artifact, samples):
    return onnxruntime.InferenceSession(str(artifact.entry)).run(None, dict(samples.inputs))[0]


def test_nothing_is_quantized_around_an_excluded_node(store, ctx):
    source = folded(convnet(), store, ctx)
    for node in read_model(source).graph.node:
        if node.op_type not in ("Conv", "Gemm"):
            continue
        graph = Graph(read_model(quantized(source, store, ctx, exclude=(node.name,))))
        kept = next(n for n in graph.model.graph.node if n.name == node.name)
        makers = [graph.producers[name].op_type for name in kept.input if name in graph.producers]
        assert "DequantizeLinear" not in makers
        assert kept.input[1] in graph.initializers


def test_excluding_every_node_leaves_nothing_quantized(store, ctx):
    source = folded(convnet(), store, ctx)
    names = tuple(node.name for node in read_model(source).graph.node)
    made = read_model(quantized(source, store, ctx, exclude=names))
    assert not [node for node in made.graph.node if node.op_type in WHOLE]


def test_an_unknown_node_to_exclude_is_an_error_with_the_nearest(store, ctx):
    source = stored(mlp(), store)
    with pytest.raises(UnknownName, match="did you mean 'gemm_0'"):
        quantized(source, store, ctx, exclude=("gem_0",))


def test_batch_norm_behind_a_convolution_is_to_be_folded_first(store):
    reason = QuantizeStatic().why_not(stored(convnet(), store))
    assert reason is not None
    assert "fold batch-norm first" in reason


def test_a_model_without_weights_is_declined(store):
    net = Builder(0)
    net.add("Relu", "x")
    reason = QuantizeStatic().why_not(stored(net.model(("x", ("batch", 4)), ("y", ("batch", 4))), store))
    assert reason == "it has no Conv or Gemm or MatMul with constant float32 weights"


def test_without_samples_it_says_what_to_give(store, ctx):
    with pytest.raises(Unsupported, match="--data"):
        run_pass(QuantizeStatic(), stored(mlp(), store), store, ctx)


def test_a_dead_channel_with_a_large_bias_does_not_overflow(store, ctx):
    model = mlp()
    first = model.graph.node[0]
    for tensor in model.graph.initializer:
        value = numpy_helper.to_array(tensor).copy()
        if tensor.name == first.input[1]:
            value[3] = 1e-12
        if tensor.name == first.input[2]:
            value[3] = 5.0
        tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    source = stored(model, store)
    assert cosine(outputs(source), outputs(quantized(source, store, ctx))) > 0.999


def test_a_quantized_graph_output_keeps_its_name(store, ctx):
    net = Builder(0)
    net.add("Conv", "x", net.weight(4, 3, 3, 3), pads=[1] * 4)
    source = stored(net.model(("x", ("batch", 3, 8, 8)), ("y", ("batch", 4, 8, 8))), store)
    made = quantized(source, store, ctx)
    assert made.signature == source.signature
    assert cosine(outputs(source), outputs(made)) > 0.999


def test_concatenated_tensors_share_one_scale(store, ctx):
    net = Builder(0)
    a = net.add("Relu", net.add("Conv", "x", net.weight(4, 3, 1, 1)))
    b = net.add("Relu", net.add("Conv", "x", net.weight(4, 3, 1, 1, scale=4.0)))
    net.add("Conv", net.add("Concat", a, b, axis=1), net.weight(2, 8, 1, 1))
    source = stored(net.model(("x", ("batch", 3, 8, 8)), ("y", ("batch", 2, 8, 8))), store)
    graph = Graph(read_model(quantized(source, store, ctx)))
    concat = next(node for node in graph.model.graph.node if node.op_type == "Concat")
    around = [graph.producers[name] for name in concat.input] + graph.consumers[concat.output[0]]
    assert len({float(graph.constant(node.input[1])) for node in around}) == 1


def test_a_model_of_one_fixed_batch_size_is_calibrated_too(store, ctx):
    net = Builder(0)
    net.add("Gemm", "x", net.weight(4, 16), transB=1)
    source = stored(net.model(("x", (3, 16)), ("y", (3, 4))), store)
    made = run_pass(QuantizeStatic(), source, store, replace(ctx, samples=random_samples(source, n=7)))
    assert made.traits == {"int8"}


def test_tensors_of_a_fixed_size_are_laid_into_groups_without_reading_them_all_at_once(store, ctx, monkeypatch):
    """The first run, which tells sizes that nobody wrote down, would hold every tensor of the whole batch."""
    asked = []
    opened = activations.Reference.open

    def counted(model, names, context):
        asked.append(len(names))
        return opened(model, names, context)

    monkeypatch.setattr(activations.Reference, "open", counted)
    monkeypatch.setattr(activations, "BATCH_BYTES", 1 << 14)
    model = convnet()
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 2
    source = stored(model, store)
    names = [node.output[0] for node in model.graph.node[:-1]]
    samples = random_samples(source, n=4)
    seen = {name for found, _ in activations.observe(model, names, samples, ctx) for name in found}
    assert seen == set(names)
    assert max(asked) < len(names)


def test_nodes_without_names_are_quantized(store, ctx):
    model = mlp()
    for node in model.graph.node:
        node.name = ""
    source = stored(model, store)
    assert cosine(outputs(source), outputs(quantized(source, store, ctx))) > 0.99


def test_symmetric_int8_activations_have_no_zero_point(store, ctx):
    graph = Graph(read_model(quantized(stored(mlp(), store), store, ctx, activations="int8")))
    points = [graph.constant(n.input[2]) for n in graph.model.graph.node if n.op_type == "QuantizeLinear"]
    assert points
    assert all(p.dtype == np.int8 and p == 0 for p in points)


def test_a_bias_has_the_scale_of_input_times_weight(store, ctx):
    graph = Graph(read_model(quantized(stored(mlp(), store), store, ctx)))
    gemm = next(node for node in graph.model.graph.node if node.op_type == "Gemm")
    x, w, b = (graph.constant(graph.producers[name].input[1]) for name in gemm.input)
    np.testing.assert_allclose(b, x * w, rtol=1e-6)
    assert graph.constant(graph.producers[gemm.input[2]].input[0]).dtype == np.int32


@pytest.mark.parametrize(
    ("flags", "reduced"),
    [(("avx2", "avx512f"), True), (("avx2", "avx512f", "avx512_vnni"), False), (("avx2", "avx_vnni"), False)],
)
def test_weights_lose_a_bit_where_16_bit_sums_would_saturate(flags, reduced):
    assert needs_reduced_range(replace(this_host(), flags=flags)) is reduced


def test_an_arm_processor_keeps_all_bits():
    assert not needs_reduced_range(replace(this_host(), flags=("asimd", "asimddp")))


def test_reduced_weights_have_seven_bits(store, ctx):
    graph = Graph(read_model(quantized(stored(mlp(), store), store, ctx, reduce_range=True)))
    weights = [numpy_helper.to_array(t) for t in graph.model.graph.initializer if t.data_type == onnx.TensorProto.INT8]
    assert max(int(np.abs(w.astype(int)).max()) for w in weights) == 63


def test_two_nodes_may_share_their_weights(store, ctx):
    net = Builder(0)
    shared = net.weight(8, 8)
    net.add("MatMul", net.add("Relu", net.add("MatMul", "x", shared)), shared)
    source = stored(net.model(("x", ("batch", 8)), ("y", ("batch", 8))), store)
    assert cosine(outputs(source), outputs(quantized(source, store, ctx))) > 0.99


def test_a_grouped_transposed_convolution_can_be_quantized(store, ctx):
    net = Builder(0)
    h = net.add("ConvTranspose", "x", net.weight(4, 3, 2, 2), net.weight(6, scale=0.1), group=2, strides=[2, 2])
    net.add("Conv", net.add("Relu", h), net.weight(2, 6, 1, 1))
    source = stored(net.model(("x", ("batch", 4, 5, 5)), ("y", ("batch", 2, 10, 10))), store)
    made = quantized(source, store, ctx, operators=("Conv", "ConvTranspose"))
    assert cosine(outputs(source), outputs(made)) > 0.99


def test_the_places_of_a_poolings_maxima_are_no_activations(store, ctx):
    """As a SegNet has them: its decoder puts values back where they were."""

    def build(net: Builder) -> None:
        h = net.add("Relu", net.add("Conv", "x", net.weight(8, 3, 3, 3), net.weight(8), pads=[1] * 4))
        net.nodes.append(helper.make_node("MaxPool", [h], ["p", "places"], kernel_shape=[2, 2], strides=[2, 2]))
        h = net.add("Relu", net.add("Conv", "p", net.weight(8, 8, 3, 3), net.weight(8), pads=[1] * 4))
        h = net.add("MaxUnpool", h, "places", kernel_shape=[2, 2], strides=[2, 2])
        net.add("Conv", h, net.weight(4, 8, 1, 1), net.weight(4))

    net = Builder(0)
    build(net)
    net.nodes[-1].output[0] = "y"
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ("b", c, 8, 8)) for n, c in (("x", 3), ("y", 4))]
    graph = helper.make_graph(net.nodes, "net", ends[:1], ends[1:], net.weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=8)
    source = folded(model, store, ctx)
    made = quantized(source, store, ctx)
    assert all("places" not in node.input for node in read_model(made).graph.node if node.op_type == "QuantizeLinear")
    assert cosine(outputs(source), outputs(made)) > 0.99
