"""Models of scikit-learn's kind: operators of ai.onnx.ml, and outputs that lose sight of their rows."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

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


def test_an_output_with_another_length_keeps_its_own_name(store, tmp_path) -> None:
    """Twice the rows are as many as they are for one length alone; and a model that cannot run tells nothing."""
    nodes = [
        helper.make_node("Concat", ["x", "x"], ["both"], axis=0),
        helper.make_node("Reshape", ["both", "wide"], ["y"]),
        helper.make_node("Reshape", ["x", "wide"], ["z"]),
    ]
    weights = [numpy_helper.from_array(np.array([-1, 3], np.int64), "wide")]
    model = graph_of(nodes, {"y": (TensorProto.FLOAT, 2), "z": (TensorProto.FLOAT, 2)}, weights=weights)
    found = shapes(import_model(write(model, tmp_path / "m.onnx"), store))
    assert found["y"][0] != "n"
    assert found["z"] == ("n", 3)

    fixed = [numpy_helper.from_array(np.array([7, 3], np.int64), "seven")]
    broken = [
        helper.make_node("Reshape", ["x", "seven"], ["s"]),
        helper.make_node("NonZero", ["s"], ["places"]),
        helper.make_node("Transpose", ["places"], ["y"], perm=[1, 0]),
    ]
    model = graph_of(broken, {"y": (TensorProto.INT64, 2)}, weights=fixed)
    assert shapes(import_model(write(model, tmp_path / "m.onnx"), store))["y"][0] != "n"
