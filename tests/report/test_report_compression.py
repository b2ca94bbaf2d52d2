import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_result import GROUPS, PRUNE, engine, make_compressed, make_result
from test_report_html import Page

from hasten.plan import Part
from hasten.report.charts_compression import curves_figure, prediction_figure, sensitivity_figure
from hasten.report.compression import (
    best_held,
    called,
    compression_lines,
    curve_sentence,
    errors_sentence,
    half_cells,
    kept_units,
    number,
    placed_cells,
    prediction_errors,
    sensitivity_sentence,
)
from hasten.report.html import figures_of, render_html
from hasten.report.tables import notes
from hasten.search.compression import Cell, Compression, Curve, CurvePoint, Prediction
from hasten.search.result import Result

HOSTILE = "<img src=x onerror=alert(1)></script>"
PARTS = ("What each group of channels bears", "Predicted against measured", "Training")


def cell(units: int, *, size: int = 64, kl: float = 0.1, group: str = "conv") -> Cell:
    return Cell(group=group, units=units, size=size, kl=kl, metric=None, ns=None)


def prediction(first: float, refitted: float | None, measured: float | None) -> Prediction:
    return Prediction(plan="0" * 16, first_ns=first, refitted_ns=refitted, measured_ns=measured, sensitivity=0.1)


def found(result: Result) -> Compression:
    assert result.compression
    return result.compression


@given(st.sets(st.integers(1, 64), min_size=1, max_size=12))
@settings(max_examples=60, deadline=None)
def test_the_widths_of_a_group_stand_beside_each_other_without_a_gap(units: set[int]) -> None:
    row = placed_cells([cell(n) for n in units])["conv"]
    assert [placed.cell.units for placed in row] == sorted(units)
    assert all(0 <= placed.left <= placed.cell.units / 64 <= placed.right <= 1 for placed in row)
    assert all(a.right == b.left for a, b in itertools.pairwise(row))


def test_a_group_is_compared_at_about_half_its_units_and_left_out_where_it_has_no_such_width() -> None:
    cells = [cell(8), cell(24, kl=0.2), cell(56), cell(48, group="b", kl=0.5), cell(60, group="c", kl=9.0)]
    assert [(c.group, c.units) for c in half_cells(cells)] == [("b", 48), ("conv", 24)]


def test_the_most_and_the_least_sensitive_groups_are_named(tmp_path: Path) -> None:
    said = sensitivity_sentence(found(make_compressed(tmp_path)).cells)
    assert said
    most, least = said.split(". These")
    assert most.index("/stem/conv (0.750, 8 of 16)") < most.index("/blocks/0/conv1 (0.300, 32 of 64)")
    assert least.index("/blocks/6/conv1 (0.00123, 64 of 128)") < least.index("/blocks/5/conv1")


def test_two_groups_are_not_both_the_most_and_the_least_sensitive() -> None:
    said = sensitivity_sentence([cell(32, group="a", kl=0.4), cell(32, group="b", kl=0.2)])
    assert said
    assert said.count("a (0.400") == said.count("b (0.200") == 1
    assert sensitivity_sentence([cell(32)]) is None


def test_the_error_is_the_mean_of_what_each_prediction_was_off_by() -> None:
    errors = prediction_errors([prediction(12, 11, 10), prediction(16, 20.2, 20), prediction(5, None, None)])
    assert errors
    assert (errors.built, errors.refitted_n) == (2, 2)
    assert errors.first == pytest.approx((0.2 + 0.2) / 2)
    assert errors.refitted == pytest.approx((0.1 + 0.01) / 2)


@pytest.mark.parametrize(
    ("predictions", "said"),
    [
        ([], None),
        ([prediction(1, None, None)], "1 plan was predicted, none of them measured."),
        (
            [prediction(12, None, 10)],
            "1 plan was predicted, 1 measured; mean absolute error of the time 20.0 %; there was no refit.",
        ),
        (
            [prediction(12, 10.5, 10), prediction(8, None, 10)],
            "2 plans were predicted, 2 measured; mean absolute error of the time 20.0 % before the refit, "
            "5.0 % after it (over 1).",
        ),
    ],
)
def test_the_error_is_stated_with_what_it_is_over(predictions: list[Prediction], said: str | None) -> None:
    assert errors_sentence(predictions) == said


