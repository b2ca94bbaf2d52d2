"""From certificates to a verdict: never better than what was proven."""

from dataclasses import replace

import pytest

from hasten.search.result import Goal, Objective
from hasten.search.verdict import choose

from .trials import certificate, judged, ratio

GOAL = Goal(max_drop=0.01)
ORIGINAL = certificate("original", 1.0)


def decide(*certificates, goal=GOAL, faster=()):
    """Choose among finalists given best first."""
    return choose(certificates, goal, original="original", faster=dict.fromkeys(faster, True))


def test_a_proven_faster_plan_meets_the_goal() -> None:
    fast = certificate("fast", 3.0, judged(0.002, half=0.005))
    chosen, verdict = decide(fast, ORIGINAL, faster=[("fast", "original")])
    assert (chosen.plan, verdict.word) == ("fast", "MEETS")
    assert "3.00x" in verdict.sentence


def test_an_interval_that_reaches_over_the_allowed_drop_is_unproven_with_the_samples_needed() -> None:
    fast = certificate("fast", 3.0, judged(0.005, half=0.02, n=40, disagreement=0.05))
    chosen, verdict = decide(fast, ORIGINAL, faster=[("fast", "original")])
    assert (chosen.plan, verdict.word) == ("fast", "UNPROVEN")
    assert verdict.more_samples is not None
    assert verdict.more_samples > 40


def test_a_proven_plan_that_is_as_fast_is_preferred_to_an_unproven_one() -> None:
    open_, proven = certificate("open", 3.0, judged(0.005, half=0.02)), certificate("proven", 2.98, judged(0.0))
    chosen, verdict = decide(open_, proven, ORIGINAL, faster=[("open", "original"), ("proven", "original")])
    assert (chosen.plan, verdict.word) == ("proven", "MEETS")


def test_a_proven_win_is_taken_before_a_faster_plan_that_is_open() -> None:
    open_, proven = certificate("open", 4.0, judged(0.005, half=0.02)), certificate("proven", 2.0, judged(0.0))
    pairs = [("open", "proven"), ("open", "original"), ("proven", "original")]
    chosen, verdict = decide(open_, proven, ORIGINAL, faster=pairs)
    assert (chosen.plan, verdict.word) == ("proven", "MEETS")


def test_a_faster_plan_over_the_size_limit_is_no_regression() -> None:
    large = certificate("large", 3.0, judged(0.0))
    small = replace(ORIGINAL.measurement, resources=replace(ORIGINAL.measurement.resources, file_bytes=10))
    chosen, verdict = decide(
        large,
        replace(ORIGINAL, measurement=small),
        goal=replace(GOAL, max_file_bytes=100),
        faster=[("large", "original")],
    )
    assert (chosen.plan, verdict.word) == ("original", "MEETS")


def test_a_few_misses_in_few_runs_prove_nothing_about_p99_either_way() -> None:
    few = certificate("fast", 2.0, judged(0.0), runs=130, misses=2)
    original = replace(ORIGINAL, measurement=certificate("o", 1.0, runs=130, misses=2).measurement)
    _, verdict = decide(few, original, goal=replace(GOAL, p99_ns=50e6), faster=[("fast", "original")])
    assert verdict.word == "INCONCLUSIVE"


def test_a_throughput_inside_the_interval_is_inconclusive() -> None:
    item = certificate("fast", 1.0, judged(0.0))
    spread = replace(item.measurement.latency, slices_ns=tuple(float(9_000_000 + 200_000 * i) for i in range(10)))
    noisy = replace(item.measurement, latency=spread)
    _, verdict = decide(
        replace(item, measurement=noisy), replace(ORIGINAL, measurement=noisy), goal=Goal(min_throughput=101)
    )
    assert verdict.word == "INCONCLUSIVE"


def test_a_plan_that_alone_meets_the_goal_need_not_be_faster_beyond_doubt() -> None:
    alone = replace(certificate("alone", 1.0, judged(0.0)), over_original=ratio(1.0, 0.2))
    late = replace(ORIGINAL, measurement=certificate("o", 1.0, runs=1000, misses=900).measurement)
    early = replace(alone, measurement=certificate("a", 1.0, runs=1000, misses=0).measurement)
    chosen, verdict = decide(early, late, goal=replace(GOAL, p99_ns=50e6))
    assert (chosen.plan, verdict.word) == ("alone", "MEETS")


def test_what_fails_on_the_certify_split_is_a_regression_and_the_untouched_model_stays() -> None:
    bad = certificate("bad", 3.0, judged(0.08, half=0.01))
    chosen, verdict = decide(bad, ORIGINAL, faster=[("bad", "original")])
    assert (chosen.plan, verdict.word) == ("original", "REGRESSION")


def test_a_regression_gives_way_to_the_next_proven_plan() -> None:
    bad, good = certificate("bad", 3.0, judged(0.08, half=0.01)), certificate("good", 2.0, judged(0.001))
    chosen, verdict = decide(bad, good, ORIGINAL, faster=[("bad", "original"), ("good", "original")])
    assert (chosen.plan, verdict.word) == ("good", "MEETS")


def test_doing_nothing_is_an_answer() -> None:
    chosen, verdict = decide(ORIGINAL)
    assert (chosen.plan, verdict.word) == ("original", "MEETS")
    assert "untouched" in verdict.sentence


