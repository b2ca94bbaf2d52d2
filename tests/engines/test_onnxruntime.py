"""What ONNX Runtime stores, opens, refuses and tells."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from engines.quantized import halved, qdq_conv, single
from hasten.artifact import Artifact
from hasten.engines.onnxruntime import OnnxRuntime
from hasten.engines.onnxruntime_refusal import refusal
from hasten.errors import BuildFailed, SignatureMismatch, StoreError, Unsupported
from hasten.graph.model import EXTERNAL_FROM_BYTES
from hasten.host import this_host
from hasten.store import Store
from hasten.testing.models import convnet, encoder, mlp, random_samples, stored, write
from hasten.transform import Context, run_pass


def node_kinds(artifact: Artifact) -> list[str]:
    return [node.op_type for node in onnx.load(artifact.entry).graph.node]


def test_what_is_stored_is_what_onnxruntime_runs(store: Store, ctx: Context, tmp_path: Path) -> None:
    source = stored(convnet(), store)
    built = run_pass(OnnxRuntime(), source, store, ctx)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.enable_profiling = True
    options.log_severity_level = 4
    options.profile_file_prefix = str(tmp_path / "profile")
    session = onnxruntime.InferenceSession(str(source.entry), options, providers=["CPUExecutionProvider"])
    feed = random_samples(source, n=2).feed(slice(0, 2))
    reference = session.run(None, feed)
    profiled = {
        operator.kind: operator for operator in OnnxRuntime().operators(built, feed, runs=2)
    }  # the engine's own view, of the stored file
    ran = Path(session.end_profiling()).read_text()
    assert all(f'"op_name" : "{kind}"' in ran or f'"op_name": "{kind}"' in ran for kind in profiled)
    np.testing.assert_array_equal(reference[0], OnnxRuntime().open(built).run(feed)["y"])


def test_opening_changes_nothing_in_the_stored_graph(store: Store, ctx: Context, tmp_path: Path) -> None:
    built = run_pass(OnnxRuntime(), stored(encoder(), store), store, ctx)
    options = OnnxRuntime()._options(onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL)
    options.optimized_model_filepath = str(tmp_path / "again.onnx")
    onnxruntime.InferenceSession(str(built.entry), options, providers=["CPUExecutionProvider"])
    again = onnx.load(tmp_path / "again.onnx").graph.node
    assert [(n.op_type, n.name) for n in again] == [(n.op_type, n.name) for n in onnx.load(built.entry).graph.node]


def test_the_built_model_is_bound_to_this_processor(store: Store, ctx: Context) -> None:
    built = run_pass(OnnxRuntime(), stored(mlp(), store), store, ctx)
    assert built.host == this_host().binding
    with pytest.raises(StoreError, match="another processor"):
        OnnxRuntime().open(replace(built, host="0123456789ab"))


def test_optimization_none_leaves_the_graph_alone(store: Store, ctx: Context) -> None:
    source = stored(convnet(), store)
    assert node_kinds(run_pass(OnnxRuntime(optimization="none"), source, store, ctx)) == node_kinds(source)
    assert len(node_kinds(run_pass(OnnxRuntime(), source, store, ctx))) < len(node_kinds(source))


def test_many_builds_of_one_model_are_one_artifact(store: Store) -> None:
    source = stored(convnet(), store)
    digests = set()
    for _ in range(20):
        with store.scratch() as folder:
            made = OnnxRuntime().apply(source, Context(folder=folder, samples=None, seed=0, progress=lambda t, s: None))
            digests.add(made.digest)
    assert len(digests) == 1


def test_stale_inner_shapes_do_no_harm(store: Store, ctx: Context) -> None:
    source = stored(mlp(), store)
    model = onnx.load(source.entry)
    wrong = helper.make_tensor_value_info("gemm_0_out", TensorProto.FLOAT, ("batch", 7))
    del model.graph.value_info[:]
    model.graph.value_info.append(wrong)
    write(model, source.entry)
    feed = random_samples(source, n=2).feed(slice(0, 2))
    assert OnnxRuntime().open(run_pass(OnnxRuntime(), source, store, ctx)).run(feed)["y"].shape == (2, 4)


@pytest.mark.parametrize("threshold", [0, 1500])
def test_weights_in_a_file_beside_the_model_are_found(threshold: int, store: Store, ctx: Context) -> None:
    with store.scratch() as folder:
        onnx.save_model(
            mlp(), folder / "model.onnx", save_as_external_data=True, location="weights", size_threshold=threshold
        )
        inline = stored(mlp(), store)
        source = store.put(Artifact.of(folder, "model.onnx", format="onnx", signature=inline.signature))
    feed = random_samples(source, n=2).feed(slice(0, 2))
    results = [OnnxRuntime().open(run_pass(OnnxRuntime(), s, store, ctx)).run(feed)["y"] for s in (source, inline)]
    np.testing.assert_array_equal(*results)


def test_large_models_keep_their_weights_beside_the_graph(
    store: Store, ctx: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert EXTERNAL_FROM_BYTES < 2**31
    monkeypatch.setattr("hasten.engines.onnxruntime.EXTERNAL_FROM_BYTES", 1000)
    source = stored(mlp(hidden=64), store)
    built = run_pass(OnnxRuntime(), source, store, ctx)
    assert sorted(built.files) == ["model.onnx", "model.onnx.data"]
    feed = random_samples(source, n=2).feed(slice(0, 2))
    assert np.isfinite(OnnxRuntime().open(built).run(feed)["y"]).all()


def test_quantized_convolutions_compute_in_int8(store: Store, ctx: Context) -> None:
    source = stored(qdq_conv(), store)
    built = run_pass(OnnxRuntime(), source, store, ctx)
    told = OnnxRuntime().operators(built, random_samples(source, n=1).feed(slice(0, 1)), runs=2)
    conv = next(operator for operator in told if operator.kind == "QLinearConv")
    assert conv.dtype == "int8"
    assert {spec.dtype for spec in conv.inputs} >= {"uint8", "int8"}
    assert "w" in " ".join(conv.weights)
    assert conv.sources == ("conv",)


def test_operators_tell_packed_weights_too(store: Store, ctx: Context) -> None:
    source = stored(mlp(), store)
    told = OnnxRuntime().operators(
        run_pass(OnnxRuntime(), source, store, ctx), random_samples(source, n=5).feed(slice(0, 5)), runs=2
    )
    first = told[0]
    assert (first.kind, first.dtype, first.sources) == ("FusedGemm", "float32", ("gemm_0",))
    assert [spec.shape for spec in first.inputs] == [(5, 16), (32, 16), (32,)]
    assert [spec.shape for spec in first.outputs] == [(5, 32)]
    assert first.weights == ("w0", "w1")


def test_half_precision_that_is_cast_back_is_refused_by_name(store: Store, ctx: Context) -> None:
    source = replace(stored(halved(mlp()), store), traits=frozenset({"float16"}))
    with pytest.raises(Unsupported, match=r"no float16 kernel for FusedGemm \(node 'fused gemm_0'\)"):
        run_pass(OnnxRuntime(precision="float16"), source, store, ctx)


def test_half_precision_that_is_cast_back_is_told_as_float32(store: Store, ctx: Context) -> None:
    source = replace(stored(halved(mlp()), store), traits=frozenset({"float16"}))
    built = run_pass(OnnxRuntime(), source, store, ctx)
    told = OnnxRuntime().operators(built, random_samples(source, n=1).feed(slice(0, 1)), runs=2)
    assert {operator.dtype for operator in told if "Gemm" in operator.kind} == {"float32"}


def test_a_precision_that_the_graph_lacks_is_refused(store: Store) -> None:
    assert "put the pass 'cast' before it" in str(OnnxRuntime(precision="bfloat16").why_not(stored(mlp(), store)))


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (single("Acosh", TensorProto.DOUBLE), "no kernel for Acosh"),
        (single("Relu", TensorProto.BOOL), "Relu takes no tensor"),
        (single("Foo", TensorProto.FLOAT, domain="my"), "no operator my:Foo"),
    ],
)
def test_what_it_lacks_is_unsupported_by_name(
    model: onnx.ModelProto, sentence: str, store: Store, ctx: Context
) -> None:
    with store.scratch() as folder:
        write(model, folder / "model.onnx")
        source = store.put(Artifact.of(folder, "model.onnx", format="onnx", signature=stored(mlp(), store).signature))
    with pytest.raises(Unsupported, match=sentence):
        run_pass(OnnxRuntime(), source, store, ctx)


def test_bfloat16_inputs_are_refused_before_anything_is_built(store: Store) -> None:
    source = stored(single("Identity", TensorProto.BFLOAT16), store)
    assert "bfloat16" in str(OnnxRuntime().why_not(source))


def test_a_damaged_file_is_a_store_error(store: Store, ctx: Context) -> None:
    built = run_pass(OnnxRuntime(), stored(mlp(), store), store, ctx)
    built.entry.write_bytes(built.entry.read_bytes()[:100])
    with pytest.raises(StoreError, match="cannot read the model"):
        OnnxRuntime().open(built)


def test_a_batch_that_the_model_has_fixed_cannot_be_another(store: Store) -> None:
    model = mlp()
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 2
    source = stored(model, store)
    assert OnnxRuntime(batch=2).why_not(source) is None
    assert "has 2 rows by itself" in str(OnnxRuntime(batch=3).why_not(source))


def test_inputs_that_disagree_on_a_dimension_are_named(store: Store, ctx: Context) -> None:
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ("batch", 4)) for name in ("a", "b", "y")]
    node = helper.make_node("Add", ["a", "b"], ["y"], name="add")
    graph = helper.make_graph([node], "two", ends[:2], ends[2:], [])
    source = stored(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), store)
    session = OnnxRuntime().open(run_pass(OnnxRuntime(), source, store, ctx))
    one, five = np.ones((1, 4), np.float32), np.ones((5, 4), np.float32)
    session.run({"a": five, "b": five})
    with pytest.raises(SignatureMismatch, match="'b' has batch = 1, but 'a' has batch = 5"):
        session.run({"a": five, "b": one})


def test_subgraphs_are_timed_with_the_node_that_holds_them(store: Store, ctx: Context) -> None:
    def branch(name: str, kind: str) -> onnx.GraphProto:
        out = helper.make_tensor_value_info(name, TensorProto.FLOAT, ("batch", 4))
        return helper.make_graph([helper.make_node(kind, ["x"], [name], name=f"{kind}_inside")], name, [], [out])

    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ("batch", 4)) for name in "xy"]
    axes = numpy_helper.from_array(np.array([0, 1], np.int64), "axes")
    zero = numpy_helper.from_array(np.float32(0), "zero")
    nodes = [
        helper.make_node("ReduceSum", ["x", "axes"], ["sum"], name="sum", keepdims=0),
        helper.make_node("Greater", ["sum", "zero"], ["positive"], name="greater"),
        helper.make_node(
            "If", ["positive"], ["y"], name="if", then_branch=branch("t", "Exp"), else_branch=branch("e", "Neg")
        ),
    ]
    graph = helper.make_graph(nodes, "branching", ends[:1], ends[1:], [axes, zero])
    source = stored(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), store)
    built = run_pass(OnnxRuntime(), source, store, ctx)
    feed = {"x": np.ones((2, 4), np.float32)}
    assert [operator.kind for operator in OnnxRuntime().operators(built, feed, runs=2)] == [
        "ReduceSum",
        "Greater",
        "If",
    ]
    np.testing.assert_allclose(OnnxRuntime().open(built).run(feed)["y"], np.exp(feed["x"]), rtol=1e-6)


def test_profiles_leave_no_file_behind(
    store: Store, ctx: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    source = stored(mlp(), store)
    built = run_pass(OnnxRuntime(), source, store, ctx)
    OnnxRuntime().operators(built, random_samples(source, n=1).feed(slice(0, 1)), runs=2)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_an_unknown_failure_is_one_line() -> None:
    error = refusal("onnxruntime", RuntimeError("[ONNXRuntimeError] : 1 : FAIL : something\n  went   wrong"))
    assert isinstance(error, BuildFailed)
    assert str(error) == "onnxruntime: something went wrong"


def test_a_damaged_model_is_a_store_error(store: Store, ctx: Context) -> None:
    source = stored(mlp(), store)
    source.entry.write_bytes(source.entry.read_bytes()[:100])
    with pytest.raises(StoreError, match="cannot be read"):
        OnnxRuntime().apply(source, ctx)


@pytest.mark.gpu
def test_the_gpu_is_taken_or_refused(store: Store, ctx: Context) -> None:
    """Needs an NVIDIA GPU and onnxruntime-gpu; without them the provider is refused by name."""
    engine = OnnxRuntime(provider="cuda")
    source = stored(convnet(), store)
    if engine.why_not(source):
        pytest.skip(str(engine.why_not(source)))
    built = run_pass(engine, source, store, ctx)
    feed = random_samples(source, n=2).feed(slice(0, 2))
    cpu = OnnxRuntime().open(run_pass(OnnxRuntime(), source, store, ctx)).run(feed)["y"]
    np.testing.assert_allclose(engine.open(built).run(feed)["y"], cpu, rtol=1e-3, atol=1e-4)


def test_a_provider_that_is_not_here_is_refused(store: Store) -> None:
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this build of ONNX Runtime has the CUDA provider")
    assert "no CUDAExecutionProvider" in str(OnnxRuntime(provider="cuda").why_not(stored(mlp(), store)))
