"""What PyTorch runs, compiles, refuses and tells."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from engines.quantized import WEIGHTS, qdq_conv, single
from hasten.artifact import Artifact
from hasten.engines.onnxruntime import OnnxRuntime
from hasten.errors import BuildFailed, StoreError, Unsupported
from hasten.host import this_host
from hasten.measurement import Operator
from hasten.store import Store
from hasten.tensors import TOLERANCES, Array, Feed, TensorSpec, relative_error
from hasten.testing.models import Builder, convnet, encoder, mlp, random_samples, stored
from hasten.transform import Context, run_pass

pytest.importorskip("torch", reason="needs the extra 'train'")

import torch

from hasten.engines import torch as plugin
from hasten.engines import torch_compiled
from hasten.engines.torch import Torch
from hasten.engines.torch_eager import check_precision
from hasten.engines.torch_graph import with_float_constants, with_int8_weights


def feed_of(source: Artifact, batch: int) -> dict[str, Array]:
    return random_samples(source, n=batch).feed(slice(0, batch))


def reference(source: Artifact, feed: Feed, store: Store, ctx: Context) -> dict[str, Array]:
    return OnnxRuntime().open(run_pass(OnnxRuntime(), source, store, ctx)).run(feed)


def quantized_mlp() -> onnx.ModelProto:
    """Make x [batch, 16] -> MatMul, Add, Relu, MatMul, Add x -> y [batch, 16], weights int8 by column, in QDQ form."""
    net = Builder(0)

    def quantized(x: str, scale: float, zero_point: int) -> str:
        names = [net.constant(np.float32(scale)), net.constant(np.uint8(zero_point))]
        return net.add("DequantizeLinear", net.add("QuantizeLinear", x, *names), *names)

    def weight(rows: int, columns: int) -> str:
        values = net.random.integers(*WEIGHTS, (rows, columns)).astype(np.int8)
        scales = net.random.uniform(0.001, 0.002, columns).astype(np.float32)
        zeros = np.zeros(columns, np.int8)
        return net.add("DequantizeLinear", net.constant(values), net.constant(scales), net.constant(zeros), axis=1)

    h = net.add("MatMul", quantized("x", 0.03, 128), weight(16, 32))
    h = net.add("Relu", net.add("Add", h, net.weight(32, scale=0.1)))
    net.add("Add", net.add("MatMul", quantized(h, 0.02, 0), weight(32, 16)), "x")
    return net.model(("x", ("batch", 16)), ("y", ("batch", 16)))


def masked() -> onnx.ModelProto:
    """Make x [batch, 16] -> Gather of places, Where of a mask -> MatMul -> y [batch, 4], constants of other dtypes."""
    net = Builder(0)
    taken = net.add("Gather", "x", net.constant(np.array([1, 3, 5, 7])), axis=1)
    mask = net.constant(np.array([True, False, True, True]))
    net.add("MatMul", net.add("Where", mask, taken, net.constant(np.float32(-1e4))), net.weight(4, 4))
    return net.model(("x", ("batch", 16)), ("y", ("batch", 4)))


@pytest.mark.parametrize("make", [mlp, convnet, encoder, qdq_conv, quantized_mlp, masked])
def test_eager_agrees_with_onnxruntime(make, store: Store, ctx: Context) -> None:
    source = stored(make(), store)
    session = Torch().open(run_pass(Torch(), source, store, ctx))
    for batch in (1, 4):
        feed = feed_of(source, batch)
        error = relative_error(reference(source, feed, store, ctx)["y"], session.run(feed)["y"])
        assert error <= TOLERANCES["float32"].relative


def test_models_that_need_no_compiler_run_where_there_is_no_temporary_folder() -> None:
    """Inductor asks for one when it is imported, and a server's file system may be read-only."""
    code = """
import sys, tempfile
def refuse(): raise FileNotFoundError("no usable temporary directory found")
tempfile.gettempdir = refuse
import hasten.engines.torch
sys.exit("torch._inductor" in sys.modules)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=90, check=False)
    assert ran.returncode == 0, ran.stderr


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Artifact, Artifact]:
    """A quantized network and what it is compiled to: compiling takes seconds, so it is done once."""
    store = Store(tmp_path_factory.mktemp("compiled"))
    engine = Torch(mode="compiled", batch=3)
    source = stored(quantized_mlp(), store)
    if (reason := engine.why_not(source)) and "compiler" in reason:
        pytest.skip(reason)
    context = Context(folder=store.root, samples=None, seed=0, progress=lambda text, share: None)
    return store, source, run_pass(engine, source, store, context)


def test_a_compiled_library_agrees_with_onnxruntime(compiled, ctx: Context) -> None:
    store, source, built = compiled
    session = Torch(mode="compiled", batch=3).open(built)
    feed = feed_of(source, 3)
    first = session.run(feed)["y"]
    kept = first.copy()
    step = 0.02 * 0.002 * 127 / np.abs(first).max()  # one rounding of the hidden layer, taken the other way
    assert relative_error(reference(source, feed, store, ctx)["y"], first) <= max(step, 1e-6)
    session.run({"x": np.zeros_like(feed["x"])})
    np.testing.assert_array_equal(first, kept)


def test_a_compiled_library_leaves_its_feed_alone(compiled) -> None:
    """Inductor adds the product to the residual in place, and the residual is the caller's array."""
    _, source, built = compiled
    session = Torch(mode="compiled", batch=3).open(built)
    feed = feed_of(source, 3)
    kept = feed["x"].copy()
    first = session.run(feed)["y"]
    np.testing.assert_array_equal(feed["x"], kept)
    np.testing.assert_array_equal(session.run(feed)["y"], first)


