import itertools
import json
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from synthetic_result import ORIGINAL_NS, make_result

from hasten.report.charts import LANE_PX, frontier_figure, operators_figure, shorten


def test_a_figure_is_plain_json(tmp_path: Path) -> None:
    for figure in (frontier_figure(make_result(tmp_path)), operators_figure(make_result(tmp_path))):
        assert json.loads(msgspec.json.encode(figure)) == figure


def test_every_measured_plan_is_a_point_and_the_marked_ones_have_their_own(tmp_path: Path) -> None:
    result = make_result(tmp_path, extra=30)
    traces = [trace for trace in frontier_figure(result)["data"] if trace["mode"] == "markers"]
    assert sum(len(trace["x"]) for trace in traces) == 37
    assert {"chosen", "best lossless", "untouched"} < {trace["name"] for trace in traces}


def test_a_plan_that_is_both_untouched_and_lossless_is_marked_once_with_both_words(tmp_path: Path) -> None:
    result = make_result(tmp_path)
    figure = frontier_figure(replace(result, best_lossless=result.original))
    assert "best lossless, untouched" in {trace["name"] for trace in figure["data"] if trace["mode"] == "markers"}


def test_labels_stand_in_lanes_so_that_none_covers_another(tmp_path: Path) -> None:
    notes = frontier_figure(make_result(tmp_path, extra=60))["layout"]["annotations"]
    heights = sorted(note["yshift"] for note in notes)
    assert len(notes) == 3
    assert all(b - a >= LANE_PX for a, b in itertools.pairwise(heights))
    assert all(note["yref"] == "paper" and note["y"] == 1 for note in notes)


def test_quality_bars_reach_where_the_drops_interval_reaches(tmp_path: Path) -> None:
    result = make_result(tmp_path)
    chosen = next(trace for trace in frontier_figure(result)["data"] if trace.get("name") == "chosen")
    quality = result.certificates[0].quality
    assert quality
    top = chosen["y"][0] + chosen["error_y"]["array"][0]
    bottom = chosen["y"][0] - chosen["error_y"]["arrayminus"][0]
    assert top == pytest.approx(-100 * quality.drop.low)
    assert bottom == pytest.approx(-100 * quality.drop.high)


def test_operators_and_what_is_outside_them_add_up_to_the_measured_time(tmp_path: Path) -> None:
    figure = operators_figure(make_result(tmp_path))
    bars = [trace for trace in figure["data"] if trace["type"] == "bar"]
    assert [bar["name"] for bar in bars] == [
        "held by arithmetic",
        "held by memory",
        "held by overhead",
        "outside operators",
    ]
    untouched = sum(ms for bar in bars for ms, row in zip(bar["x"], bar["y"], strict=True) if row == 3)
    assert untouched == pytest.approx(ORIGINAL_NS / 1e6)


def test_a_plan_with_a_markup_in_its_name_is_text_in_a_chart(tmp_path: Path) -> None:
    result = make_result(tmp_path, note="<img src=x>")
    encoded = msgspec.json.encode([frontier_figure(result), operators_figure(result)]).decode()
    assert "<img" not in encoded


def test_a_long_plan_is_cut_in_its_middle() -> None:
    text = shorten("fold > " + "x" * 200 + " > openvino(threads=2)")
    assert len(text) <= 72
    assert text.startswith("fold > ")
    assert text.endswith("openvino(threads=2)")


def test_the_quality_axis_says_which_way_is_better_for_any_metric(tmp_path: Path) -> None:
    axis = frontier_figure(replace(make_result(tmp_path), metric="mean-absolute-error"))["layout"]["yaxis"]
    assert axis["title"]["text"] == "mean-absolute-error, %:<br>better (+) or worse (−) than untouched"


def test_the_second_limit_is_a_mark_of_its_own_below_the_first(tmp_path: Path) -> None:
    traces = {trace["name"]: trace for trace in operators_figure(make_result(tmp_path))["data"]}
    first, second = traces["the machine's limit"], traces["the same with Winograd's convolutions"]
    assert second["x"] == pytest.approx([x * 0.6 for x in first["x"]])
