import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from hasten import registry
from hasten.errors import BadInput, SignatureMismatch, Untrusted
from hasten.frontends import import_model
from hasten.frontends import onnx as onnx_frontend
from hasten.frontends.onnx import name_dims, opset_of
from hasten.graph import model as graph_model
from hasten.graph.model import Graph, read_model
from hasten.samples import Samples
from hasten.samples.preprocess import Preprocess
from hasten.store import Store
from hasten.testing import models
from hasten.testing.models import write


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "store")


def small(nodes, *, opset=20, inputs=(("x", ("n", 3)),), weights=(), outputs=(("y", ("n", 3)),), ir=10, **more):
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs],
        list(weights),
    )
    opsets = more.pop("opsets", [helper.make_opsetid("", opset)])
    return helper.make_model(graph, opset_imports=opsets, ir_version=ir, **more)


def weight(name: str, *shape: int) -> TensorProto:
    return numpy_helper.from_array(np.random.default_rng(0).standard_normal(shape).astype(np.float32), name)


def external(path, location: str, **entries) -> None:
    """Write a model whose weight lies in another file."""
    model = small([helper.make_node("MatMul", ["x", "w"], ["y"])], weights=[weight("w", 3, 3)])
    tensor = model.graph.initializer[0]
    path.parent.mkdir(parents=True, exist_ok=True)
    (path.parent / "beside.bin").write_bytes(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=str(value))
    path.write_bytes(model.SerializeToString())


# --- what is taken, and how


@pytest.mark.parametrize("name", list(models.MODELS))
def test_an_imported_model_keeps_its_nodes_its_weights_and_its_symbolic_batch(store, tmp_path, name) -> None:
    model = models.MODELS[name]()
    artifact = import_model(write(model, tmp_path / "net.onnx"), store)
    read = read_model(artifact)
    assert [node.op_type for node in read.graph.node] == [node.op_type for node in model.graph.node]
    assert artifact.signature.inputs[0].shape[0] == "batch"
    assert artifact.signature.outputs[0].shape[0] == "batch"
    assert Graph(read).specs[model.graph.node[0].output[0]].shape[0] == "batch"
    assert {t.name: t.raw_data for t in read.graph.initializer} == {t.name: t.raw_data for t in model.graph.initializer}


def test_the_lineage_names_the_source_and_no_path(store, tmp_path) -> None:
    path = write(models.mlp(), tmp_path / "net.onnx")
    artifact = import_model(str(path), store, preprocess=Preprocess(resize=(4, 4)))
    assert artifact.lineage[0].name == "import"
    assert artifact.lineage[0].settings["source"] == "net.onnx"
    assert artifact.lineage[0].settings["frontend"] == "onnx"
    assert str(tmp_path).encode() not in msgspec.json.encode(artifact.lineage)
    assert Preprocess.of(artifact.preprocess) == Preprocess(resize=(4, 4))
    assert store.get(artifact.digest) == artifact


def test_the_same_file_is_the_same_artifact(store, tmp_path) -> None:
    path = write(models.mlp(), tmp_path / "net.onnx")
    assert import_model(path, store).digest == import_model(path, store).digest


def test_dimensions_without_a_name_get_the_same_one_in_file_and_signature(store, tmp_path) -> None:
    model = small([helper.make_node("Relu", ["x"], ["y"])], inputs=(("x", (None, 3)),), outputs=(("y", (None, 3)),))
    artifact = import_model(write(model, tmp_path / "net.onnx"), store)
    assert artifact.signature.inputs[0].shape == ("x_dim0", 3)
    assert artifact.signature.outputs[0].shape == ("x_dim0", 3)
    assert read_model(artifact).graph.input[0].type.tensor_type.shape.dim[0].dim_param == "x_dim0"


def test_a_negative_length_is_an_unknown_one(store, tmp_path) -> None:
    model = small([helper.make_node("Relu", ["x"], ["y"])], inputs=(("x", (-1, 3)),), outputs=(("y", (-1, 3)),))
    artifact = import_model(write(model, tmp_path / "net.onnx"), store)
    assert artifact.signature.inputs[0].shape == ("x_dim0", 3)


