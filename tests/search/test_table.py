"""The table: which options there are, and what each loses alone."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from onnx import TensorProto, helper

from hasten.errors import BadInput, SignatureMismatch
from hasten.graph.groups import channel_groups
from hasten.graph.model import read_model
from hasten.isolation import Limits
from hasten.metrics import load_metric
from hasten.passes.recalibrate import recalibrated
from hasten.search.exclusions import NodeSensitivity
from hasten.search.table import (
    Row,
    Sensitivities,
    Site,
    change_of,
    divergence,
    keep_of,
    losses,
    measured_sites,
    metric_drop,
    node_rows,
    precision_sites,
    sensitivities,
    width_sites,
)
from hasten.testing.models import Builder, convnet, encoder, mlp, random_samples, stored

LIMITS = Limits(seconds=60)


def table(site, errors, *, kind="width"):
    """Make a table with an error for each option behind the untouched one."""
    rows = [
        Row(site=site.name, kind=kind, option=option, error=error, kl=None, drop=None)
        for option, error in zip(site.options[1:], errors, strict=True)
    ]
    return Sensitivities(rows=tuple(rows), failures={})


@pytest.fixture
def labelled(store, tmp_path):
    """An MLP, and samples labelled with its own answers."""
    source = stored(mlp(hidden=32), store)
    samples = random_samples(source, n=100)
    weights = [np.frombuffer(t.raw_data, np.float32).reshape(t.dims) for t in read_model(source).graph.initializer]
    hidden = samples.inputs["x"]
    for w, b in zip(weights[:4:2], weights[1:4:2], strict=True):
        hidden = np.maximum(hidden @ w.T + b, 0)
    answers = (hidden @ weights[4].T + weights[5]).argmax(axis=1)
    replace(samples, labels=answers).save(tmp_path / "samples")
    return source, tmp_path / "samples"


def test_widths_fall_from_all_units_on_the_grid() -> None:
    sites = {site.name: site.options for site in width_sites(channel_groups(convnet(width=32)))}
    assert sites["conv_0"] == (32, 24, 16, 8)
    assert sites["conv_9"] == (64, 56, 48, 40, 32, 24, 16)


def test_a_group_too_small_for_the_grid_has_no_site() -> None:
    assert width_sites(channel_groups(mlp(hidden=6))) == ()


def test_heads_are_cut_one_by_one_where_each_is_a_multiple_of_the_grid() -> None:
    sites = {site.name: site.options for site in width_sites(channel_groups(encoder(width=64, heads=4)))}
    assert sites["matmul_0"][:3] == (4, 3, 2)


def test_a_choice_says_what_is_cut_and_what_is_in_int8() -> None:
    sites = (Site("a", "width", (16, 8)), Site("b", "width", (32, 24, 16)), *precision_sites(["c", "d"]))
    change = change_of(sites, (0, 2, 0, 1))
    assert dict(change.widths) == {"b": 16}
    assert change.int8 == ("d",)


def test_the_most_important_units_stay() -> None:
    model = mlp(hidden=32)
    scores = {"gemm_0": np.arange(32.0)}
    assert keep_of(model, {"gemm_0": 8}, scores=scores) == {"gemm_0": tuple(range(24, 32))}
    by_norm = keep_of(model, {"gemm_0": 8})["gemm_0"]
    norms = np.linalg.norm(np.frombuffer(model.graph.initializer[0].raw_data, np.float32).reshape(32, 16), axis=1)
    assert set(by_norm) == set(np.argsort(-norms)[:8])


def test_each_option_is_measured_alone_and_narrower_loses_more(labelled, store) -> None:
    source, samples = labelled
    sites = width_sites(channel_groups(read_model(source)))
    found = sensitivities(source, sites, store, samples, limits=LIMITS, metric="accuracy")
    assert {(row.site, row.option) for row in found.rows} == {(s.name, o) for s in sites for o in s.options[1:]}
    assert not found.failures
    for site in sites:
        rows = [found.row(site, option) for option in site.options[1:]]
        assert rows[0].kl > 0
        assert rows[0].error < rows[-1].error
        assert rows[0].drop <= rows[-1].drop
        assert rows[-1].drop > 0


def test_a_cut_is_judged_with_the_statistics_that_its_batch_norms_then_have(store, ctx, tmp_path) -> None:
    rough = stored(convnet(width=32), store)
    samples = random_samples(rough, n=128)
    samples.save(tmp_path / "samples")
    source = stored(recalibrated(read_model(rough), samples, ctx), store)  # one whose statistics are true
    sites = width_sites(channel_groups(read_model(source)), shares=(0.5,))
    ask = {"limits": LIMITS}
    old = sensitivities(source, sites, store, tmp_path / "samples", **ask)
    new = sensitivities(source, sites, store, tmp_path / "samples", calibrate=tmp_path / "samples", **ask)
    assert not new.failures
    assert sum(row.error for row in new.rows) < 0.8 * sum(row.error for row in old.rows)


def test_units_are_chosen_by_the_scores_that_are_given(labelled, store) -> None:
    source, samples = labelled
    sites = width_sites(channel_groups(read_model(source)), shares=(0.75,))
    norms = sensitivities(source, sites, store, samples, limits=LIMITS)
    worst = {site.name: -np.arange(32.0) for site in sites}
    first = sensitivities(source, sites, store, samples, limits=LIMITS, scores=worst)
    assert all(row.drop is None for row in first.rows)
    assert [row.error for row in first.rows] != [row.error for row in norms.rows]


def test_cut_short_the_table_knows_the_narrowest_option_of_every_site(labelled, store) -> None:
    source, samples = labelled
    sites = width_sites(channel_groups(read_model(source)))
    calls = iter(range(100))
    found = sensitivities(source, sites, store, samples, limits=LIMITS, deadline=lambda: next(calls) >= len(sites))
    assert [(row.site, row.option) for row in found.rows] == [(site.name, site.options[-1]) for site in sites]
    assert measured_sites(sites, found) == tuple(
        Site(site.name, site.kind, (site.options[0], site.options[-1])) for site in sites
    )


def test_an_option_that_fails_has_no_row_and_the_others_are_measured(labelled, store) -> None:
    source, samples = labelled
    sites = (Site("nowhere", "width", (32, 8)), Site("gemm_0", "width", (32, 8)))
    found = sensitivities(source, sites, store, samples, limits=LIMITS)
    assert [row.site for row in found.rows] == ["gemm_0"]
    assert "nowhere=8" in found.failures


def test_a_table_that_was_cut_short_goes_on_where_it_stopped(labelled, store) -> None:
    source, samples = labelled
    sites = (Site("nowhere", "width", (32, 8)), *width_sites(channel_groups(read_model(source))))
    kept = []
    whole = sensitivities(source, sites, store, samples, limits=LIMITS, keep=kept.append)
    assert len(kept) == len(whole.rows) + len(whole.failures)
    assert kept[-1] == whole
    asked = []
    rest = sensitivities(
        source, sites, store, samples, limits=LIMITS, known=kept[2], progress=lambda text, _: asked.append(text)
    )
    assert rest == whole
    assert len(asked) == len(kept) - 3
    assert sensitivities(source, sites, store, samples, limits=LIMITS, known=whole, deadline=lambda: True) == whole


def test_a_width_whose_outputs_are_not_finite_is_one_that_failed(store, tmp_path) -> None:
    """0/0 where the only channels that were not zero are gone."""
    net = Builder(0)
    first = net.constant(np.concatenate([np.zeros((8, 16)), np.ones((24, 16))]).astype(np.float32))
    h = net.add("Gemm", "x", first, transB=1)
    h = net.add("Gemm", h, net.constant(np.ones((3, 32), np.float32)), transB=1)
    net.nodes.append(helper.make_node("Div", [h, net.add("Abs", h)], ["y"]))
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", n]) for name, n in (("x", 16), ("y", 3))]
    graph = helper.make_graph(net.nodes, "net", ends[:1], ends[1:], net.weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=8)
    source = stored(model, store)
    samples = random_samples(source, n=20)
    samples.save(tmp_path / "samples")
    (site,) = width_sites(channel_groups(model), shares=(0.25,))
    worst = {site.name: -np.arange(32.0)}  # keeps the eight channels of zeros
    found = sensitivities(source, (site,), store, tmp_path / "samples", limits=LIMITS, scores=worst)
    assert not found.rows
    assert "not finite" in found.failures[f"{site.name}={site.options[-1]}"]


def test_samples_that_do_not_fit_are_an_error_and_no_row(store, tmp_path) -> None:
    source = stored(mlp(hidden=32), store)
    random_samples(stored(convnet(), store)).save(tmp_path / "wrong")
    site = Site("gemm_0", "width", (32, 8))
    with pytest.raises(SignatureMismatch, match="wants 2 dimensions"):
        sensitivities(source, [site], store, tmp_path / "wrong", limits=LIMITS)


def test_losses_never_fall_as_more_is_taken_away() -> None:
    site = Site("a", "width", (32, 24, 16, 8))
    assert losses([site], table(site, [0.2, 0.1, 0.5]), by="error") == ((0.0, 0.2, 0.2, 0.5),)


@pytest.mark.parametrize("error", [float("inf"), float("nan")])
def test_a_loss_that_is_not_finite_is_refused_by_name(error) -> None:
    site = Site("a", "width", (32, 24))
    with pytest.raises(BadInput, match="a=24"):
        losses([site], table(site, [error]), by="error")


def test_a_loss_that_was_not_measured_is_refused_by_name() -> None:
    site = Site("a", "width", (32, 24))
    with pytest.raises(BadInput, match="a=24 has None for its kl"):
        losses([site], table(site, [0.1]), by="kl")


def test_nodes_in_int8_join_the_table() -> None:
    (site,) = precision_sites(["conv_0"])
    found = Sensitivities(rows=node_rows([NodeSensitivity(node="conv_0", error=0.1, kl=0.2)]), failures={})
    assert losses([site], found, by="kl") == ((0.0, 0.2),)


rows = arrays(np.float32, (5, 4), elements=st.floats(-5, 5, width=32))


@settings(max_examples=30, deadline=None)
@given(rows, rows)
def test_a_divergence_is_never_negative_and_zero_for_itself(a, b) -> None:
    error, kl = divergence({"y": a}, {"y": b})
    assert error >= 0
    assert kl >= 0
    assert divergence({"y": a}, {"y": a}) == (0.0, 0.0)


def test_probabilities_are_taken_as_they_are_and_scores_by_their_softmax() -> None:
    scores = np.log(np.array([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]]))
    other = np.log(np.array([[0.6, 0.3, 0.1], [0.2, 0.1, 0.7]]))
    p, q = np.exp(scores), np.exp(other)
    expected = float((p * np.log(p / q)).sum(axis=1).mean())
    assert divergence({"y": p}, {"y": q})[1] == pytest.approx(expected)
    assert divergence({"y": scores + 3}, {"y": other - 1})[1] == pytest.approx(expected)


def test_classes_of_images_are_on_their_axis() -> None:
    """A shift of every score of a place changes no probability, whatever it is over the width."""
    scores = np.random.default_rng(0).standard_normal((2, 3, 4, 5))
    shift = np.random.default_rng(1).standard_normal((2, 1, 4, 5))
    assert divergence({"y": scores}, {"y": scores + shift})[1] == pytest.approx(0.0, abs=1e-12)
    assert (divergence({"y": scores}, {"y": scores + shift.swapaxes(1, 3)[:, :3]})[1] or 0) > 0.01


def test_outputs_without_classes_have_an_error_only() -> None:
    assert divergence({"y": np.array([3.0, 4.0])}, {"y": np.array([3.0, 3.0])}) == (pytest.approx(1 / 25), None)


def test_outputs_that_are_not_finite_are_infinitely_far() -> None:
    got = divergence({"y": np.ones((2, 3))}, {"y": np.full((2, 3), np.nan)})
    assert got == (float("inf"), float("inf"))


@pytest.mark.parametrize("masked", [-np.inf, np.nan])
def test_what_both_sides_have_masked_is_no_difference(masked) -> None:
    a = np.array([[1.0, 2.0, masked], [0.5, masked, 0.25]])
    assert divergence({"y": a}, {"y": a.copy()}) == (0.0, 0.0)
    error, kl = divergence({"y": a}, {"y": a + np.array([[0.1, 0.0, 0.0], [0.0, 0.0, 0.0]])})
    assert 0 < error < 1
    assert 0 < kl < 1
    p, q = (np.exp(row) / np.exp(row).sum() for row in (np.array([1.0, 2.0]), np.array([1.1, 2.0])))
    assert kl == pytest.approx(float((p * np.log(p / q)).sum()) / 2, rel=1e-6)
    assert divergence({"y": a}, {"y": np.where(np.isfinite(a), a, 0.0)}) == (float("inf"), float("inf"))


def test_a_drop_is_absolute_for_metrics_within_one_and_a_share_for_others() -> None:
    labels = np.array([0, 1])
    right, wrong = np.array([[2.0, 1.0], [1.0, 2.0]]), np.array([[1.0, 2.0], [1.0, 2.0]])
    assert metric_drop(load_metric("accuracy"), {"y": right}, {"y": wrong}, labels) == 0.5
    values = np.array([1.0, 2.0])
    off, further = {"y": values + 1}, {"y": values + 2}
    assert metric_drop(load_metric("mse"), off, further, values) == pytest.approx(3.0)