def test_a_training_pass_is_said_in_one_line() -> None:
    points = [CurvePoint(number=n, loss=1 / n, held=h) for n, h in [(1, 0.9), (2, 0.4), (3, 0.5)]]
    curve = Curve(plan="0" * 16, step="finetune 2", epochs=tuple(points), stopped="no better for 1 epoch")
    assert best_held(curve) == points[1]
    assert curve_sentence(curve) == (
        "finetune 2: loss 1.00 to 0.333 in 3 epochs, held out 0.400 at best (epoch 2); "
        "ended early: no better for 1 epoch."
    )
    assert curve_sentence(replace(curve, epochs=(), stopped=None)) == "finetune 2: no epoch was finished."
    unjudged = replace(curve, epochs=(replace(points[0], held=None),), stopped=None)
    assert best_held(unjudged) is None
    assert curve_sentence(unjudged) == "finetune 2: loss 1.00 to 1.00 in 1 epoch."


def test_the_widths_that_a_plan_keeps_are_read_from_its_pruning() -> None:
    again = Part("prune-channels", {"widths": {"/blocks/0/conv1": 24}})
    by_ratio = Part("prune-channels", {"ratio": 0.5})
    assert kept_units(engine("openvino").with_passes(PRUNE, by_ratio, again)) == {
        "/blocks/0/conv1": 24,
        "/blocks/1/conv1": 16,
    }
    assert kept_units(engine("openvino").with_passes(by_ratio)) == {}


def test_a_plan_is_called_by_its_role_its_number_or_its_key(tmp_path: Path) -> None:
    result = make_compressed(tmp_path)
    assert called(result, result.chosen) == "chosen"
    assert called(result, result.trials[3].key) == "trial 4"
    assert called(result, "f" * 16) == "f" * 16


@pytest.mark.parametrize(
    ("value", "text"), [(None, "–"), (0.0, "0"), (1.2345, "1.23"), (0.00123, "0.00123"), (7.71e-5, "7.7e-05")]
)
def test_a_divergence_is_readable_however_small(value: float | None, text: str) -> None:
    assert number(value) == text


def test_the_heat_map_has_a_row_a_group_and_marks_what_the_chosen_plan_keeps(tmp_path: Path) -> None:
    result = make_compressed(tmp_path)
    cells = found(result).cells
    bars, marks = sensitivity_figure(cells, result)["data"]
    assert len(bars["x"]) == len(cells)
    assert bars["marker"]["color"][0] == pytest.approx(math.log10(cells[0].kl))
    assert (marks["x"], marks["y"]) == ([50.0, 25.0], [1, 2])
    layout = sensitivity_figure(cells, result)["layout"]
    assert layout["yaxis"]["ticktext"] == [f"{group} ({size}) " for group, size in GROUPS.items()]


@pytest.mark.parametrize("kl", [0.0, -1e-9, 0.3])
def test_a_heat_map_of_one_value_has_a_scale(kl: float, tmp_path: Path) -> None:
    marker = sensitivity_figure([cell(32, kl=kl), cell(64, kl=kl)], make_result(tmp_path))["data"][0]["marker"]
    assert marker["cmin"] < marker["cmax"]
    assert all(marker["cmin"] <= colour <= marker["cmax"] for colour in marker["color"])


def test_a_cell_says_its_metric_and_its_predicted_time(tmp_path: Path) -> None:
    result = make_compressed(tmp_path)
    text = sensitivity_figure(found(result).cells, result)["data"][0]["text"][0]
    assert text == "<b>/stem/conv</b><br>8 of 16 units kept<br>KL divergence 0.750 nats<br>accuracy 0.8840" + (
        "<br>predicted 2.00 ms"
    )


def test_points_stand_at_predicted_and_measured_time_beside_the_diagonal(tmp_path: Path) -> None:
    result = make_compressed(tmp_path)
    predictions = found(result).predictions
    figure = prediction_figure(predictions, result)
    traces = {trace["name"]: trace for trace in figure["data"]}
    built = [p for p in predictions if p.measured_ns]
    assert traces["before the refit"]["x"] == [p.first_ns / 1e6 for p in built]
    assert traces["after the refit"]["x"] == [(p.refitted_ns or 0) / 1e6 for p in built]
    assert traces["after the refit"]["y"] == [(p.measured_ns or 0) / 1e6 for p in built]
    assert len(traces["predicted front"]["x"]) == len(predictions)
    diagonal = figure["layout"]["shapes"][0]
    assert (diagonal["x0"], diagonal["x1"]) == (diagonal["y0"], diagonal["y1"])


def test_a_front_of_which_nothing_was_built_is_drawn_alone(tmp_path: Path) -> None:
    figure = prediction_figure([prediction(1e6, None, None), prediction(2e6, None, None)], make_result(tmp_path))
    assert [trace["name"] for trace in figure["data"]] == ["predicted front"]
    assert "shapes" not in figure["layout"]
    assert figure["layout"]["xaxis2"]["domain"] == [0.0, 1.0]