def test_naming_dimensions_keeps_lengths_and_names() -> None:
    model = name_dims(small([], inputs=(("x", ("n", 3, None)),)))
    dims = model.graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_param or dim.dim_value for dim in dims] == ["n", 3, "x_dim2"]


def test_initializers_are_no_inputs(store, tmp_path) -> None:
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    model = small([node], inputs=(("x", ("n", 3)), ("w", (3, 3))), weights=[weight("w", 3, 3)], opset=13, ir=3)
    artifact = import_model(write(model, tmp_path / "old.onnx"), store)
    assert [spec.name for spec in artifact.signature.inputs] == ["x"]
    assert [value.name for value in read_model(artifact).graph.input] == ["x"]


def test_an_old_opset_is_converted_and_checked_against_the_file_as_it_came(store, tmp_path) -> None:
    nodes = [
        helper.make_node("Squeeze", ["x"], ["s"], axes=[2]),
        helper.make_node("Dropout", ["s"], ["d"], ratio=0.5),
        helper.make_node("Softmax", ["d"], ["y"], axis=1),
    ]
    model = small(nodes, opset=9, inputs=(("x", ("n", 3, 1)),), ir=4)
    artifact = import_model(write(model, tmp_path / "old.onnx"), store)
    assert opset_of(read_model(artifact)) == 17
    assert artifact.lineage[0].settings["opset"] == "9 to 17"
    assert artifact.lineage[0].settings["checked"] is True


def test_a_conversion_that_changes_the_outputs_is_an_error_that_names_the_output(store, tmp_path, monkeypatch) -> None:
    def wrong(model, version):
        return small([helper.make_node("Neg", ["x"], ["y"])], opset=version)

    monkeypatch.setattr("hasten.frontends.onnx.version_converter.convert_version", wrong)
    model = small([helper.make_node("Relu", ["x"], ["y"])], opset=11, ir=6)
    with pytest.raises(Untrusted, match="'y' is off by"):
        import_model(write(model, tmp_path / "old.onnx"), store)
    assert not list(store.artifacts())


def test_local_functions_are_inlined(store, tmp_path) -> None:
    body = [helper.make_node("Relu", ["a"], ["t"]), helper.make_node("Neg", ["t"], ["b"])]
    function = helper.make_function("mine", "NegRelu", ["a"], ["b"], body, [helper.make_opsetid("", 20)])
    model = small(
        [helper.make_node("NegRelu", ["x"], ["y"], domain="mine")],
        opsets=[helper.make_opsetid("", 20), helper.make_opsetid("mine", 1)],
        functions=[function],
    )
    artifact = import_model(write(model, tmp_path / "f.onnx"), store)
    assert [node.op_type for node in read_model(artifact).graph.node] == ["Relu", "Neg"]
    assert artifact.lineage[0].settings["checked"] is True


def test_samples_that_do_not_fit_are_refused_where_they_are_needed(store, tmp_path) -> None:
    model = small([helper.make_node("Relu", ["x"], ["y"])], opset=11, ir=6)
    with pytest.raises(SignatureMismatch, match="length 3"):
        import_model(write(model, tmp_path / "m.onnx"), store, samples=Samples({"x": np.zeros((4, 2), np.float32)}))


def test_weights_in_a_file_beside_the_model_are_read(store, tmp_path) -> None:
    external(tmp_path / "m" / "net.onnx", "beside.bin")
    artifact = import_model(tmp_path / "m" / "net.onnx", store)
    assert artifact.files.keys() == {"model.onnx"}
    assert Graph(read_model(artifact)).constant("w").shape == (3, 3)


# --- what is refused, in one line


@pytest.mark.parametrize(
    "location", ["../secret.bin", "sub/../../secret.bin", "/etc/hostname", "C:\\secret", "", "link.bin"]
)
def test_external_data_outside_the_folder_is_refused_before_it_is_read(store, tmp_path, location, monkeypatch) -> None:
    (tmp_path / "secret.bin").write_bytes(b"\0" * 36)
    external(tmp_path / "m" / "net.onnx", location)
    (tmp_path / "m" / "link.bin").symlink_to(tmp_path / "secret.bin")

    def loads(*args):
        raise AssertionError("external data was loaded")

    monkeypatch.setattr(onnx.external_data_helper, "load_external_data_for_model", loads)
    with pytest.raises(BadInput, match=r"tensor 'w' points outside the model's folder: '.*'; nothing was read"):
        import_model(tmp_path / "m" / "net.onnx", store)