def test_compiled_products_of_quantized_tensors_compute_in_int8(compiled) -> None:
    _, source, built = compiled
    told = Torch(mode="compiled", batch=3).operators(built, feed_of(source, 3), runs=2)
    products = [operator for operator in told if operator.kind == "Gemm"]
    assert [operator.dtype for operator in products] == ["int8", "int8"]
    assert [operator.inputs[0].dtype for operator in products] == ["uint8", "uint8"]
    assert all(operator.weights and operator.time_ns > 0 for operator in products)
    assert [operator.outputs[0].shape for operator in products] == [(3, 32), (3, 16)]


def test_a_library_is_opened_in_its_own_mode_alone(compiled) -> None:
    _, _, built = compiled
    with pytest.raises(StoreError, match="not built for the mode 'eager'"):
        Torch().open(built)


def test_a_library_that_is_damaged_is_a_store_error(compiled, tmp_path: Path) -> None:
    _, _, built = compiled
    for name in built.files:
        (tmp_path / name).write_bytes((built.folder / name).read_bytes()[:1000])
    with pytest.raises(StoreError, match="not the library that was built"):
        Torch(mode="compiled").open(replace(built, folder=tmp_path))


def test_compiling_needs_fixed_shapes(store: Store) -> None:
    assert "open axis 'batch'" in str(Torch(mode="compiled").why_not(stored(mlp(), store)))


def test_compiling_without_a_compiler_is_refused_with_what_to_install(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no 'no-such-compiler' here; install g++" in str(
        Torch(mode="compiled", batch=1).why_not(stored(mlp(), store))
    )


def test_int8_weights_lie_by_output_whatever_product_takes_them() -> None:
    made, count = with_int8_weights(quantized_mlp())
    assert count == 2
    weights = [numpy_helper.to_array(t) for t in made.graph.initializer if t.data_type == TensorProto.INT8]
    assert [w.shape for w in weights if w.ndim == 2] == [(32, 16), (16, 32)]
    assert [node.op_type for node in made.graph.node].count("Transpose") == 2


def test_float_constants_stand_for_the_quantized_ones() -> None:
    source = quantized_mlp()
    made = with_float_constants(source)
    kinds = [node.op_type for node in made.graph.node]
    assert kinds.count("DequantizeLinear") == 2  # those of the activations
    values = {t.name: numpy_helper.to_array(t) for t in source.graph.initializer}
    node = next(n for n in source.graph.node if n.op_type == "DequantizeLinear" and n.input[0] in values)
    floats = next(numpy_helper.to_array(t) for t in made.graph.initializer if t.name == node.output[0])
    np.testing.assert_array_equal(floats, values[node.input[0]].astype(np.float32) * values[node.input[1]])


