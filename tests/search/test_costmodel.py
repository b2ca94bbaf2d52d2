"""The cost model: few blocks are timed, and all plans follow from them."""

import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from hasten.errors import BadInput, Untrusted
from hasten.graph.blocks import blocks_of
from hasten.graph.cut import cut
from hasten.graph.groups import channel_groups
from hasten.graph.model import read_model
from hasten.isolation import Limits
from hasten.passes.fold import Fold
from hasten.passes.quantize_static import QuantizeStatic
from hasten.plan import Part
from hasten.search.costmodel import completed, cost_model, mean_error, parts_of, refit, wanted_blocks
from hasten.search.knapsack import Problem, solve
from hasten.search.table import change_of, keep_of, precision_sites, width_sites
from hasten.search.timing import Times, time_blocks
from hasten.testing.models import Builder, convnet, encoder, mlp, random_samples, stored
from hasten.transform import run_pass

DIMS = {"batch": 2}
ENGINE = Part("onnxruntime", {"threads": 1})


def staircase_ns(block):
    """Make up a block's time: an offset, and its products with widths rounded up to vectors of 16."""
    total = 200.0
    values = dict(block.values)
    for op in block.ops:
        if op.kind not in ("Conv", "Gemm", "MatMul"):
            total += 0.01 * math.prod(values[op.outputs[0]].shape)
            continue
        left, right, made = (values[name].shape for name in (*op.inputs[:2], op.outputs[0]))
        inner = right[1] if op.kind != "MatMul" else left[-1]
        vectors = math.ceil(inner / 16) * math.ceil(max(made[1] if op.kind == "Conv" else made[-1], 1) / 16)
        places = math.prod(made[2:]) if op.kind == "Conv" else math.prod(made[:-1])
        total += 25.0 * vectors * places * math.prod(right[2:] if op.kind == "Conv" else (1,))
    return total / (4 if block.kind.endswith("int8") else 1)


def timed(parts, sites, *, without=()):
    """Time blocks by ``staircase_ns``."""
    return Times({b.key: staircase_ns(b) for b in wanted_blocks(parts, sites) if b.name not in without}, {})


def true_ns(model, widths):
    return sum(staircase_ns(block) for block in blocks_of(cut(model, keep_of(model, widths)), DIMS))


def concatenating():
    """Make x [batch, 3, 8, 8] -> two convolutions side by side, joined, one behind -> y [batch, 4, 8, 8]."""
    net = Builder(0)
    branches = [net.add("Relu", net.add("Conv", "x", net.weight(n, 3, 3, 3), pads=[1] * 4)) for n in (48, 32)]
    h = net.add("Relu", net.add("Conv", net.add("Concat", *branches, axis=1), net.weight(64, 80, 1, 1)))
    net.add("Conv", h, net.weight(4, 64, 1, 1))
    return net.model(("x", ("batch", 3, 8, 8)), ("y", ("batch", 4, 8, 8)))


def splitting():
    """Make x [batch, 3, 8, 8] -> a gated convolution, whose halves are split by their number -> y [batch, 4, 8, 8]."""
    net = Builder(0)
    h = net.add("Conv", "x", net.weight(64, 3, 3, 3), pads=[1] * 4)
    net.nodes.append(helper.make_node("Split", [h], ["left", "right"], name="split", axis=1, num_outputs=2))
    net.add("Conv", net.add("Mul", "left", net.add("Sigmoid", "right")), net.weight(4, 32, 1, 1))
    return net.model(("x", ("batch", 3, 8, 8)), ("y", ("batch", 4, 8, 8)))


NETWORKS = {
    "splitting": splitting,
    "mlp": lambda: mlp(hidden=64),
    "convnet": lambda: convnet(width=32),
    "encoder": lambda: encoder(width=64, heads=4),
    "concatenating": concatenating,
}


@pytest.mark.parametrize("name", NETWORKS)
def test_blocks_at_any_widths_are_those_of_the_graph_really_cut(name) -> None:
    model = NETWORKS[name]()
    sites = width_sites(channel_groups(model))
    parts = parts_of(model, sites, DIMS)
    for choice in (tuple(len(site.options) - 1 for site in sites), tuple(1 for _ in sites)):
        widths = change_of(sites, choice).widths
        real = blocks_of(cut(model, keep_of(model, widths)), DIMS)
        assert [part.at(widths).key for part in parts] == [block.key for block in real]


@pytest.mark.parametrize(
    ("name", "within"),
    # What reads two groups rounds their sum up to whole vectors, which is no sum of two roundings.
    [("mlp", 0.02), ("convnet", 0.02), ("encoder", 0.02), ("concatenating", 0.05)],
)
def test_a_staircase_is_predicted_at_widths_that_were_never_timed(name, within) -> None:
    model = NETWORKS[name]()
    sites = width_sites(channel_groups(model))
    parts = parts_of(model, sites, DIMS)
    found = cost_model(parts, sites, timed(parts, sites))
    random = np.random.default_rng(0)
    for _ in range(12):
        choice = tuple(int(random.integers(len(site.options))) for site in sites)
        assert found.time_ns(choice) == pytest.approx(true_ns(model, change_of(sites, choice).widths), rel=within)