@pytest.mark.parametrize(
    ("location", "entries", "word"),
    [
        ("gone.bin", {}, "no file 'gone.bin'"),
        ("beside.bin", {"offset": 0, "length": 4000}, "which has 36"),
        ("beside.bin", {"offset": -1}, "bytes -1"),
        ("beside.bin", {"offset": "x"}, "offset and length"),
    ],
)
def test_external_data_that_is_not_there_is_refused(store, tmp_path, location, entries, word) -> None:
    external(tmp_path / "m" / "net.onnx", location, **entries)
    with pytest.raises(BadInput, match=word):
        import_model(tmp_path / "m" / "net.onnx", store)


@pytest.mark.parametrize("keep", [0, 10, 200, 0.5, 0.99])
def test_a_truncated_model_is_one_clear_line(store, tmp_path, keep) -> None:
    path = write(models.mlp(), tmp_path / "cut.onnx")
    data = path.read_bytes()
    path.write_bytes(data[: keep if isinstance(keep, int) else int(len(data) * keep)])
    with pytest.raises(BadInput, match=r"cut\.onnx is no ONNX model, or it is cut off") as caught:
        import_model(path, store)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "model", ["missing.onnx", "net.h5", "weights.pt", "folder.onnx", 3, {"a": 1}], ids=lambda value: str(value)
)
def test_what_is_no_model_is_refused_with_what_would_be(store, tmp_path, model) -> None:
    (tmp_path / "folder.onnx").mkdir()
    given = tmp_path / model if isinstance(model, str) else model
    with pytest.raises(BadInput):
        import_model(given, store)


def test_an_operator_without_shape_inference_is_named_with_its_domain(store, tmp_path) -> None:
    model = small(
        [helper.make_node("Swish9", ["x"], ["y"], name="block/act", domain="my.ops")],
        opsets=[helper.make_opsetid("", 20), helper.make_opsetid("my.ops", 1)],
    )
    with pytest.raises(BadInput, match=r"'block/act' is 'Swish9' of domain 'my\.ops'.*without shape inference"):
        import_model(write(model, tmp_path / "m.onnx"), store)


def test_an_operator_inside_a_branch_is_found_too(store, tmp_path) -> None:
    inner = helper.make_graph(
        [helper.make_node("Nope", [], ["o"], name="deep")],
        "b",
        [],
        [helper.make_tensor_value_info("o", TensorProto.FLOAT, (3,))],
    )
    condition = numpy_helper.from_array(np.array(True), "c")
    model = small(
        [
            helper.make_node("If", ["c"], ["z"], then_branch=inner, else_branch=inner),
            helper.make_node("Add", ["x", "z"], ["y"]),
        ],
        weights=[condition],
    )
    with pytest.raises(BadInput, match=r"'deep' is 'Nope' of domain 'ai\.onnx'"):
        import_model(write(model, tmp_path / "m.onnx"), store)


def test_an_unknown_dtype_is_named(store, tmp_path) -> None:
    model = small([helper.make_node("Cast", ["x"], ["y"], to=TensorProto.FLOAT8E4M3FN)])
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT8E4M3FN
    with pytest.raises(BadInput, match="'y' has the dtype float8e4m3fn"):
        import_model(write(model, tmp_path / "m.onnx"), store)


@pytest.mark.parametrize(
    ("node", "word"),
    [
        (helper.make_node("MatMul", ["x", "w"], ["y"], name="mm"), "mm|MatMul|dimension"),
        (helper.make_node("Relu", ["nowhere"], ["y"]), "nowhere"),
    ],
)
def test_an_invalid_graph_is_one_clear_line(store, tmp_path, node, word) -> None:
    model = small([node], weights=[weight("w", 7, 7)])
    with pytest.raises(BadInput, match=word) as caught:
        import_model(write(model, tmp_path / "m.onnx"), store)
    assert "\n" not in str(caught.value)


