from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.errors import InvalidSetting, UnknownName, Unsupported
from hasten.graph.cut import cut
from hasten.graph.groups import Group, Slot, channel_groups
from hasten.passes.widths import (
    Stairs,
    check_widths,
    macs,
    open_lengths,
    products_of,
    scheduled,
    staircase,
    widths_for,
)
from hasten.tensors import Signature, TensorSpec
from hasten.testing.models import MODELS, convnet, encoder


def group_of(size: int, *, entries: int = 1, name: str = "g") -> Group:
    units = tuple(unit for unit in range(size) for _ in range(entries))
    return Group(name=name, size=size, slots=(Slot("w", 0, units, "makes"),), makers=(name,), exact=True)


def test_only_the_right_edges_of_a_staircase_are_worth_considering() -> None:
    times = {5: 100.0, 6: 100.5, 7: 101.0, 8: 101.5, 9: 150.0, 15: 150.0, 16: 149.0, 17: 210.0}
    assert staircase(times) == (8, 16, 17)


def test_a_slope_without_stairs_keeps_every_width() -> None:
    assert staircase({width: float(width) for width in range(1, 17)}) == tuple(range(1, 17))


@given(st.dictionaries(st.integers(1, 99), st.floats(1.0, 1e6), min_size=1))
@settings(max_examples=60, deadline=None)
def test_no_wider_width_takes_the_time_of_one_that_is_kept(times: dict[int, float]) -> None:
    kept = staircase(times)
    assert max(times) == kept[-1]
    for width, ns in times.items():
        assert (width in kept) == all(times[wider] > ns * 1.02 for wider in times if wider > width)


def test_stairs_are_multiples_of_the_grid_with_an_eighth_left() -> None:
    stairs = Stairs.of(group_of(100), 8)
    down = [100]
    while (lower := stairs.below(down[-1])) is not None:
        down.append(lower)
    assert down == [100, *range(96, 15, -8)]


def test_a_group_within_one_grid_step_is_not_cut() -> None:
    assert Stairs.of(group_of(8), 8).below(8) is None


def test_heads_of_many_channels_fit_the_grid_one_by_one() -> None:
    assert Stairs.of(group_of(12, entries=64), 8).below(12) == 11
    assert Stairs.of(group_of(12, entries=4), 8).below(12) == 10


def test_a_width_goes_to_the_nearest_stair() -> None:
    stairs = Stairs.of(group_of(20), 8)
    assert [stairs.nearest(width) for width in (1.0, 11.9, 12.0, 17.9, 18.0, 20.0)] == [8, 8, 16, 16, 20, 20]


def test_a_schedule_falls_in_equal_ratios() -> None:
    assert [scheduled(64, 8, share=share) for share in (0, 1 / 3, 2 / 3, 1)] == pytest.approx([64, 32, 16, 8])


def test_an_unknown_group_is_named_with_the_nearest() -> None:
    with pytest.raises(UnknownName, match="did you mean 'conv_1'"):
        check_widths({"conv1": 4}, [group_of(8, name="conv_1")])


@pytest.mark.parametrize("width", [0, 9])
def test_a_width_that_does_not_fit_its_group_is_refused(width: int) -> None:
    with pytest.raises(InvalidSetting, match="8 units"):
        check_widths({"g": width}, [group_of(8)])


def halved(groups: Sequence[Group]) -> dict[str, list[int]]:
    return {group.name: list(range(0, group.size, 2)) for group in groups}


@pytest.mark.parametrize("name", MODELS)
def test_the_cost_that_widths_foretell_is_that_of_the_cut_graph(name: str) -> None:
    model = MODELS[name]()
    groups = channel_groups(model)
    keep = halved(groups)
    products = products_of(model, groups, {})
    foretold = sum(
        product.cost({name: len(keep[name]) / g.size for g in groups for name in [g.name]}) for product in products
    )
    assert sum(product.cost({}) for product in products) == pytest.approx(macs(model, {}))
    assert foretold == pytest.approx(macs(cut(model, keep), {}), rel=1e-9)


def test_attention_costs_in_proportion_to_its_heads() -> None:
    model = encoder(width=32, heads=4)
    heads = next(group for group in channel_groups(model) if group.size == 4)
    products = products_of(model, [heads], {})
    assert sum(heads.name in product.groups for product in products) == 6  # q, k, v, scores, weighted sum, output


def test_the_cheapest_loss_for_what_it_saves_goes_first() -> None:
    model = convnet(width=16)
    groups = channel_groups(model)
    wide = max(groups, key=lambda group: group.size)
    scores = {group.name: np.full(group.size, 1e-6 if group is wide else 1.0) for group in groups}
    products, stairs = products_of(model, groups, {}), {group.name: Stairs.of(group, 4) for group in groups}
    widths = widths_for(products, stairs, scores, target=0.8 * macs(model, {}))
    assert widths[wide.name] < wide.size
    assert all(widths[group.name] == group.size for group in groups if group is not wide)


@given(st.floats(0.3, 1.0), st.integers(0, 9))
@settings(max_examples=15, deadline=None)
def test_a_share_is_met_within_one_stair(share: float, seed: int) -> None:
    model = convnet(width=16)
    groups = channel_groups(model)
    random = np.random.default_rng(seed)
    scores = {group.name: random.uniform(size=group.size) for group in groups}
    products, stairs = products_of(model, groups, {}), {group.name: Stairs.of(group, 2) for group in groups}
    total = macs(model, {})
    widths = widths_for(products, stairs, scores, target=share * total)
    kept = {group.name: widths[group.name] / group.size for group in groups}
    left = sum(product.cost(kept) for product in products)
    one_stair = max(
        sum(p.cost({**kept, g.name: min(1.0, kept[g.name] + 2 / g.size)}) for p in products) - left for g in groups
    )
    assert left <= share * total * (1 + 1e-9)
    assert share == 1.0 or left >= share * total - one_stair


def test_a_share_out_of_reach_says_what_is_within() -> None:
    model = convnet(width=16)
    groups = channel_groups(model)
    scores = {group.name: np.ones(group.size) for group in groups}
    stairs = {group.name: Stairs.of(group, 8) for group in groups}
    with pytest.raises(Unsupported, match=r"\d% are left; ask for a larger ratio"):
        widths_for(products_of(model, groups, {}), stairs, scores, target=1.0)


def test_open_axes_behind_the_batch_are_taken_as_long() -> None:
    signature = Signature((TensorSpec("x", "float32", ("b", 3, "h", "w")),), ())
    assert open_lengths(signature) == {"b": 1, "h": 64, "w": 64}
