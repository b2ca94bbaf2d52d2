"""Two services side by side: equal ones are called equal, a known ratio is found, apart is said to be apart."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from hasten.cli.app import run as hasten
from hasten.cli.compare import remarks_of, table_of
from hasten.errors import BadInput
from hasten.load.compare import Block, Compared, Sides, compared, recorded_sides
from hasten.load.record import write_run
from load.runs import ERROR, OK, run_of

MS = 1e6


def sides_of(factor: float, *, seed: int, paired: bool = True, blocks: int = 12, drift: float = 0.5) -> Sides:
    """Make blocks of lognormal times, 1 ms in the middle, B's divided by ``factor``; both drift together."""
    random = np.random.default_rng(seed)

    def block(scale: float) -> Block:
        return Block(times_ns=random.lognormal(0, 0.3, 200) * scale, rate=1e9 / scale)

    drifts = np.exp(random.normal(0, drift, blocks))
    return Sides(
        a=tuple(block(MS * d) for d in drifts),
        b=tuple(block(MS * d / factor) for d in drifts),
        paired=paired,
        seed=seed,
    )


def test_two_equal_services_are_called_different_in_few_repeats() -> None:
    called = [item.better in ("A", "B") for seed in range(40) for item in compared(sides_of(1.0, seed=seed))]
    assert np.mean(called) < 0.05


def test_a_service_twice_as_fast_is_found_whatever_drifts_on_the_machine() -> None:
    for seed in range(5):
        p50, p99, rate = compared(sides_of(2.0, seed=seed))
        assert (p50.better, rate.better) == ("B", "B")
        assert p50.ratio is not None
        assert p50.ratio.low < 2.0 < p50.ratio.high
        assert p99.better == "B"


def test_a_slower_service_loses() -> None:
    assert [item.better for item in compared(sides_of(0.5, seed=1))] == ["A", "A", "A"]


def test_runs_that_were_recorded_apart_have_wider_intervals() -> None:
    together, apart = (compared(sides_of(1.5, seed=3, paired=paired))[0].ratio for paired in (True, False))
    assert together is not None
    assert apart is not None
    assert apart.half_width > together.half_width


def test_a_percentile_that_too_few_requests_back_is_not_compared() -> None:
    random = np.random.default_rng(0)
    blocks = tuple(Block(times_ns=random.lognormal(0, 0.1, 30) * MS, rate=30.0) for _ in range(12))
    p50, p99, _ = compared(Sides(a=blocks, b=blocks, paired=True))
    assert p50.ratio is not None
    assert p99.ratio is None
    assert "459 are needed" in p99.why


def test_a_service_whose_answers_are_missing_is_said_to_have_none() -> None:
    good = run_of([MS] * 1000)
    bad = run_of([MS] * 1000, outcomes=[OK, ERROR] * 500)
    p50, p99, rate = compared(recorded_sides(good, bad))
    assert (p99.ratio, p99.better) == (None, "INCONCLUSIVE")
    assert "B has too many without an answer" in p99.why
    assert rate.better == "A"
    assert p50.name == "p50"


def test_a_run_of_a_few_requests_cannot_be_compared() -> None:
    with pytest.raises(BadInput, match="A has 50 requests"):
        recorded_sides(run_of([MS] * 50), run_of([MS] * 1000))


def test_two_recorded_runs_are_compared_by_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random = np.random.default_rng(0)
    for name, scale in (("a", 4.0), ("b", 2.0)):
        write_run(run_of((random.lognormal(0, 0.2, 2000) * scale * MS).tolist()), tmp_path / name)
    assert hasten(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [item["better"] for item in found["compared"]] == ["B", "B", "EQUAL"]
    assert found["interleaved"] is False
    assert hasten(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    shown = capsys.readouterr().out
    assert "recorded apart" in shown
    assert "B does better" in shown


def test_a_recorded_run_that_was_cut_short_is_not_compared() -> None:
    with pytest.raises(BadInput, match=r"B, http.*, was cut short: it was stopped; record it again"):
        recorded_sides(run_of([MS] * 1000), run_of([MS] * 1000, cut_short="it was stopped"))


def test_runs_that_are_not_alike_are_remarked_on() -> None:
    a = run_of([MS] * 1000)
    b = replace(a, requests=replace(a.requests, rows=np.full(1000, 8)), timeout_s=1.0)
    said = " ".join(remarks_of(recorded_sides(a, b), ([a], [b]), 0))
    assert "different numbers of rows (2 and 8)" in said
    assert "They differ in timeout_s: 10.0 and 1.0" in said


@pytest.mark.parametrize(("other", "said"), [("http://127.0.0.1:1", "not one of each"), ("nowhere", "not one of each")])
def test_a_run_and_an_address_are_not_compared(
    other: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(run_of([MS] * 200), tmp_path)
    assert hasten(["compare", str(tmp_path), other]) == 2
    assert said in capsys.readouterr().err


def test_a_figures_words_are_shown_with_their_brackets() -> None:
    found = Compared(name="p99[ids]", a=None, b=None, ratio=None, better="INCONCLUSIVE", why="of x[/b] nothing is told")
    screen = io.StringIO()
    Console(file=screen, width=120).print(table_of((found,)))
    assert "p99[ids]" in screen.getvalue()
    assert "of x[/b] nothing is told" in screen.getvalue()