def test_far_fewer_blocks_are_timed_than_there_are_pairs_of_widths() -> None:
    model = convnet(width=64)
    sites = width_sites(channel_groups(model))
    pairs = math.prod(len(site.options) for site in sites)
    joined = [b for b in wanted_blocks(parts_of(model, sites, DIMS), sites) if b.name == "conv_9"]
    assert len(joined) < pairs / 3


def test_the_untouched_blocks_come_first_so_that_a_short_time_still_gives_a_model() -> None:
    model = mlp(hidden=64)
    sites = width_sites(channel_groups(model))
    parts = parts_of(model, sites, DIMS)
    few = wanted_blocks(parts, sites)[: len(parts)]
    found = cost_model(parts, sites, Times({block.key: staircase_ns(block) for block in few}, {}))
    assert found.time_ns((0,) * len(sites)) == pytest.approx(true_ns(model, {}))


def test_a_block_that_could_not_be_timed_is_named_with_the_reason() -> None:
    model = mlp(hidden=64)
    sites = width_sites(channel_groups(model))
    parts = parts_of(model, sites, DIMS)
    times = timed(parts, sites, without=("gemm_2",))
    refused = Times(times.ns, {parts[1].block.key: "Unsupported: no kernel"})
    with pytest.raises(Untrusted, match="'gemm_2' has no time: Unsupported: no kernel"):
        cost_model(parts, sites, refused)


def test_a_site_that_is_no_group_of_the_graph_is_refused() -> None:
    sites = width_sites(channel_groups(mlp(hidden=64)))
    with pytest.raises(BadInput, match="no channel group 'gemm_0'"):
        parts_of(convnet(), sites, DIMS)


shares = st.lists(st.floats(0.3, 0.9), min_size=1, max_size=5).map(lambda found: [1.0, *np.cumprod(found)])


@settings(max_examples=25, deadline=None)
@given(st.floats(0, 0.5), shares, shares)
def test_a_rank_of_one_over_an_offset_is_completed_from_its_edges(offset, rows, columns) -> None:
    whole = 100 * (offset + np.outer(rows, columns))
    corner = (len(rows) - 1, len(columns) - 1)
    edges = {at: float(whole[at]) for at in np.ndindex(whole.shape) if 0 in at or at == corner}
    assert completed(edges, whole.shape) == pytest.approx(whole, rel=0.01)


def test_what_was_timed_stays_as_it_was_timed() -> None:
    known = {(0, 0): 10.0, (0, 1): 7.0, (1, 0): 6.0, (1, 1): 5.5}
    assert np.array_equal(completed(known, (2, 2)), [[10.0, 7.0], [6.0, 5.5]])


def test_options_that_there_was_no_time_for_lie_between_those_that_were_timed() -> None:
    assert completed({(0,): 8.0, (3,): 2.0}, (4,)) == pytest.approx([8.0, 6.0, 4.0, 2.0])
    with pytest.raises(Untrusted):
        completed({(1,): 8.0}, (2,))


