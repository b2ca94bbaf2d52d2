"""Models of scikit-learn's kind: operators of ai.onnx.ml, and outputs that lose sight of their rows."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from hasten.errors import BadInput
from hasten.frontends import import_model
from hasten.frontends.reference import run_reference
from hasten.graph.model import Graph, read_model
from hasten.samples import Samples
from hasten.store import Store
from hasten.testing.models import write

ML = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "store")


def graph_of(nodes, outputs, *, weights=(), first="n", width=3) -> onnx.ModelProto:
    """``outputs``: name -> element type and rank; of their lengths nothing is said, as exporters leave them."""
    values = [helper.make_tensor_value_info(name, kind, [None] * rank) for name, (kind, rank) in outputs.items()]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, (first, width))]
    return helper.make_model(
        helper.make_graph(nodes, "g", inputs, values, list(weights)), opset_imports=ML, ir_version=8
    )


def stump(kind: str, name: str, outputs, **attributes) -> onnx.NodeProto:
    """One tree with one split: is the first feature at most 0?"""
    return helper.make_node(
        *(kind, ["x"], outputs, name),
        domain="ai.onnx.ml",
        nodes_treeids=[0, 0, 0],
        nodes_nodeids=[0, 1, 2],
        nodes_featureids=[0, 0, 0],
        nodes_values=[0.0, 0.0, 0.0],
        nodes_modes=["BRANCH_LEQ", "LEAF", "LEAF"],
        nodes_truenodeids=[1, 0, 0],
        nodes_falsenodeids=[2, 0, 0],
        **attributes,
    )


FOREST = stump(
    *("TreeEnsembleClassifier", "forest", ["label", "scores"]),
    class_treeids=[0, 0],
    class_nodeids=[1, 2],
    class_ids=[0, 1],
    class_weights=[1.0, 1.0],
    classlabels_int64s=[0, 1, 2],
)
BOOSTED = stump(
    *("TreeEnsembleRegressor", "trees", ["y"]),
    target_treeids=[0, 0],
    target_nodeids=[1, 2],
    target_ids=[0, 0],
    target_weights=[-1.0, 1.0],
    n_targets=1,
)


def shapes(artifact) -> dict[str, tuple[object, ...]]:
    return {spec.name: spec.shape for spec in artifact.signature.outputs}


def test_a_forest_is_imported_with_its_rows_as_batch(store, tmp_path) -> None:
    model = graph_of([FOREST], {"label": (TensorProto.INT64, 1), "scores": (TensorProto.FLOAT, 2)})
    artifact = import_model(write(model, tmp_path / "forest.onnx"), store)
    assert shapes(artifact) == {"label": ("n",), "scores": ("n", 3)}
    x = np.array([[-1, 0, 0], [1, 0, 0], [2, 0, 0]], np.float32)
    got = run_reference(artifact.entry, {"x": x})
    assert got["label"].tolist() == [0, 1, 1]
    assert got["scores"].shape == (3, 3)


def test_text_labels_keep_their_type(store, tmp_path) -> None:
    node = onnx.NodeProto()
    node.CopyFrom(FOREST)
    del node.attribute[-1]
    node.attribute.append(helper.make_attribute("classlabels_strings", ["no", "yes", "maybe"]))
    model = graph_of([node], {"label": (TensorProto.STRING, 1), "scores": (TensorProto.FLOAT, 2)})
    artifact = import_model(write(model, tmp_path / "forest.onnx"), store)
    assert [(s.name, s.dtype, s.shape) for s in artifact.signature.outputs] == [
        ("label", "string", ("n",)),
        ("scores", "float32", ("n", 3)),
    ]


@pytest.mark.parametrize(
    ("nodes", "inner", "shape"),
    [
        (
            [
                helper.make_node("Scaler", ["x"], ["s"], domain="ai.onnx.ml", offset=[1.0] * 3, scale=[2.0] * 3),
                helper.make_node("Relu", ["s"], ["y"]),
            ],
            "s",
            ("n", 3),
        ),
        (
            [
                helper.make_node("Normalizer", ["x"], ["s"], domain="ai.onnx.ml", norm="L2"),
                helper.make_node("Relu", ["s"], ["y"]),
            ],
            "s",
            ("n", 3),
        ),
        (
            [
                helper.make_node("Imputer", ["x"], ["s"], domain="ai.onnx.ml", imputed_value_floats=[0.0] * 3),
                helper.make_node("Scaler", ["s"], ["t"], domain="ai.onnx.ml", offset=[0.0], scale=[1.0]),
                helper.make_node("Relu", ["t"], ["y"]),
            ],
            "t",
            ("n", 3),
        ),
        (
            [
                helper.make_node("FeatureVectorizer", ["x", "x"], ["s"], domain="ai.onnx.ml", inputdimensions=[3, 3]),
                helper.make_node("Relu", ["s"], ["y"]),
            ],
            "s",
            ("n", 6),
        ),
        (
            [
                helper.make_node(
                    *("LinearRegressor", ["x"], ["s"]), domain="ai.onnx.ml", coefficients=[1.0] * 6, targets=2
                ),
                helper.make_node("Relu", ["s"], ["y"]),
            ],
            "s",
            ("n", 2),
        ),
        ([BOOSTED], "y", ("n", 1)),
        (
            [
                helper.make_node(
                    *("SVMClassifier", ["x"], ["label", "s"]),
                    domain="ai.onnx.ml",
                    classlabels_ints=[0, 1, 2],
                    coefficients=[1.0] * 9,
                    rho=[0.0, 0.0, 0.0],
                    kernel_type="LINEAR",
                    kernel_params=[0.0, 0.0, 0.0],
                ),
                helper.make_node("Relu", ["s"], ["y"]),
            ],
            "s",
            ("n", "s_dim1"),
        ),
    ],
    ids=[
        "Scaler",
        "Normalizer",
        "Imputer, then Scaler",
        "FeatureVectorizer",
        "LinearRegressor",
        "TreeEnsembleRegressor",
        "SVMClassifier",
    ],
)
def test_operators_that_inference_has_no_rule_for_are_typed_as_they_run(store, tmp_path, nodes, inner, shape) -> None:
    artifact = import_model(write(graph_of(nodes, {"y": (TensorProto.FLOAT, 2)}), tmp_path / "m.onnx"), store)
    assert shapes(artifact) == {"y": shape}
    dtype, dims = Graph(read_model(artifact)).specs[inner].dtype, Graph(read_model(artifact)).specs[inner].shape
    assert (dtype, dims) == ("float32", shape)
    got = run_reference(artifact.entry, {"x": np.ones((4, 3), np.float32)})["y"]
    assert got.dtype == np.float32
    assert got.shape == (4, 3 if isinstance(shape[1], str) else shape[1])


def test_an_output_that_has_the_rows_is_called_by_their_name(store, tmp_path) -> None:
    """As exporters pick a classifier's label: by place, and then made flat."""
    nodes = [
        helper.make_node("ArgMax", ["x"], ["best"], axis=1, keepdims=0),
        helper.make_node("ArrayFeatureExtractor", ["classes", "best"], ["picked"], domain="ai.onnx.ml"),
        helper.make_node("Reshape", ["picked", "flat"], ["label"]),
        helper.make_node("Softmax", ["x"], ["scores"], axis=1),
    ]
    weights = [
        numpy_helper.from_array(np.array([7, 8, 9], np.int64), "classes"),
        numpy_helper.from_array(np.array([-1], np.int64), "flat"),
    ]
    model = graph_of(nodes, {"label": (TensorProto.INT64, 1), "scores": (TensorProto.FLOAT, 2)}, weights=weights)
    samples = Samples({"x": np.random.default_rng(0).standard_normal((6, 3)).astype(np.float32)})
    for given in (None, samples):
        artifact = import_model(write(model, tmp_path / "m.onnx"), store, samples=given)
        assert shapes(artifact) == {"label": ("n",), "scores": ("n", 3)}
        assert artifact.lineage[0].settings["rows of outputs"] == "label"


