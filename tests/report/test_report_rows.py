from pathlib import Path

from synthetic_result import make_result

from hasten.report.rows import certified_rows, counts, frontier_rows, measured_rows


def test_the_frontier_is_fastest_first_and_always_has_the_untouched_and_the_lossless(tmp_path: Path) -> None:
    rows = frontier_rows(make_result(tmp_path, extra=10))
    times = [row.measurement.latency.median_ns for row in rows]
    assert times == sorted(times)
    assert {role for row in rows for role in row.roles} == {"chosen", "best lossless", "untouched"}


def test_a_finalist_shows_the_certify_split_and_everyone_else_the_search_split(tmp_path: Path) -> None:
    result = make_result(tmp_path, extra=3)
    by_key = {row.key: row for row in measured_rows(result)}
    assert by_key[result.chosen].split == "certify"
    assert by_key[result.chosen].quality == result.certificates[0].quality
    other = next(t for t in result.trials if t.measurement and not result.certificate(t.key))
    assert by_key[other.key].split == "search"


def test_only_finalists_have_a_ratio_over_the_best_lossless(tmp_path: Path) -> None:
    result = make_result(tmp_path, extra=3)
    finalists = {item.plan for item in result.certificates}
    assert all((row.over_lossless is not None) == (row.key in finalists) for row in measured_rows(result))


def test_every_row_carries_its_baselines_own_efficiency(tmp_path: Path) -> None:
    result = make_result(tmp_path)
    bound = result.certificates[-1].measurement.bound
    assert bound
    assert {row.baseline_efficiency for row in certified_rows(result)} == {bound.efficiency}


def test_what_came_to_nothing_is_counted(tmp_path: Path) -> None:
    assert counts(make_result(tmp_path)) == {"measured": 7, "unsupported": 1, "failed": 1, "skipped": 1}


def test_the_untouched_model_has_lost_nothing_and_is_judged_on_the_finalists_samples(tmp_path: Path) -> None:
    result = make_result(tmp_path)
    row = next(row for row in frontier_rows(result) if row.key == result.original)
    assert row.quality
    assert (row.quality.value, row.quality.drop.value, row.quality.drop.high) == (0.984, 0.0, 0.0)
    assert (row.split, row.quality.drop.n) == ("certify", 500)