def test_after_a_refit_the_built_plans_are_predicted_within_ten_per_cent() -> None:
    model = convnet(width=32)
    sites = width_sites(channel_groups(model))
    parts = parts_of(model, sites, DIMS)
    rough = cost_model(parts, sites, timed(parts, sites))
    factors = {"Conv": 1.4, "Conv depthwise": 0.6, "Gemm": 1.0, "rest": 2.0}
    every = list(product(*(range(len(site.options)) for site in sites)))
    random = np.random.default_rng(0)

    def measured(choice):
        whole = sum(factors[kind] * ns for kind, ns in rough.by_kind(choice).items())
        return (whole + 3000.0) * random.uniform(0.98, 1.02)

    times = {choice: measured(choice) for choice in every}
    built = {choice: times[choice] for choice in every[:: len(every) // 8]}
    fitted = refit(rough, built)
    assert mean_error(rough, built) > 0.1
    assert mean_error(fitted, built) < 0.03
    assert mean_error(fitted, times) < 0.05


def test_one_measured_plan_scales_all_kinds_alike() -> None:
    model = mlp(hidden=64)
    sites = width_sites(channel_groups(model))
    parts = parts_of(model, sites, DIMS)
    rough = cost_model(parts, sites, timed(parts, sites))
    original = (0,) * len(sites)
    fitted = refit(rough, {original: 3 * rough.time_ns(original)})
    assert fitted.time_ns(original) == pytest.approx(3 * rough.time_ns(original), rel=1e-3)
    assert fitted.time_ns((2,) * len(sites)) == pytest.approx(3 * rough.time_ns((2,) * len(sites)), rel=0.05)
    assert refit(rough, {}) == rough


def test_a_time_that_cannot_be_is_refused() -> None:
    model = mlp(hidden=64)
    sites = width_sites(channel_groups(model))
    parts = parts_of(model, sites, DIMS)
    with pytest.raises(BadInput, match="above 0"):
        refit(cost_model(parts, sites, timed(parts, sites)), {(0, 0): 0.0})


def test_the_knapsack_takes_the_models_terms_and_agrees_on_every_time() -> None:
    model = concatenating()
    sites = width_sites(channel_groups(model))
    parts = parts_of(model, sites, DIMS)
    found = refit(cost_model(parts, sites, timed(parts, sites)), {(0, 0, 0): 5e4})
    losses = tuple(tuple(float(i) for i in range(len(site.options))) for site in sites)
    problem = Problem(losses, found.terms(), found.fixed_ns)
    for choice in product(*((0, len(site.options) - 1) for site in sites)):
        assert problem.time_ns(choice) == pytest.approx(found.time_ns(choice))
    half = solve(problem, found.time_ns((0, 0, 0)) / 2)
    assert found.time_ns(half.choice) <= found.time_ns((0, 0, 0)) / 2 * (1 + 1e-6)


def test_each_node_may_compute_in_float_or_in_int8(store, ctx) -> None:
    folded = run_pass(Fold(), stored(convnet(width=32), store), store, ctx)
    made = run_pass(QuantizeStatic(), folded, store, replace(ctx, samples=random_samples(folded)))
    plain, quantized = read_model(folded), read_model(made)
    nodes = [node.name for node in plain.graph.node if node.op_type in ("Conv", "Gemm")]
    sites = (*width_sites(channel_groups(plain)), *precision_sites(nodes))
    parts, twins = parts_of(plain, sites, DIMS), parts_of(quantized, sites, DIMS)
    times = Times({**timed(parts, sites).ns, **timed(twins, sites).ns}, {})
    found = cost_model(parts, sites, times, quantized=twins)
    widths = len(sites) - len(nodes)
    first = (0,) * widths + (1,) + (0,) * (len(nodes) - 1)
    own = next(part.block for part in parts if part.block.name == nodes[0])
    twin = next(part.block for part in twins if part.block.name == nodes[0])
    saved = found.time_ns((0,) * len(sites)) - found.time_ns(first)
    assert saved == pytest.approx(staircase_ns(own) - staircase_ns(twin))
    narrow = (len(sites[0].options) - 1,) * 1 + (0,) * (widths - 1) + (1,) * len(nodes)
    change = change_of(sites, narrow)
    assert change.int8 == tuple(nodes)
    in_int8 = blocks_of(cut(quantized, keep_of(quantized, change.widths)), DIMS)
    named = {name for part in parts for name in part.block.covers if part.block.name in nodes}
    rest = [part.at(change.widths) for part in parts if part.block.name not in nodes]
    expected = sum(staircase_ns(b) for b in [*(b for b in in_int8 if b.name in named), *rest])
    assert found.time_ns(narrow) == pytest.approx(expected, rel=0.05)


def test_real_blocks_are_timed_in_a_child_once_and_kept(store) -> None:
    model = mlp(features=64, hidden=256)
    sites = width_sites(channel_groups(model), shares=(0.5,))
    parts = parts_of(model, sites, {"batch": 64})
    blocks = wanted_blocks(parts, sites)
    times = time_blocks(blocks, ENGINE, store, limits=Limits(seconds=60))
    assert times.ns.keys() == {block.key for block in blocks}
    assert not times.failures
    found = cost_model(parts, sites, times)
    whole, half = found.time_ns((0, 0)), found.time_ns((1, 1))
    assert 0 < half < whole
    told = []
    again = time_blocks(blocks, ENGINE, store, limits=Limits(seconds=60), progress=lambda *news: told.append(news))
    assert again == times
    assert not told


def test_a_block_that_the_engine_refuses_is_a_failure_and_the_others_are_timed(store) -> None:
    good, other, _ = blocks_of(mlp(), DIMS)
    bad = replace(other, ops=tuple(replace(op, domain="com.example") for op in other.ops))
    bad = replace(bad, opsets=(*bad.opsets, ("com.example", 1)))
    times = time_blocks([bad, good], ENGINE, store, limits=Limits(seconds=60))
    assert times.ns.keys() == {good.key}
    assert "Gemm" in times.failures[bad.key]
    assert time_blocks([bad, good], ENGINE, store, limits=Limits(seconds=60)) == times


def test_an_engine_that_fixes_the_batch_times_the_same_blocks(store) -> None:
    """Blocks have no open axis, nor has the graph that does nothing, which has one row by itself."""
    blocks = blocks_of(mlp(), DIMS)
    fixed = Part(ENGINE.name, {**ENGINE.settings, "batch": 8})
    times = time_blocks(blocks, fixed, store, limits=Limits(seconds=60))
    assert not times.failures
    assert times == time_blocks(blocks, ENGINE, store, limits=Limits(seconds=60))


def test_no_block_is_timed_when_the_time_is_over(store) -> None:
    blocks = blocks_of(mlp(), DIMS)
    assert not time_blocks(blocks, ENGINE, store, limits=Limits(seconds=60), deadline=lambda: True).ns