def constant(name: str, *values: int) -> TensorProto:
    return numpy_helper.from_array(np.array(values, np.int64), name)


WIDE = helper.make_node("Reshape", ["s", "wide"], ["y"])
"""Inference does not see what is left of the rows behind it."""


@pytest.mark.parametrize(
    "nodes",
    [
        pytest.param([helper.make_node("Concat", ["x", "x"], ["s"], axis=0)], id="twice the rows"),
        pytest.param(
            [
                helper.make_node("Slice", ["x", "zero", "seven", "zero"], ["s"]),
            ],
            id="seven rows at most",
        ),
        pytest.param(
            [
                helper.make_node("Shape", ["x"], ["shape"]),
                helper.make_node("Gather", ["shape", "zero"], ["rows"]),
                helper.make_node("TopK", ["x", "rows"], ["s", "places"], axis=0),
            ],
            id="sorted over the rows",
        ),
        pytest.param(
            [
                helper.make_node("ReduceSum", ["x", "one"], ["sum"], keepdims=0),
                helper.make_node("IsNaN", ["sum"], ["bad"]),
                helper.make_node("Not", ["bad"], ["good"]),
                helper.make_node("Compress", ["x", "good"], ["s"], axis=0),
            ],
            id="rows without a NaN",
        ),
        pytest.param([helper.make_node("CumSum", ["x", "first"], ["s"], reverse=1)], id="sums of what follows"),
        pytest.param([helper.make_node("CumSum", ["x", "first"], ["s"])], id="sums of what came before"),
    ],
)
def test_an_output_of_other_rows_keeps_its_own_name(store, tmp_path, nodes) -> None:
    """As many, or as many as some inputs have: to run such a model on several clients' rows would mix them."""
    weights = [constant("wide", -1, 3), constant("zero", 0), constant("seven", 7), constant("one", 1)]
    weights.append(numpy_helper.from_array(np.array(0, np.int64), "first"))
    used = {name for node in (*nodes, WIDE) for name in node.input}
    given = [weight for weight in weights if weight.name in used]
    model = graph_of([*nodes, WIDE], {"y": (TensorProto.FLOAT, 2)}, weights=given)
    artifact = import_model(write(model, tmp_path / "m.onnx"), store)
    assert shapes(artifact)["y"][0] != "n"
    assert "rows of outputs" not in artifact.lineage[0].settings