def test_too_slow_for_the_p99_is_the_best_effort() -> None:
    slow = certificate("fast", 2.0, judged(0.0), runs=1000, misses=400)
    chosen, verdict = decide(
        slow,
        replace(ORIGINAL, measurement=replace(slow.measurement)),
        goal=replace(GOAL, p99_ns=1e6),
        faster=[("fast", "original")],
    )
    assert (chosen.plan, verdict.word) == ("fast", "BEST_EFFORT")
    assert "400 of 1000" in verdict.sentence


def test_too_few_runs_for_a_p99_are_inconclusive() -> None:
    few = certificate("fast", 2.0, judged(0.0), runs=100, misses=0)
    late = replace(ORIGINAL, measurement=certificate("o", 1.0, runs=1000, misses=900).measurement)
    chosen, verdict = decide(few, late, goal=replace(GOAL, p99_ns=50e6), faster=[("fast", "original")])
    assert (chosen.plan, verdict.word) == ("fast", "INCONCLUSIVE")
    assert "597" in verdict.sentence


def test_a_p99_with_enough_runs_and_few_misses_is_met() -> None:
    good = certificate("fast", 2.0, judged(0.0), runs=850, misses=1)
    chosen, verdict = decide(good, ORIGINAL, goal=replace(GOAL, p99_ns=50e6), faster=[("fast", "original")])
    assert (chosen.plan, verdict.word) == ("fast", "MEETS")


def test_runs_that_the_finals_did_not_take_for_a_proof_of_p99_are_none_for_the_verdict() -> None:
    """A single look would do with 662 runs; those that were looked at several times need more."""
    few = certificate("fast", 2.0, judged(0.0), runs=662, misses=1)
    late = replace(ORIGINAL, measurement=certificate("o", 1.0, runs=1000, misses=900).measurement)
    chosen, verdict = decide(few, late, goal=replace(GOAL, p99_ns=50e6), faster=[("fast", "original")])
    assert (chosen.plan, verdict.word) == ("fast", "INCONCLUSIVE")


def test_a_ratio_too_wide_to_tell_is_inconclusive() -> None:
    wide = replace(certificate("fast", 1.05, judged(0.0)), over_original=ratio(1.05, 0.2))
    _, verdict = decide(wide, ORIGINAL)
    assert verdict.word == "INCONCLUSIVE"


def test_throughput_size_and_memory_are_held_against_their_limits() -> None:
    item = certificate("fast", 2.0, judged(0.0))
    for goal in (Goal(min_throughput=1e9), Goal(max_file_bytes=10), Goal(max_memory_bytes=10)):
        _, verdict = decide(item, replace(ORIGINAL, measurement=item.measurement), goal=goal)
        assert verdict.word == "BEST_EFFORT"


SMALL = replace(ORIGINAL.measurement, resources=replace(ORIGINAL.measurement.resources, file_bytes=10))


def test_a_faster_plan_over_a_limit_is_said_to_be_faster_and_over_it() -> None:
    large = certificate("large", 3.0, judged(0.0))
    goal = replace(GOAL, max_file_bytes=100)
    chosen, verdict = decide(large, replace(ORIGINAL, measurement=SMALL), goal=goal, faster=[("large", "original")])
    assert (chosen.plan, verdict.word) == ("original", "MEETS")
    assert verdict.sentence.startswith("what is faster beyond doubt does not keep the goal: its files take 1,000 bytes")
    assert verdict.sentence.endswith("; the untouched model meets the goal")


def test_a_faster_plan_whose_p99_is_open_is_said_to_be_not_proven() -> None:
    few = certificate("fast", 3.0, judged(0.0), runs=100, misses=0)
    original = replace(ORIGINAL, measurement=certificate("o", 1.0, runs=1000, misses=0).measurement)
    chosen, verdict = decide(few, original, goal=replace(GOAL, p99_ns=50e6), faster=[("fast", "original")])
    assert (chosen.plan, verdict.word) == ("original", "MEETS")
    assert verdict.sentence.startswith("what is faster beyond doubt is not proven to: 100 runs with 0 over 50 ms")


@pytest.mark.parametrize(("objective", "word"), [("size", "smaller"), ("memory", "smaller in memory")])
def test_what_is_better_is_called_by_the_objective(objective: Objective, word: str) -> None:
    goal = replace(GOAL, objective=objective)
    assert f"nothing that was tried is {word} beyond doubt" in decide(ORIGINAL, goal=goal)[1].sentence
    late = certificate("late", 0.5, judged(0.0), runs=1000, misses=900)
    original = replace(ORIGINAL, measurement=certificate("o", 1.0, runs=1000, misses=0).measurement)
    _, verdict = decide(late, original, goal=replace(goal, p99_ns=50e6), faster=[("late", "original")])
    assert verdict.sentence.startswith(f"what is {word} beyond doubt does not keep the goal: 900 of 1000 runs")
    bad = certificate("bad", 3.0, judged(0.08, half=0.01))
    _, verdict = decide(bad, ORIGINAL, goal=goal, faster=[("bad", "original")])
    assert (verdict.word, verdict.sentence.startswith(f"what was {word} did not hold")) == ("REGRESSION", True)
