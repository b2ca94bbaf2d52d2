from __future__ import annotations

import itertools

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from hasten.errors import BuildFailed
from hasten.graph.model import Graph
from hasten.graph.rewrite import Edit, remove_dead, rename_uses, until_stable


def chain(*kinds: str, outputs: tuple[str, ...] = ()) -> onnx.ModelProto:
    """x -> kind_0 -> t0 -> kind_1 -> t1 ...; the last tensor and ``outputs`` are outputs."""
    names = ["x", *(f"t{i}" for i in range(len(kinds)))]
    nodes = [
        helper.make_node(kind, [a], [b], name=f"n{i}")
        for i, (kind, (a, b)) in enumerate(zip(kinds, itertools.pairwise(names), strict=True))
    ]
    results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, (3,)) for name in (*outputs, names[-1])]
    graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, (3,))], results)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def text(model: onnx.ModelProto) -> list[str]:
    return [f"{','.join(n.output)}={n.op_type}({','.join(n.input)})" for n in model.graph.node]


def drop(model: onnx.ModelProto, kind: str) -> int:
    edit = Edit(Graph(model))
    for node in edit.graph.nodes:
        if node.op_type == kind:
            edit.bypass(node)
    return edit.commit()


def test_users_of_a_dropped_node_use_what_it_used():
    model = chain("Neg", "Identity", "Identity", "Abs")
    drop(model, "Identity")
    assert text(model) == ["t0=Neg(x)", "t3=Abs(t0)"]


def test_a_dropped_node_that_made_an_output_passes_the_name_on():
    model = chain("Neg", "Identity")
    drop(model, "Identity")
    assert text(model) == ["t1=Neg(x)"]


def test_a_chain_of_dropped_nodes_down_to_an_output_needs_two_rounds_and_ends_right():
    model = chain("Neg", "Identity", "Identity")
    assert until_stable(model, [lambda m: drop(m, "Identity")], who="test") > 0
    assert text(model) == ["t2=Neg(x)"]


def test_who_reads_the_middle_of_a_dropped_chain_reads_the_output_that_it_leads_to():
    model = chain("Neg", "Identity", "Identity")
    model.graph.node.append(helper.make_node("Abs", ["t1"], ["z"], name="beside"))
    model.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, (3,)))
    drop(model, "Identity")
    onnx.checker.check_model(model, full_check=True)
    assert text(model)[-1] in ("z=Abs(t1)", "z=Abs(t2)", "z=Abs(t0)")
    until_stable(model, [lambda m: drop(m, "Identity")], who="test")
    onnx.checker.check_model(model, full_check=True)
    assert text(model) == ["t2=Neg(x)", "z=Abs(t2)"]


@pytest.mark.parametrize("outputs", [(), ("t0",)])
def test_an_identity_from_an_input_or_between_outputs_stays(outputs):
    kinds = ("Neg", "Identity") if outputs else ("Identity",)
    model = chain(*kinds, outputs=outputs)
    assert drop(model, "Identity") == 0
    assert len(model.graph.node) == len(kinds)


def test_a_node_is_replaced_in_its_place_under_its_name():
    model = chain("Neg", "Abs", "Neg")
    edit = Edit(Graph(model))
    middle = edit.graph.nodes[1]
    constant = edit.constant(np.ones(3, np.float32), "one")
    edit.replace(middle, edit.make("Add", ["t0", constant], "sum"), edit.make("Relu", ["sum"], "t1"))
    assert edit.commit() > 0
    assert text(model) == ["t0=Neg(x)", "sum=Add(t0,one)", "t1=Relu(sum)", "t2=Neg(t1)"]
    onnx.checker.check_model(model, full_check=True)


def test_names_are_never_given_twice():
    edit = Edit(Graph(chain("Neg")))
    assert [edit.name("t0"), edit.name("t0"), edit.name("new"), edit.name("new")] == ["t0_1", "t0_2", "new", "new_1"]


def test_no_change_leaves_every_byte():
    model = chain("Neg", "Abs")
    before = model.SerializeToString()
    assert Edit(Graph(model)).commit() == 0
    assert model.SerializeToString() == before


def test_renaming_reaches_into_branches_but_not_what_they_bring_themselves():
    inner = helper.make_graph(
        [helper.make_node("Add", ["a", "b"], ["c"])], "g", [], [helper.make_tensor_value_info("c", 1, None)]
    )
    inner.initializer.append(numpy_helper.from_array(np.ones(1, np.float32), "b"))
    node = helper.make_node("If", ["a"], ["y"], then_branch=inner, else_branch=inner)
    rename_uses(node, {"a": "A", "b": "B"})
    assert list(node.input) == ["A"]
    assert [list(item.g.node[0].input) for item in node.attribute] == [["A", "b"], ["A", "b"]]


def test_what_no_output_depends_on_is_removed():
    model = chain("Neg", "Abs")
    model.graph.node.append(helper.make_node("Exp", ["t0"], ["unused"]))
    model.graph.node.append(helper.make_node("Log", ["unused"], ["unused_too"]))
    model.graph.initializer.append(numpy_helper.from_array(np.ones(1), "nobody"))
    assert remove_dead(model) == 3
    assert text(model) == ["t0=Neg(x)", "t1=Abs(t0)"]
    assert remove_dead(model) == 0


def test_an_input_that_nobody_uses_stays():
    model = chain("Neg")
    model.graph.input.append(helper.make_tensor_value_info("spare", TensorProto.FLOAT, (1,)))
    assert remove_dead(model) == 0
    assert len(model.graph.input) == 2


def test_an_initializer_that_is_an_output_stays():
    model = chain("Neg")
    model.graph.initializer.append(numpy_helper.from_array(np.ones(3, np.float32), "fixed"))
    model.graph.output.append(helper.make_tensor_value_info("fixed", TensorProto.FLOAT, (3,)))
    assert remove_dead(model) == 0


def test_rules_that_undo_each_other_are_an_error_and_no_hang():
    def turn(model: onnx.ModelProto) -> int:
        model.graph.node[0].op_type = "Abs" if model.graph.node[0].op_type == "Neg" else "Neg"
        return 1

    with pytest.raises(BuildFailed, match="still changes"):
        until_stable(chain("Neg"), [turn], who="fold")