def test_rows_that_are_all_alike_prove_nothing(store, tmp_path) -> None:
    """A model that sorts its rows gives those of one sample in any order."""
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Gather", ["shape", "zero"], ["rows"]),
        helper.make_node("TopK", ["x", "rows"], ["s", "places"], axis=0),
        WIDE,
    ]
    model = graph_of(nodes, {"y": (TensorProto.FLOAT, 2)}, weights=[constant("wide", -1, 3), constant("zero", 0)])
    samples = Samples({"x": np.array([[1, 2, 3]], np.float32)})
    assert shapes(import_model(write(model, tmp_path / "m.onnx"), store, samples=samples))["y"][0] != "n"


def test_a_function_of_the_models_own_is_not_taken_for_an_operator(store, tmp_path) -> None:
    """It is called as one of ai.onnx.ml, and does something else."""

    def model_of(name: str) -> onnx.ModelProto:
        doubled = helper.make_function(
            *("ai.onnx.ml", name, ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"])]),
            opset_imports=[helper.make_opsetid("", 17)],
        )
        model = graph_of([helper.make_node(name, ["x"], ["y"], domain="ai.onnx.ml")], {"y": (TensorProto.FLOAT, 2)})
        model.functions.append(doubled)
        return model

    artifact = import_model(write(model_of("TreeEnsembleRegressor"), tmp_path / "m.onnx"), store)
    assert shapes(artifact)["y"][1] != 1
    got = run_reference(artifact.entry, {"x": np.ones((2, 3), np.float32)})["y"]
    assert got.tolist() == [[2.0] * 3] * 2
    with pytest.raises(BadInput, match="ZipMap"):  # which ONNX itself takes for its own
        import_model(write(model_of("ZipMap"), tmp_path / "m.onnx"), store)


@pytest.mark.parametrize("value", [b"\xff\xfe", "reference"])
def test_classes_that_cannot_be_read_are_one_clear_line(store, tmp_path, value) -> None:
    node = helper.make_node("ZipMap", ["x"], ["y"], name="zip", domain="ai.onnx.ml")
    node.attribute.add(name="classlabels_strings", type=onnx.AttributeProto.STRING)
    if value == "reference":
        node.attribute[0].ref_attr_name = "elsewhere"
    else:
        node.attribute[0].s = value
    model = graph_of([node], {"y": (TensorProto.FLOAT, 2)})
    with pytest.raises(BadInput, match=r"'classlabels_strings' .* must be a list"):
        import_model(write(model, tmp_path / "m.onnx"), store)


def test_a_name_that_the_exporter_gave_stays(store, tmp_path) -> None:
    model = graph_of(
        [helper.make_node("Relu", ["x"], ["s"]), WIDE], {"y": (TensorProto.FLOAT, 2)}, weights=[constant("wide", -1, 3)]
    )
    assert shapes(import_model(write(model, tmp_path / "m.onnx"), store)) == {"y": ("n", 3)}
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_param = "kept"
    assert shapes(import_model(write(model, tmp_path / "m.onnx"), store)) == {"y": ("kept", 3)}


def test_a_model_that_cannot_be_run_so_keeps_its_names(store, tmp_path) -> None:
    square = graph_of([helper.make_node("Relu", ["x"], ["s"]), WIDE], {"y": (TensorProto.FLOAT, 2)}, width="n")
    square.graph.initializer.append(constant("wide", -1, 1))
    assert shapes(import_model(write(square, tmp_path / "m.onnx"), store))["y"][0] != "n"

    vast = graph_of([helper.make_node("Relu", ["x"], ["s"]), WIDE], {"y": (TensorProto.FLOAT, 2)}, width=2**40)
    vast.graph.initializer.append(constant("wide", -1, 1))
    assert shapes(import_model(write(vast, tmp_path / "m.onnx"), store))["y"][0] != "n"


def test_a_model_that_fails_on_some_rows_keeps_its_names(store, tmp_path) -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["s"]),
        WIDE,
        helper.make_node("Reshape", ["x", "seven"], ["z"]),
    ]
    weights = [constant("wide", -1, 3), constant("seven", 7, 3)]
    model = graph_of(nodes, {"y": (TensorProto.FLOAT, 2), "z": (TensorProto.FLOAT, 2)}, weights=weights)
    found = shapes(import_model(write(model, tmp_path / "m.onnx"), store))
    assert found["z"] == (7, 3)
    assert found["y"][0] != "n"


