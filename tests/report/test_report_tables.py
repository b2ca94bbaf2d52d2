import io
from pathlib import Path

from rich.console import Console
from synthetic_result import make_result

from hasten.report.tables import result_table
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