def test_every_training_pass_has_its_loss_and_its_held_out_loss_in_one_colour(tmp_path: Path) -> None:
    result = make_compressed(tmp_path)
    traces = curves_figure(found(result).curves, result)["data"]
    assert [trace["name"] for trace in traces if trace["showlegend"]] == [
        "chosen, finetune 2",
        "chosen, finetune 6",
        "trial 13, finetune 2",
    ]
    loss, held, *_ = traces
    curve = found(result).curves[0]
    assert loss["y"] == [point.loss for point in curve.epochs]
    assert held["y"] == [point.held for point in curve.epochs]
    assert loss["line"]["color"] == held["line"]["color"]
    assert len({trace["line"]["color"] for trace in traces}) == 3


def test_the_page_holds_the_results_numbers_without_a_script(tmp_path: Path) -> None:
    shown = Page(render_html(make_compressed(tmp_path))).shown
    for text in (
        "From the untouched model to the chosen plan",
        "prune-channels + finetune",
        "not measured one by one",
        "−850 µs",
        "drop 1.10 % [0.70, 1.50]",
        "took 480 µs [478, 482] and lost 0.50 % [0.10, 0.90] of accuracy",
        "/blocks/5/conv1 32 64 0.00307",
        "mean absolute error of the time 20.0 % before the refit, 5.0 % after it",
        "not measured",
        "no better for 2 epochs",
    ):
        assert text in shown


def test_the_page_reads_from_the_verdict_to_the_details(tmp_path: Path) -> None:
    shown = Page(render_html(make_compressed(tmp_path))).shown
    titles = ["MEETS 2.93", "From the untouched", "Latency against quality", "Certificates", *PARTS, "Where the time"]
    places = [shown.index(title, 100 if title == "MEETS 2.93" else 0) for title in titles[1:]]
    assert shown.index(titles[0]) < places[0]
    assert places == sorted(places)


def test_what_there_is_nothing_to_show_of_is_absent(tmp_path: Path) -> None:
    bare = make_result(tmp_path)
    for result in (bare, replace(bare, compression=Compression())):
        shown = Page(render_html(result)).shown
        assert not [title for title in PARTS if title in shown]
        assert set(figures_of(result)) == {"frontier", "operators", "path"}
    alone = replace(bare, chosen=bare.original)
    assert "path" not in figures_of(alone)
    assert "From the untouched model" not in Page(render_html(alone)).shown
    curves = found(make_compressed(tmp_path)).curves
    shown = Page(render_html(replace(bare, compression=Compression(curves=curves)))).shown
    assert [title for title in PARTS if title in shown] == ["Training"]


def test_hostile_names_are_text_on_the_page_and_in_its_figures(tmp_path: Path) -> None:
    result = make_compressed(tmp_path, note=HOSTILE)
    text = render_html(result)
    assert "<img" not in text
    assert HOSTILE in Page(text).shown
    assert len(Page(text).scripts) == 2
    short = next(trial for trial in result.trials if "note" in trial.plan.engine.settings and not trial.plan.passes)
    predictions = [replace(prediction(1e6, None, 1e6), plan=short.key)]
    figures = {**figures_of(result), "short": prediction_figure(predictions, result)}
    assert "onerror" in msgspec.json.encode(figures["short"]).decode()
    for name, figure in figures.items():
        assert "<img" not in msgspec.json.encode(figure).decode(), name


def test_figures_of_compression_are_plain_json(tmp_path: Path) -> None:
    figures = figures_of(make_compressed(tmp_path))
    assert set(figures) == {"frontier", "operators", "path", "sensitivity", "predictions", "curves"}
    assert json.loads(msgspec.json.encode(figures)) == figures


def test_the_terminal_says_what_the_pictures_show(tmp_path: Path) -> None:
    lines = compression_lines(make_compressed(tmp_path))
    assert set(lines) < set(notes(make_compressed(tmp_path)))
    assert lines[0].startswith("Cut to about half")
    assert lines[1].startswith("10 plans were predicted, 8 measured")
    assert [line.split(": ")[0] for line in lines[2:]] == [
        "Training of the chosen plan, finetune 2",
        "Training of the chosen plan, finetune 6",
    ]
    assert compression_lines(make_result(tmp_path)) == []


@pytest.mark.parametrize("make", [make_result, make_compressed])
def test_the_page_has_a_place_for_every_figure(make: Callable[[Path], Result], tmp_path: Path) -> None:
    result = make(tmp_path)
    places = {attributes.get("id") for _, attributes in Page(render_html(result)).tags}
    assert {f"figure-{name}" for name in figures_of(result)} <= places