def test_an_input_of_unknown_rank_is_refused(store, tmp_path) -> None:
    model = small([helper.make_node("Relu", ["x"], ["y"])])
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.ClearField("shape")
    with pytest.raises(BadInput, match="'x' is not a tensor of known rank"):
        import_model(write(model, tmp_path / "m.onnx"), store)


def test_a_refused_model_leaves_nothing_behind(store, tmp_path) -> None:
    with pytest.raises(BadInput):
        import_model(tmp_path / "missing.onnx", store)
    assert not list((store.root / "tmp").iterdir())


def test_the_onnx_frontend_needs_nothing_but_the_base_install() -> None:
    assert not registry.entries("frontend")["onnx"].needs


# --- models too large for one protobuf


@pytest.fixture
def everything_is_large(monkeypatch) -> None:
    """Let the way of models beyond 1 GiB begin at 100 bytes, and weights from 8 elements on count as large."""
    monkeypatch.setattr(onnx_frontend, "EXTERNAL_FROM_BYTES", 100)
    monkeypatch.setattr(graph_model, "EXTERNAL_FROM_BYTES", 100)
    monkeypatch.setattr(onnx_frontend, "SHAPE_DATA_LENGTH", 8)


@pytest.mark.parametrize("name", list(models.MODELS))
def test_a_large_model_is_imported_with_the_same_shapes_as_a_small_one(
    store, tmp_path, name, everything_is_large, monkeypatch
) -> None:
    path = write(models.MODELS[name](), tmp_path / "net.onnx")
    large = import_model(path, store)
    assert "model.onnx.data" in [file.name for file in large.entry.parent.iterdir()]
    found = Graph(read_model(large)).specs
    monkeypatch.undo()
    small_one = import_model(path, store)
    assert large.signature == small_one.signature
    assert found == Graph(read_model(small_one)).specs


@pytest.mark.parametrize(
    ("node", "word"),
    [
        (helper.make_node("MatMul", ["x", "w"], ["y"], name="mm"), "mm|MatMul|dimension"),
        (helper.make_node("Relu", ["nowhere"], ["y"]), "nowhere"),
        (helper.make_node("Relu", ["x"], ["y"], nonsense=1), "nonsense"),
    ],
)
def test_a_large_invalid_graph_is_refused_too(store, tmp_path, node, word, everything_is_large) -> None:
    model = small([node], weights=[weight("w", 7, 7)])
    with pytest.raises(BadInput, match=word) as caught:
        import_model(write(model, tmp_path / "m.onnx"), store)
    assert "\n" not in str(caught.value)


def test_a_large_weight_whose_bytes_do_not_fit_its_shape_is_refused(store, tmp_path, everything_is_large) -> None:
    model = small([helper.make_node("MatMul", ["x", "w"], ["y"])], weights=[weight("w", 3, 3)])
    model.graph.initializer[0].raw_data += b"\0" * 400
    with pytest.raises(BadInput, match=r"'w' has 436 bytes, its shape \[3, 3\] wants 36"):
        import_model(write(model, tmp_path / "m.onnx"), store)


def test_two_large_weights_of_one_name_are_refused(store, tmp_path, everything_is_large) -> None:
    model = small([helper.make_node("MatMul", ["x", "w"], ["y"])], weights=[weight("w", 3, 3), weight("w", 3, 3)])
    with pytest.raises(BadInput, match=r"w initializer name is not unique|two weights called 'w'"):
        import_model(write(model, tmp_path / "m.onnx"), store)


def test_an_old_model_beyond_two_gibibytes_says_that_it_cannot_be_converted(store, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(onnx_frontend, "weight_bytes", lambda model: 3 * 2**30)
    model = small([helper.make_node("MatMul", ["x", "w"], ["y"])], weights=[weight("w", 3, 3)], opset=11)
    with pytest.raises(BadInput, match=r"opset 11 and 2 GiB.*newer opset"):
        import_model(write(model, tmp_path / "m.onnx"), store)
