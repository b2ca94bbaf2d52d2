"""Limits on runs: met, missed, and honest where it cannot be told; the verb's exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hasten.cli.app import run as hasten
from hasten.errors import InvalidSetting
from hasten.load.gate import Limits, checks_of, state_of
from hasten.load.objective import read_objective
from hasten.load.record import write_run
from load.runs import ERROR, OK, UNSENT, run_of

MS = 1e6


def judged(times: list[float], limits: Limits, **more: object) -> list[str]:
    return [check.state for check in checks_of(run_of(times, **more), limits)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("n", "failed", "most", "state"),
    [
        (10_000, 0, 0.001, "MEETS"),
        (1000, 0, 0.001, "INCONCLUSIVE"),
        (1000, 20, 0.001, "MISSES"),
        (100, 0, 0.0, "MEETS"),
        (100, 1, 0.0, "MISSES"),
        (100, 100, 1.0, "MEETS"),
    ],
)
def test_a_share_of_errors_is_judged_by_what_so_many_requests_prove(
    n: int, failed: int, most: float, state: str
) -> None:
    outcomes = [ERROR] * failed + [OK] * (n - failed)
    assert judged([MS] * n, Limits(max_errors=most), outcomes=outcomes) == [state]


def test_a_burst_of_errors_proves_less_and_is_still_a_miss_where_it_alone_is_too_much() -> None:
    apart = [ERROR if at % 2000 == 0 else OK for at in range(10_000)]
    burst = [ERROR] * 5 + [OK] * 9_995
    limits = Limits(max_errors=0.0015)
    assert judged([MS] * 10_000, limits, outcomes=apart) == ["MEETS"]
    assert judged([MS] * 10_000, limits, outcomes=burst) == ["INCONCLUSIVE"]
    assert judged([MS] * 10_000, limits, outcomes=[ERROR] * 50 + [OK] * 9_950) == ["MISSES"]


@pytest.mark.parametrize(("least", "state"), [(90.0, "MEETS"), (110.0, "MISSES")])
def test_a_throughput_is_judged_by_its_interval(least: float, state: str) -> None:
    assert judged([MS] * 2000, Limits(min_throughput=least)) == [state]


def test_a_throughput_that_varies_around_the_limit_cannot_be_told() -> None:
    outcomes = ([OK] * 100 + [ERROR] * 50) * 10
    limit = Limits(min_throughput=100 * outcomes.count(OK) / len(outcomes))
    assert judged([MS] * 1500, limit, outcomes=outcomes) == ["INCONCLUSIVE"]


def test_a_run_that_was_cut_short_misses_whatever_its_times() -> None:
    run = run_of([MS] * 1000, outcomes=[OK] * 900 + [UNSENT] * 100, cut_short="the server is gone")
    found = checks_of(run, Limits(objectives=(read_objective("p99 <= 20ms"),)))
    assert [check.state for check in found] == ["MISSES", "MEETS"]
    assert state_of(found) == "MISSES"


def test_a_late_generator_makes_a_limit_on_times_invalid_and_leaves_the_others() -> None:
    limits = Limits(objectives=(read_objective("p99 <= 20ms"),), max_errors=0.0)
    assert judged([5 * MS] * 1000, limits, late_ns=2 * MS) == ["INVALID", "MEETS"]


def test_a_gate_without_limits_is_none() -> None:
    with pytest.raises(InvalidSetting, match="needs a limit"):
        Limits()


@pytest.mark.parametrize(
    ("words", "code", "state"),
    [
        (["--max-p99", "20ms", "--max-errors", "0"], 0, "MEETS"),
        (["--max-p99", "4ms"], 3, "MISSES"),
        (["--max-p50", "20ms", "--slo", "p99.99 <= 20ms"], 4, "INCONCLUSIVE"),
        (["--min-throughput", "99", "--max-p99", "4ms"], 3, "MISSES"),
    ],
)
def test_the_exit_code_is_that_of_the_worst_limit(
    words: list[str], code: int, state: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(run_of([5 * MS] * 1000), tmp_path)
    assert hasten(["gate", str(tmp_path), *words, "--json"]) == code
    assert json.loads(capsys.readouterr().out)["state"] == state
    assert hasten(["gate", str(tmp_path), *words]) == code
    assert state in capsys.readouterr().out


def test_what_a_server_said_is_shown_with_its_brackets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(run_of([5 * MS] * 1000, cut_short="it said [/b] of x[ids]"), tmp_path)
    assert hasten(["gate", str(tmp_path), "--max-p99", "20ms"]) == 3
    assert "it said [/b] of x[ids]" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere", "--max-p99", "20ms"], "neither a recorded run"),
        ([], "--max-p99 20ms"),
        (["--slo", "fast"], "'p99 <= 20ms'"),
        (["--max-errors", "3"], "3%|share"),
    ],
)
def test_what_is_wrong_is_one_line(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    write_run(run_of([5 * MS] * 1000), tmp_path)
    what = [] if words and words[0] == "nowhere" else [str(tmp_path)]
    assert hasten(["gate", *what, *words]) == 2
    told = capsys.readouterr().err
    assert re.search(said, told)
    assert len(told.strip().splitlines()) == 1
