import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from synthetic_result import make_result

from hasten.report.tables import frontier_table, notes, result_table
from hasten.search.result import Word


def drawn(folder: Path, *, width: int = 160, word: Word = "MEETS") -> str:
    file = io.StringIO()
    Console(file=file, width=width).print(result_table(make_result(folder, word=word)))
    return file.getvalue()


def test_the_table_says_plan_ratio_interval_drop_split_and_verdict(tmp_path: Path) -> None:
    text = drawn(tmp_path)
    for piece in (
        "2.93x",
        "[2.90, 2.96]",
        "2.32x",
        "820 µs",
        "drop 0.30 %",
        "on certify",
        "best lossless",
        "untouched",
    ):
        assert piece in text
    assert "MEETS  2.93 times faster" in text


def test_the_lines_under_it_name_the_baselines_efficiency_the_twin_and_what_failed(tmp_path: Path) -> None:
    text = drawn(tmp_path)
    assert "The untouched model reaches" in text
    assert "against itself: 1.001x [0.996, 1.006], which covers 1" in text
    assert "7 measured, 1 unsupported, 1 failed, 1 skipped" in text


def test_no_number_is_lost_in_a_terminal_of_eighty_columns(tmp_path: Path) -> None:
    joined = " ".join(drawn(tmp_path, width=80).split())
    for piece in ("2.93x", "2.32x", "820 µs", "52 %", "2.30 MB", "11.5 MB"):
        assert piece in joined


def test_an_unproven_verdict_names_the_samples_that_are_missing(tmp_path: Path) -> None:
    assert "About 900 more samples would decide." in " ".join(drawn(tmp_path, word="UNPROVEN").split())


def test_what_has_no_column_is_said_below_in_one_line_each(tmp_path: Path) -> None:
    text = " ".join(drawn(tmp_path).split())
    assert "The chosen plan loads in 30.0 ms; its first run takes 3.28 ms." in text
    assert "chosen: with 3x3 convolutions at Winograd's cost its limit is" in text
    assert "over the bare process of its engine" in text
    assert text.count("counts no arithmetic for TopK") == 1
    assert "never settled" not in text


def test_plans_that_never_settled_are_named(tmp_path: Path) -> None:
    result = make_result(tmp_path)
    first, *others = result.certificates
    restless = replace(first.measurement, latency=replace(first.measurement.latency, settled=False))
    result = replace(result, certificates=(replace(first, measurement=restless), *others))
    assert "chosen: never settled while warming up." in notes(result)


def test_a_metric_with_a_long_name_does_not_widen_the_table(tmp_path: Path) -> None:
    file = io.StringIO()
    result = replace(make_result(tmp_path), metric="my_package.metrics:weighted_f1")
    Console(file=file, width=80).print(frontier_table(result))
    assert "quality" in file.getvalue()
    assert "my_package" not in file.getvalue()
    assert "Quality is my_package.metrics:weighted_f1" in " ".join(notes(result))


@pytest.mark.parametrize("width", [80, 120, 150])
def test_the_names_of_all_columns_are_on_two_lines(tmp_path: Path, width: int) -> None:
    lines = drawn(tmp_path, width=width).splitlines()
    assert any(all(name in line for name in ("latency", "untouched", "lossless", "memory")) for line in lines)


def test_a_finalist_that_fell_is_named_with_its_reason(tmp_path: Path) -> None:
    result = make_result(tmp_path)
    fallen = replace(result, fallen={result.trials[2].key: "the child process died"})
    assert "Fell out of the finals: openvino(threads=2): the child process died." in notes(fallen)
