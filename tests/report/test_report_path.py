import io
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from synthetic_result import COMPRESSED, FOLD, FUSE, engine, make_compressed, make_result

from hasten.plan import Part
from hasten.report.charts_path import waterfall_figure
from hasten.report.path import Step, added_passes, change, goes_on_from, path_of
from hasten.report.tables import path_table, result_table
from hasten.search.result import Result

WHOLE = [
    "untouched",
    "openvino(threads=2)",
    "fold",
    "fuse",
    "prune-channels + finetune",
    "quantize-static",
    "quantization-aware finetune",
]


def without(result: Result, *passes: Part) -> Result:
    """Take the trial with just these passes on the chosen plan's engine out of a result."""
    plan = engine("openvino", threads=2).with_passes(*passes)
    assert any(trial.key == plan.key for trial in result.trials)
    return replace(result, trials=tuple(trial for trial in result.trials if trial.key != plan.key))


def names(result: Result) -> list[str]:
    return [step.name for step in path_of(result)]


def test_the_path_goes_through_every_measured_plan_that_leads_to_the_chosen_one(tmp_path: Path) -> None:
    assert names(make_compressed(tmp_path)) == WHOLE


def test_a_steps_numbers_are_those_of_its_trial(tmp_path: Path) -> None:
    result = make_compressed(tmp_path)
    for step in path_of(result):
        measured = result.trial(step.plan).measurement
        assert measured
        assert (step.latency, step.quality) == (measured.latency, measured.quality)
        assert (step.over_original, step.file_bytes) == (measured.speedup, measured.resources.file_bytes)


def test_the_changes_add_up_to_all_that_was_saved(tmp_path: Path) -> None:
    steps = path_of(make_compressed(tmp_path))
    saved = sum(step.change_ns for step in steps if step.change_ns is not None)
    assert steps[0].change_ns is None
    assert saved == pytest.approx(steps[-1].latency.median_ns - steps[0].latency.median_ns)


def test_a_step_that_was_not_measured_is_shown_with_the_next(tmp_path: Path) -> None:
    result = without(make_compressed(tmp_path), FOLD)
    merged = next(step for step in path_of(result) if "fuse" in step.name)
    assert merged.name == "fold + fuse"
    assert merged.parts == ("fold", "fuse")
    assert merged.change_ns == pytest.approx(1.9e6 - 2.1e6)


def test_an_engine_that_was_not_measured_alone_is_shown_with_the_first_passes(tmp_path: Path) -> None:
    result = without(make_compressed(tmp_path), *())
    assert names(result)[:2] == ["untouched", "openvino(threads=2) + fold"]


def test_where_nothing_between_was_measured_all_is_one_step(tmp_path: Path) -> None:
    result = make_compressed(tmp_path)
    ends = tuple(trial for trial in result.trials if trial.key in (result.original, result.chosen))
    steps = path_of(replace(result, trials=ends))
    assert len(steps) == 2
    assert len(steps[1].parts) == 1 + len(COMPRESSED)


def test_a_plan_of_another_engine_setting_or_pass_setting_is_no_step(tmp_path: Path) -> None:
    result = make_result(tmp_path)  # fold > fuse, one thread, and fold > int8 elsewhere were measured
    assert names(result) == ["untouched", "openvino(threads=2)", "fold + quantize-static"]


def test_a_failed_trial_is_no_step(tmp_path: Path) -> None:
    result = make_compressed(tmp_path)
    key = engine("openvino", threads=2).with_passes(FOLD).key
    failed = tuple(
        replace(trial, outcome="failed", measurement=None, reason="it died") if trial.key == key else trial
        for trial in result.trials
    )
    assert "fold + fuse" in names(replace(result, trials=failed))


def test_beginnings_of_the_chosen_plan_come_before_other_ways_of_the_same_length(tmp_path: Path) -> None:
    result = without(make_compressed(tmp_path), FOLD)
    by_key = {trial.key: trial for trial in result.trials}
    on = engine("openvino", threads=2)
    fused = by_key[on.with_passes(FOLD, FUSE).key]
    pruned = replace(fused, plan=on.with_passes(*COMPRESSED[:2]))
    steps = names(replace(result, trials=(*result.trials, pruned)))
    assert steps[2:4] == ["prune-channels + finetune", "fold + fuse"]


