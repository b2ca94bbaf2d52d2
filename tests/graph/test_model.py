from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from hasten.artifact import Artifact, Step
from hasten.errors import BadInput
from hasten.graph import model as graph_model
from hasten.graph.model import (
    Graph,
    attribute,
    infer_shapes,
    opset_of,
    read_model,
    refresh_shapes,
    signature_of,
    skeleton_of,
    write_model,
)
from hasten.tensors import TensorSpec
from hasten.testing.models import MODELS, convnet, encoder, mlp


def specs(model: onnx.ModelProto) -> dict[str, TensorSpec]:
    return Graph(infer_shapes(model)).specs


@pytest.mark.parametrize("name", MODELS)
def test_every_inner_tensor_gets_a_shape(name):
    model = MODELS[name]()
    found = specs(model)
    assert all(output in found for node in model.graph.node for output in node.output)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_written_reads_back_with_its_signature(name, tmp_path):
    model = MODELS[name]()
    made = write_model(model, tmp_path)
    assert made.signature == signature_of(model)
    assert [n.op_type for n in read_model(made).graph.node] == [n.op_type for n in model.graph.node]


def test_writing_the_same_twice_gives_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    first, second = (write_model(convnet(), tmp_path / name) for name in ("a", "b"))
    assert first.content == second.content


def test_traits_follow_the_source_and_what_is_added_and_removed(tmp_path):
    source = Artifact.of(tmp_path, "x", format="onnx", signature=signature_of(mlp()), traits=("int8", "pruned"))
    (tmp_path / "new").mkdir()
    made = write_model(mlp(), tmp_path / "new", source, add=("folded",), remove=("int8",))
    assert made.traits == {"pruned", "folded"}


def test_large_weights_go_into_a_file_of_their_own_and_come_back(tmp_path, monkeypatch):
    monkeypatch.setattr(graph_model, "EXTERNAL_FROM_BYTES", 1000)
    model = mlp(hidden=64)
    made = write_model(model, tmp_path)
    assert set(made.files) == {"model.onnx", "model.onnx.data"}
    again = {t.name: numpy_helper.to_array(t) for t in read_model(made).graph.initializer}
    for tensor in model.graph.initializer:
        np.testing.assert_array_equal(again[tensor.name], numpy_helper.to_array(tensor))


def test_writing_leaves_the_model_in_memory_as_it_was(tmp_path):
    model = mlp()
    before = model.SerializeToString()
    write_model(model, tmp_path)
    assert model.SerializeToString() == before


def test_a_graph_that_breaks_the_rules_is_not_written(tmp_path):
    model = mlp()
    model.graph.node[0].input[0] = "nowhere"
    with pytest.raises(onnx.checker.ValidationError, match="nowhere"):
        write_model(model, tmp_path)


def test_outputs_keep_the_names_of_their_dimensions_and_gain_what_they_lack():
    model = convnet()
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_param = "rows"
    del model.graph.output[0].type.tensor_type.shape.dim[1:]
    model.graph.output[0].type.tensor_type.shape.dim.add()
    refresh_shapes(model)
    assert signature_of(model).outputs[0].shape == ("rows", 4)


def test_an_output_without_a_shape_gets_the_inferred_one():
    model = mlp()
    model.graph.output[0].type.tensor_type.ClearField("shape")
    with pytest.raises(BadInput, match="'y' is not a tensor of known rank"):
        signature_of(model)
    refresh_shapes(model)
    assert signature_of(model).outputs[0].shape == ("batch", 4)


def test_a_claim_about_a_shape_that_is_stale_is_forgotten():
    model = mlp()
    first = model.graph.node[0].output[0]
    model.graph.value_info.append(helper.make_tensor_value_info(first, TensorProto.FLOAT, ("batch", 999)))
    refresh_shapes(model)
    assert Graph(model).specs[first].shape == ("batch", 32)


def test_shapes_behind_an_operator_that_nobody_knows_are_taken_on_trust():
    model = mlp()
    model.graph.node[1].domain = "com.example"
    model.opset_import.append(helper.make_opsetid("com.example", 1))
    model.graph.value_info.append(
        helper.make_tensor_value_info(model.graph.node[1].output[0], TensorProto.FLOAT, ("batch", 32))
    )
    refresh_shapes(model)
    assert Graph(model).specs[model.graph.node[2].output[0]].shape == ("batch", 32)