@pytest.mark.parametrize(
    ("labels", "columns"),
    [({"classlabels_int64s": [0, 1, 2]}, "0, 1, 2"), ({"classlabels_strings": ["a", "b", "c"]}, "a, b, c")],
)
def test_probabilities_come_as_a_tensor_and_not_as_dictionaries(store, tmp_path, labels, columns) -> None:
    """As skl2onnx writes every classifier unless it is told otherwise."""
    node = onnx.NodeProto()
    node.CopyFrom(FOREST)
    zipped = helper.make_node("ZipMap", ["scores"], ["output_probability"], domain="ai.onnx.ml", **labels)
    model = graph_of([node, zipped], {"label": (TensorProto.INT64, 1)})
    kind = TensorProto.INT64 if "classlabels_int64s" in labels else TensorProto.STRING
    dictionary = helper.make_map_type_proto(kind, helper.make_tensor_type_proto(TensorProto.FLOAT, None))
    model.graph.output.append(helper.make_value_info("output_probability", helper.make_sequence_type_proto(dictionary)))
    artifact = import_model(write(model, tmp_path / "forest.onnx"), store)
    assert shapes(artifact) == {"label": ("n",), "output_probability": ("n", 3)}
    told = artifact.lineage[0].settings["tensors instead of dictionaries"]
    assert told == f"output_probability: columns {columns}"
    got = run_reference(artifact.entry, {"x": np.array([[-1, 0, 0], [1, 0, 0]], np.float32)})
    assert got["output_probability"].argmax(axis=1).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("kind", "wrong", "word"),
    [
        ("LinearRegressor", {"targets": "two"}, "'last : targets'. Expected: 'INT', actual: 'STRING'"),
        ("LinearRegressor", {"targets": 0}, "'targets' .* must be a whole number from 1 on"),
        ("TreeEnsembleRegressor", {"n_targets": 2**40}, "'n_targets' .* must be a whole number from 1 on"),
        ("TreeEnsembleRegressor", {"target_ids": [-2]}, "'target_ids' .* must be whole numbers from 0 on"),
        ("FeatureVectorizer", {"inputdimensions": [-1]}, "'inputdimensions' .* must be whole numbers from 0 on"),
        ("TreeEnsembleClassifier", {"classlabels_int64s": [0, 1]}, "output size 1 not in range"),
        ("SVMClassifier", {"classlabels_ints": [0, 1]}, "output size 1 not in range"),
    ],
)
def test_an_attribute_of_another_kind_is_one_clear_line(store, tmp_path, kind, wrong, word) -> None:
    node = helper.make_node(kind, ["x"], ["y"], name="last", domain="ai.onnx.ml", **wrong)
    with pytest.raises(BadInput, match=word):
        import_model(write(graph_of([node], {"y": (TensorProto.FLOAT, 2)}), tmp_path / "m.onnx"), store)
