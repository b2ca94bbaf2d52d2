"""What OpenVINO converts, takes, refuses and tells."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from engines.quantized import halved, qdq_conv, single
from hasten.artifact import Artifact
from hasten.errors import SignatureMismatch, StoreError, Unsupported
from hasten.store import Store
from hasten.testing.models import Builder, convnet, encoder, mlp, random_samples, stored
from hasten.transform import Context, run_pass

pytest.importorskip("openvino", reason="needs the extra 'openvino'")

from hasten.engines import openvino as plugin
from hasten.engines.openvino import OpenVino


def capabilities() -> list[str]:
    return list(plugin.openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_a_precision_that_the_processor_lacks_is_refused(precision: str, store: Store, ctx: Context) -> None:
    if plugin.CAPABILITIES[precision] in capabilities():
        pytest.skip(f"this processor has {precision} arithmetic")
    with pytest.raises(Unsupported, match=f"no {precision} arithmetic"):
        run_pass(OpenVino(precision=precision), stored(mlp(), store), store, ctx)


def test_a_precision_that_is_taken_shows_in_the_layers(store: Store, ctx: Context) -> None:
    """bfloat16 runs in emulation on some processors and not at all on others: the read-back is what is tested."""
    compiled = plugin.openvino.Core().compile_model(
        str(stored(convnet(), store).entry), "CPU", {"INFERENCE_PRECISION_HINT": "bf16", "INFERENCE_NUM_THREADS": 1}
    )
    took = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    taken, other = ("bfloat16", "float32") if took == "bf16" else ("float32", "bfloat16")
    OpenVino(precision=taken)._check_precision(compiled)
    with pytest.raises(Unsupported, match=f"asked for {other}, it took {took}"):
        OpenVino(precision=other)._check_precision(compiled)


def test_more_threads_than_it_takes_are_refused(store: Store, ctx: Context) -> None:
    with pytest.raises(Unsupported, match=r"asked for 4096 threads, it took \d+"):
        run_pass(OpenVino(threads=4096), stored(mlp(), store), store, ctx)


def test_quantized_convolutions_compute_in_int8(store: Store, ctx: Context) -> None:
    source = stored(qdq_conv(), store)
    built = run_pass(OpenVino(), source, store, ctx)
    told = OpenVino().operators(built, random_samples(source, n=1).feed(slice(0, 1)), runs=2)
    conv = next(operator for operator in told if operator.kind == "Convolution")
    assert conv.dtype == "int8"
    assert [spec.dtype for spec in conv.inputs[:2]] == ["uint8", "int8"]
    assert conv.inputs[1].name in conv.weights


def test_operators_name_their_sources_and_weights(store: Store, ctx: Context) -> None:
    source = stored(mlp(), store)
    built = run_pass(OpenVino(), source, store, ctx)
    first = OpenVino().operators(built, random_samples(source, n=5).feed(slice(0, 5)), runs=2)[0]
    assert (first.kind, first.dtype, first.sources) == ("FullyConnected", "float32", ("gemm_0", "relu_1"))
    assert [spec.shape for spec in first.inputs] == [(5, 16), (32, 16), (32,)]
    assert len(first.weights) == 2


@pytest.mark.parametrize("n_bytes", [None, 0], ids=["zeros", "cut"])
def test_writing_over_the_weights_of_an_open_model_changes_no_answer(
    n_bytes: int | None, store: Store, ctx: Context
) -> None:
    net = Builder(0)
    net.add("Gather", net.weight(5000, 64), net.add("Cast", "x", to=TensorProto.INT64))
    source = stored(net.model(("x", ("batch",)), ("y", ("batch", 64))), store)
    built = run_pass(OpenVino(), source, store, ctx)
    session, feed = OpenVino().open(built), {"x": np.arange(0, 5000, 7, dtype=np.float32)}
    expected = session.run(feed)["y"]
    weights = built.folder / "model.bin"
    assert str(weights) not in Path("/proc/self/maps").read_text()  # else the process would end in what follows
    with weights.open("r+b") as file:
        file.truncate(n_bytes) if n_bytes is not None else file.write(bytes(weights.stat().st_size))
    np.testing.assert_array_equal(session.run(feed)["y"], expected)


def test_half_precision_weights_are_not_made_up(store: Store, ctx: Context) -> None:
    source = stored(mlp(hidden=64), store)
    built = run_pass(OpenVino(), source, store, ctx)
    weights = sum(np.prod(tensor.dims) * 4 for tensor in onnx.load(source.entry).graph.initializer)
    assert (built.folder / "model.bin").stat().st_size >= weights


def test_half_precision_models_compute_in_float32(store: Store, ctx: Context) -> None:
    source = replace(stored(halved(mlp()), store), traits=frozenset({"float16"}))
    built = run_pass(OpenVino(), source, store, ctx)
    feed = random_samples(source, n=2).feed(slice(0, 2))
    told = OpenVino().operators(built, feed, runs=2)
    assert {operator.dtype for operator in told if operator.kind == "FullyConnected"} == {"float32"}
    assert OpenVino().open(built).run(feed)["y"].dtype == np.float16


def test_many_builds_of_one_model_are_one_artifact(store: Store) -> None:
    for model in (convnet(), encoder()):
        source = stored(model, store)
        digests = set()
        for _ in range(5):
            with store.scratch() as folder:
                context = Context(folder=folder, samples=None, seed=0, progress=lambda text, share: None)
                digests.add(OpenVino(batch=2).apply(source, context).digest)
        assert len(digests) == 1


@pytest.mark.parametrize("dtype", [TensorProto.INT64, TensorProto.BOOL, TensorProto.INT32, TensorProto.UINT8])
def test_dtypes_of_inputs_and_outputs_are_kept(dtype: int, store: Store, ctx: Context) -> None:
    source = stored(single("Identity", dtype), store)
    session = OpenVino().open(run_pass(OpenVino(), source, store, ctx))
    array = np.arange(8).reshape(2, 4).astype(source.signature.inputs[0].dtype)
    got = session.run({"x": array})["y"]
    assert got.dtype == array.dtype
    np.testing.assert_array_equal(got, array)


@pytest.mark.parametrize("dtype", [TensorProto.DOUBLE, TensorProto.UINT64])
def test_what_it_would_compute_in_thirty_two_bits_is_refused(dtype: int, store: Store) -> None:
    assert "in 32 bits, and 'x' is one" in str(OpenVino().why_not(stored(single("Identity", dtype), store)))


def test_an_integer_beyond_thirty_two_bits_is_refused_and_not_cut(store: Store, ctx: Context) -> None:
    session = OpenVino().open(run_pass(OpenVino(), stored(single("Identity", TensorProto.INT64), store), store, ctx))
    with pytest.raises(SignatureMismatch, match="'x' holds a number beyond 32 bits"):
        session.run({"x": np.full((2, 4), 2**35)})
    model = single("Identity", TensorProto.INT64)
    model.graph.node[0].op_type = "Add"
    model.graph.node[0].input.append("far")
    model.graph.initializer.append(numpy_helper.from_array(np.array([2**40]), "far"))
    with pytest.raises(Unsupported, match=f"the constant 'far' has {2**40}"):
        run_pass(OpenVino(), stored(model, store), store, ctx)


def test_a_slice_to_the_end_is_no_number_that_is_cut(store: Store, ctx: Context) -> None:
    net = Builder(0)
    ends = [net.constant(np.array([value])) for value in (1, np.iinfo(np.int64).max, 1)]
    net.add("Slice", "x", *ends)
    source = stored(net.model(("x", ("batch", 4)), ("y", ("batch", 3))), store)
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    got = OpenVino().open(run_pass(OpenVino(), source, store, ctx)).run({"x": x})["y"]
    np.testing.assert_array_equal(got, x[:, 1:])


def test_arrays_that_are_not_contiguous_are_read_right(store: Store, ctx: Context) -> None:
    source = stored(mlp(), store)
    session = OpenVino().open(run_pass(OpenVino(), source, store, ctx))
    wide = np.asarray(random_samples(source, n=4).inputs["x"])
    turned = np.asfortranarray(wide)
    np.testing.assert_array_equal(session.run({"x": turned})["y"], session.run({"x": wide})["y"])


def test_an_operator_without_conversion_is_named(store: Store, ctx: Context) -> None:
    with store.scratch() as folder:
        onnx.save_model(single("Foo", TensorProto.FLOAT, domain="my"), folder / "model.onnx")
        signature = stored(mlp(), store).signature
        source = store.put(Artifact.of(folder, "model.onnx", format="onnx", signature=signature))
    with pytest.raises(Unsupported, match=r"no conversion for my\.Foo"):
        run_pass(OpenVino(), source, store, ctx)


def test_a_damaged_file_is_a_store_error(store: Store, ctx: Context) -> None:
    built = run_pass(OpenVino(), stored(mlp(), store), store, ctx)
    built.entry.write_bytes(built.entry.read_bytes()[:100])
    with pytest.raises(StoreError, match="cannot read the model"):
        OpenVino().open(built)


def test_importing_it_tells_nobody(tmp_path: Path) -> None:
    """OpenVINO's own import sends an event and leaves a file in the home folder."""
    code = "import sys, hasten.engines.openvino; print([m for m in sys.modules if m.startswith('openvino_telemetry.')])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"
    assert done.stderr == ""
    assert list(tmp_path.iterdir()) == []