def test_its_threads_are_those_that_were_asked_for(store: Store, ctx: Context) -> None:
    source = stored(mlp(), store)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            engine = Torch(threads=threads)
            engine.open(run_pass(engine, source, store, ctx)).run(feed_of(source, 2))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_a_precision_that_the_processor_lacks_is_refused(precision: str, store: Store, ctx: Context) -> None:
    if plugin.ARITHMETIC[precision] & set(this_host().flags):
        pytest.skip(f"this processor has {precision} arithmetic")
    with pytest.raises(Unsupported, match=f"no {precision} arithmetic"):
        run_pass(Torch(precision=precision), stored(mlp(), store), store, ctx)


@pytest.mark.parametrize("make", [mlp, encoder])
def test_products_really_compute_in_a_precision_that_is_taken(
    make, store: Store, ctx: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bfloat16 runs here if need be in emulation: what is computed in it is what is tested."""
    monkeypatch.setitem(plugin.ARITHMETIC, "bfloat16", frozenset(this_host().flags))
    engine, source = Torch(precision="bfloat16"), stored(make(), store)
    built, feed = run_pass(engine, source, store, ctx), feed_of(source, 2)
    got = engine.open(built).run(feed)["y"]
    assert got.dtype == np.float32
    assert 0 < relative_error(reference(source, feed, store, ctx)["y"], got) <= TOLERANCES["bfloat16"].relative
    told = engine.operators(built, feed, runs=1)
    assert {o.dtype for o in told if o.kind in ("Gemm", "MatMul")} == {"bfloat16"}


def test_products_in_another_precision_are_seen(store: Store) -> None:
    eager = Torch()._eager(stored(mlp(), store))
    with pytest.raises(Unsupported, match="runs linear in float32, not in bfloat16"):
        check_precision(lambda: eager.run([torch.zeros(2, 16)]), "bfloat16")


def test_kernels_in_another_precision_are_seen() -> None:
    spec = TensorSpec("y", "float32", (2, 2))
    kernel = Operator(name="buf0", kind="Gemm", dtype="float32", inputs=(), outputs=(spec,))
    told = torch_compiled.Told(operators=(kernel,))
    torch_compiled.check_told(told, 0, "float32")
    with pytest.raises(Unsupported, match="runs Gemm 'buf0' in float32, not bfloat16"):
        torch_compiled.check_told(told, 0, "bfloat16")
    with pytest.raises(Unsupported, match="none of the 3 quantized products"):
        torch_compiled.check_told(told, 3, "float32")


def test_operators_are_the_nodes_with_their_times(store: Store, ctx: Context) -> None:
    source = stored(mlp(), store)
    told = Torch().operators(run_pass(Torch(), source, store, ctx), feed_of(source, 5), runs=2)
    assert [operator.kind for operator in told] == ["Gemm", "Relu", "Gemm", "Relu", "Gemm"]
    first = told[0]
    assert (first.name, first.dtype, first.sources) == ("gemm_0", "float32", ("gemm_0",))
    assert [spec.shape for spec in first.inputs] == [(5, 16), (32, 16), (32,)]
    assert [spec.shape for spec in first.outputs] == [(5, 32)]
    assert first.weights == ("w0", "w1")
    assert all(operator.time_ns for operator in told)


def test_quantized_networks_are_told_as_the_float_arithmetic_that_they_are_in_eager_mode(
    store: Store, ctx: Context
) -> None:
    source = stored(qdq_conv(), store)
    told = Torch().operators(run_pass(Torch(), source, store, ctx), feed_of(source, 1), runs=1)
    assert {operator.dtype for operator in told if operator.kind == "Conv"} == {"float32"}


def test_an_unknown_operator_is_named(store: Store, ctx: Context) -> None:
    with store.scratch() as folder:
        onnx.save_model(single("Foo", TensorProto.FLOAT, domain="my"), folder / "model.onnx")
        signature = stored(mlp(), store).signature
        source = store.put(Artifact.of(folder, "model.onnx", format="onnx", signature=signature))
    with pytest.raises(Unsupported, match=r"torch: node 'only' \(my\.Foo\)"):
        run_pass(Torch(), source, store, ctx)


@pytest.mark.parametrize("dtype", [TensorProto.INT64, TensorProto.BOOL, TensorProto.DOUBLE, TensorProto.BFLOAT16])
def test_an_output_that_is_the_input_is_an_array_of_its_own(dtype: int, store: Store, ctx: Context) -> None:
    source = stored(single("Identity", dtype), store)
    session = Torch().open(run_pass(Torch(), source, store, ctx))
    array = np.arange(8).reshape(2, 4).astype(random_samples(source, n=1).inputs["x"].dtype)
    got = session.run({"x": array})["y"]
    assert got.dtype == array.dtype
    np.testing.assert_array_equal(got, array)
    assert not np.shares_memory(got, array)


def test_arrays_that_are_read_only_or_not_contiguous_are_read_right(store: Store, ctx: Context) -> None:
    source = stored(mlp(), store)
    session = Torch().open(run_pass(Torch(), source, store, ctx))
    plain = feed_of(source, 4)["x"]
    fixed = plain.copy()
    fixed.flags.writeable = False
    for other in (np.asfortranarray(plain), plain[::-1].copy()[::-1], fixed):
        np.testing.assert_array_equal(session.run({"x": other})["y"], session.run({"x": plain})["y"])


def test_weights_in_a_file_beside_the_model_are_found(store: Store, ctx: Context) -> None:
    with store.scratch() as folder:
        onnx.save_model(mlp(), folder / "model.onnx", save_as_external_data=True, location="weights", size_threshold=0)
        inline = stored(mlp(), store)
        source = store.put(Artifact.of(folder, "model.onnx", format="onnx", signature=inline.signature))
    feed = feed_of(source, 2)
    results = [Torch().open(run_pass(Torch(), s, store, ctx)).run(feed)["y"] for s in (source, inline)]
    np.testing.assert_array_equal(*results)


def test_a_damaged_file_is_a_store_error(store: Store, ctx: Context) -> None:
    built = run_pass(Torch(), stored(mlp(), store), store, ctx)
    built.entry.write_bytes(built.entry.read_bytes()[:100])
    with pytest.raises(StoreError, match="cannot read the model"):
        Torch().open(built)


def test_a_failing_run_is_one_line(store: Store, ctx: Context) -> None:
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ("batch", "n")) for name in "xy"]
    weight = numpy_helper.from_array(np.ones((3, 2), np.float32), "w")
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", ends[:1], ends[1:], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    source = stored(model, store)
    session = Torch().open(run_pass(Torch(), source, store, ctx))
    with pytest.raises(BuildFailed, match="torch run: mat1 and mat2 shapes cannot be multiplied"):
        session.run({"x": np.ones((2, 4), np.float32)})


def test_a_device_that_is_not_here_is_refused(store: Store) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    assert "no CUDA device" in str(Torch(device="cuda").why_not(stored(mlp(), store)))


def test_a_library_for_a_gpu_has_its_kernels_within() -> None:
    """They are read from the folder that it was made in, else, which is gone when it is loaded."""
    name = "aot_inductor.embed_kernel_binary"
    assert torch_compiled.options_for("cuda")[name] is True
    assert name not in torch_compiled.options_for("cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_the_gpu_is_taken(mode: str, store: Store, ctx: Context) -> None:
    """Needs an NVIDIA GPU and a build of PyTorch with CUDA; without them the device is refused by name."""
    engine, source = Torch(device="cuda", mode=mode, batch=2), stored(convnet(), store)
    if reason := engine.why_not(source):
        pytest.skip(reason)
    feed = feed_of(source, 2)
    got = engine.open(run_pass(engine, source, store, ctx)).run(feed)["y"]
    assert relative_error(reference(source, feed, store, ctx)["y"], got) <= TOLERANCES["float32"].relative
