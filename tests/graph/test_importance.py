"""Norms of units: what a filter weighs, whatever form the graph keeps it in."""

from dataclasses import replace

import numpy as np
import pytest

from hasten.errors import InvalidSetting
from hasten.graph.groups import channel_groups
from hasten.graph.importance import largest, unit_norms
from hasten.graph.model import Graph, read_model
from hasten.passes.fold import Fold
from hasten.passes.quantize_static import QuantizeStatic
from hasten.testing.models import Builder, convnet, encoder, mlp, random_samples, stored
from hasten.transform import run_pass


def by_name(model):
    return {group.name: group for group in channel_groups(model)}


def test_a_single_layer_scores_its_rows_by_their_norm_relative_to_the_mean() -> None:
    model = mlp()
    weight = Graph(model).constant("w0")
    for order in (1, 2):
        norms = np.linalg.norm(weight, order, axis=1)
        assert unit_norms(model, by_name(model)["gemm_0"], order) == pytest.approx(norms / norms.mean(), rel=1e-6)


def test_the_bias_does_not_count() -> None:
    model = mlp()
    before = unit_norms(model, by_name(model)["gemm_0"], 1)
    bias = next(tensor for tensor in model.graph.initializer if tensor.name == "w1")
    bias.raw_data = (100 * np.ones(32, np.float32)).tobytes()
    assert np.array_equal(unit_norms(model, by_name(model)["gemm_0"], 1), before)


def test_layers_that_make_the_same_units_count_alike_whatever_their_scale() -> None:
    def residual(scale):
        net = Builder(0)
        first = net.add("Gemm", "x", net.weight(8, 4), transB=1)
        second = net.add("Gemm", "x", net.weight(8, 4, scale=scale), transB=1)
        h = net.add("Relu", net.add("Add", first, second))
        net.add("Gemm", h, net.weight(3, 8), transB=1)
        return net.model(("x", ("batch", 4)), ("y", ("batch", 3)))

    small, large = residual(1.0), residual(1000.0)
    (group,) = channel_groups(small)
    assert unit_norms(small, group, 2) == pytest.approx(unit_norms(large, channel_groups(large)[0], 2), rel=1e-5)


def test_folding_batch_norm_changes_no_score(store, ctx) -> None:
    source = stored(convnet(), store)
    before, after = read_model(source), read_model(run_pass(Fold(), source, store, ctx))
    groups = by_name(after)
    for name, group in by_name(before).items():
        assert unit_norms(before, group, 2) == pytest.approx(unit_norms(after, groups[name], 2), rel=1e-4)


def test_quantized_weights_count_as_what_they_stand_for(store, ctx) -> None:
    folded = run_pass(Fold(), stored(convnet(width=16), store), store, ctx)
    made = run_pass(QuantizeStatic(), folded, store, replace(ctx, samples=random_samples(folded)))
    plain, quantized = read_model(folded), read_model(made)
    groups = by_name(quantized)
    assert groups
    for name, group in groups.items():
        expected = unit_norms(plain, by_name(plain)[name], 1)
        assert unit_norms(quantized, group, 1) == pytest.approx(expected, rel=0.02)


def test_a_unit_of_several_channels_scores_all_of_them() -> None:
    model = encoder(width=16, heads=2)
    for group in channel_groups(model):
        scores = unit_norms(model, group, 1)
        assert scores.shape == (group.size,)
        assert (scores > 0).all()


def test_the_largest_stay_and_of_equals_the_first() -> None:
    assert largest([3.0, 1.0, 3.0, 2.0], 2) == (0, 2)
    assert largest([1.0, 1.0, 1.0], 2) == (0, 1)


@pytest.mark.parametrize("n", [0, 4])
def test_more_units_than_there_are_cannot_be_kept(n) -> None:
    with pytest.raises(InvalidSetting, match="of 3"):
        largest([1.0, 2.0, 3.0], n)