def test_a_dimension_without_a_name_gets_one_of_its_own():
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, (None, 3, "n"))
    assert graph_model.spec_of(value) == TensorSpec("x", "float32", ("x_dim0", 3, "n"))


def test_inputs_that_are_initializers_are_not_in_the_signature():
    model = mlp()
    weight = model.graph.initializer[0]
    model.graph.input.append(helper.make_tensor_value_info(weight.name, weight.data_type, weight.dims))
    assert [spec.name for spec in signature_of(model).inputs] == ["x"]


def test_who_makes_and_who_uses_each_tensor():
    graph = Graph(encoder())
    shared = "x"
    assert [node.op_type for node in graph.consumers[shared]] == ["MatMul"] * 3 + ["Add"]
    assert graph.only_consumer(shared) is None
    first = graph.nodes[0]
    assert graph.producers[first.output[0]] is first
    assert graph.producer(first.output[0], "MatMul") is first
    assert graph.producer(first.output[0], "Conv") is None
    assert graph.only_consumer(first.output[0]) is graph.nodes[3]


def test_an_output_has_no_only_consumer():
    model = mlp()
    model.graph.output.append(helper.make_tensor_value_info(model.graph.node[0].output[0], 1, ("batch", 32)))
    assert Graph(model).only_consumer(model.graph.node[0].output[0]) is None


def test_a_node_that_uses_a_tensor_twice_is_one_user():
    model = mlp()
    model.graph.node.append(helper.make_node("Mul", ["y", "y"], ["z"]))
    assert len(Graph(model).consumers["y"]) == 1


def branch(*nodes: onnx.NodeProto, output: str) -> onnx.GraphProto:
    return helper.make_graph(list(nodes), "g", [], [helper.make_tensor_value_info(output, 1, None)])


def test_what_a_graph_inside_a_node_takes_from_outside_is_used_by_the_node():
    inner = branch(helper.make_node("Add", ["outer", "mine"], ["z"]), output="z")
    inner.initializer.append(numpy_helper.from_array(np.ones(1, np.float32), "mine"))
    deep = branch(
        helper.make_node("If", ["flag"], ["w"], then_branch=inner, else_branch=branch(output="passed")), output="w"
    )
    node = helper.make_node("If", ["c"], ["y"], then_branch=deep, else_branch=deep)
    graph = helper.make_graph([node], "g", [], [helper.make_tensor_value_info("y", 1, None)])
    assert set(Graph(helper.make_model(graph)).consumers) == {"c", "outer", "flag", "passed"}


def test_attributes_come_as_python_values():
    node = helper.make_node("Any", [], [], i=3, f=0.5, s="text", ints=[1, 2])
    values = [attribute(node, name) for name in ("i", "f", "s", "ints")]
    assert values == [3, 0.5, "text", [1, 2]]
    assert attribute(node, "missing", 7) == 7


def test_the_version_of_the_operator_set_is_read_under_both_spellings():
    for domain in ("", "ai.onnx"):
        model = onnx.ModelProto(opset_import=[helper.make_opsetid("x", 3), helper.make_opsetid(domain, 17)])
        assert opset_of(model) == 17


def test_lineage_is_added_by_others(tmp_path):
    made = write_model(mlp(), tmp_path)
    assert made.lineage == ()
    assert made.after(Step(name="import"), source=None).lineage[0].name == "import"


def test_two_graphs_that_differ_in_weights_alone_have_one_skeleton() -> None:
    assert skeleton_of(convnet(seed=1)) == skeleton_of(convnet(seed=2))


def test_a_wider_graph_has_another_skeleton() -> None:
    assert skeleton_of(convnet(width=8)) != skeleton_of(convnet(width=16))


def test_another_shape_to_reshape_to_is_another_skeleton() -> None:
    graph = encoder()
    before = skeleton_of(graph)
    shapes = [t for t in graph.graph.initializer if t.data_type == onnx.TensorProto.INT64]
    shapes[0].CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(shapes[0])[::-1].copy(), shapes[0].name))
    assert skeleton_of(graph) != before