def test_an_untouched_model_that_was_chosen_has_no_path(tmp_path: Path) -> None:
    result = make_result(tmp_path)
    assert path_of(replace(result, chosen=result.original)) == ()
    assert path_table(replace(result, chosen=result.original)) is None


@given(st.lists(st.sampled_from("abc"), max_size=6), st.data())
@settings(max_examples=60, deadline=None)
def test_what_was_added_is_what_has_to_be_left_out_again(letters: list[str], data: st.DataObject) -> None:
    after = engine("onnxruntime").with_passes(*map(Part, letters))
    kept = data.draw(st.lists(st.booleans(), min_size=len(letters), max_size=len(letters)))
    before = after.with_passes(*(part for part, keep in zip(after.passes, kept, strict=True) if keep))
    assert goes_on_from(after.passes, before.passes)
    added = added_passes(before, after)
    assert tuple(part for i, part in enumerate(after.passes) if i not in added) == before.passes
    assert goes_on_from(before.passes, after.passes) == (before == after)


def test_a_bar_hangs_between_the_time_of_its_row_and_that_of_the_row_above(tmp_path: Path) -> None:
    steps = path_of(make_compressed(tmp_path))
    traces = {trace.get("name"): trace for trace in waterfall_figure(steps, "accuracy")["data"]}
    times, changes = traces["time"]["x"], traces["change"]
    assert times == pytest.approx([2.4, 2.1, 1.95, 1.9, 1.05, 0.46, 0.47])
    assert changes["base"] == pytest.approx(times[1:])
    assert [base + x for base, x in zip(changes["base"], changes["x"], strict=True)] == pytest.approx(times[:-1])
    assert changes["marker"]["color"] == ["var(--saved)"] * 5 + ["var(--bad)"]


def test_the_waterfall_shows_quality_with_its_interval_and_size_beside_time(tmp_path: Path) -> None:
    steps = path_of(make_compressed(tmp_path))
    figure = waterfall_figure(steps, "accuracy")
    quality = next(trace for trace in figure["data"] if trace.get("xaxis") == "x2")
    sizes = next(trace for trace in figure["data"] if trace.get("xaxis") == "x3")
    assert quality["x"] == pytest.approx([0, 0, 0, 0, -0.4, -1.1, -0.3])
    assert quality["x"][5] - quality["error_x"]["arrayminus"][5] == pytest.approx(-1.5)
    assert sizes["x"] == pytest.approx([2.3, 2.3, 2.3, 2.3, 1.4, 0.39, 0.39])
    assert figure["layout"]["xaxis3"]["title"]["text"] == "file, MB"


def test_steps_that_nobody_judged_are_called_so(tmp_path: Path) -> None:
    steps = tuple(replace(step, quality=None) for step in path_of(make_compressed(tmp_path)))
    figure = waterfall_figure(steps, "accuracy")
    assert not [trace for trace in figure["data"] if trace.get("xaxis") == "x2"]
    assert sum(note["text"] == "not judged" for note in figure["layout"]["annotations"]) == len(steps)


def test_a_change_carries_its_sign(tmp_path: Path) -> None:
    step: Step = path_of(make_compressed(tmp_path))[1]
    assert change(step) == "−300 µs"
    assert change(replace(step, change_ns=2e6)) == "+2.00 ms"
    assert change(replace(step, change_ns=None)) == ""


def drawn(result: Result, width: int) -> str:
    file = io.StringIO()
    Console(file=file, width=width).print(result_table(result))
    return " ".join(file.getvalue().split())


@pytest.mark.parametrize("width", [60, 80, 150])
def test_the_terminal_shows_the_path_and_loses_no_number(width: int, tmp_path: Path) -> None:
    text = drawn(make_compressed(tmp_path), width)
    for piece in (*WHOLE, "measured only together", "−850 µs", "+10.0 µs", "2.29x", "0.9730", "drop 1.10 %", "390 kB"):
        assert piece in text


def test_the_terminal_shows_no_path_where_there_is_none(tmp_path: Path) -> None:
    result = make_result(tmp_path)
    assert "From the untouched model" in drawn(result, 100)
    assert "From the untouched model" not in drawn(replace(result, chosen=result.original), 100)
