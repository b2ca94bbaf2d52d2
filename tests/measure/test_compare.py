"""Comparisons of synthetic contenders whose true ratio is known, on a clock that nobody waits for."""

import math

import numpy as np
import pytest

from hasten.errors import BuildFailed, InvalidSetting, UnknownName, Untrusted
from hasten.measure.compare import Contender, compare, is_decided
from hasten.measurement import Ratio

REPEATS = 100


class Machine:
    """A clock in seconds, and a common slowness that wanders as on a shared machine."""

    def __init__(self, seed, *, drift=0.0):
        self.random = np.random.default_rng(seed)
        self.now = 0.0
        self.drift = drift
        self.slowness = 0.0  # logarithm

    def clock(self):
        return self.now

    def spend(self, seconds):
        """Let time pass: the slowness wanders, and trends upwards."""
        self.now += seconds
        self.slowness += self.drift * (seconds + math.sqrt(seconds) * self.random.standard_normal())


class Synthetic:
    """Runs take ``run_s``, times the machine's slowness, times autocorrelated noise, with slow runs now and then."""

    def __init__(self, name, machine, run_s=0.002, *, noise=0.03, slice_noise=0.01, fails_in=None, settles=True):
        self.name = name
        self.first_run_ns = 5e9 * run_s
        self.machine = machine
        self.run_s = run_s
        self.noise = noise
        self.slice_noise = slice_noise
        self.fails_in = fails_in
        self.settles = settles
        self.slices = 0
        self.asked = []

    def warm_up(self):
        if self.fails_in == "warm-up":
            raise BuildFailed("warm_up", "it broke")
        return self.settles

    def slice(self, seconds):
        self.asked.append(seconds)
        self.slices += 1
        if self.fails_in == self.slices:
            raise BuildFailed("slice", f"it broke in slice {self.slices}")
        random = self.machine.random
        n = max(1, round(seconds / self.run_s))
        noise = self.noise * random.standard_normal(n)
        for i in range(1, n):
            noise[i] += 0.9 * noise[i - 1]  # runs resemble the ones before them
        noise += self.slice_noise * random.standard_normal()  # and so does the whole slice
        noise += np.log(3) * (random.random(n) < 0.02)  # something else takes the processor
        times = self.run_s * np.exp(noise + self.machine.slowness)
        self.machine.spend(float(times.sum()))
        return (times * 1e9).astype(np.int64)


def duel(seed, speedup, *, drift=0.0, **settings):
    machine = Machine(seed, drift=drift)
    pair = [Synthetic("base", machine, 0.002 * speedup), Synthetic("new", machine, 0.002)]
    given = {"budget_s": 30, "seed": seed, "clock": machine.clock} | settings
    return compare(pair, **given), machine


@pytest.mark.parametrize("drift", [0.0, 0.02], ids=["steady machine", "drifting machine"])
def test_a_twin_does_not_win_or_lose(drift):
    ratios = [duel(seed, 1.0, drift=drift)[0].ratio("base", "new") for seed in range(REPEATS)]
    assert sum(ratio.wins or ratio.loses for ratio in ratios) <= 0.05 * REPEATS
    assert sum(ratio.low <= 1 <= ratio.high for ratio in ratios) >= 0.88 * REPEATS


@pytest.mark.parametrize("drift", [0.0, 0.02], ids=["steady machine", "drifting machine"])
def test_ten_percent_are_found(drift):
    ratios = [duel(seed, 1.10, drift=drift)[0].ratio("base", "new") for seed in range(REPEATS)]
    assert sum(ratio.wins for ratio in ratios) >= 0.95 * REPEATS
    assert sum(ratio.low <= 1.10 <= ratio.high for ratio in ratios) >= 0.88 * REPEATS


def test_without_interleaving_the_drift_would_be_taken_for_a_difference():
    machine = Machine(0, drift=0.05)
    base, new = Synthetic("base", machine), Synthetic("new", machine)
    first = np.median(np.concatenate([base.slice(0.2) for _ in range(20)]))
    later = np.median(np.concatenate([new.slice(0.2) for _ in range(20)]))
    assert abs(math.log(first / later)) > 0.05
    assert abs(math.log(duel(0, 1.0, drift=0.05)[0].ratio("base", "new").value)) < 0.02


def test_the_order_of_the_ratio_is_baseline_over_candidate():
    comparison, _ = duel(0, 2.0)
    assert comparison.ratio("base", "new").value == pytest.approx(2, rel=0.03)
    assert comparison.ratio("new", "base").value == pytest.approx(0.5, rel=0.03)
    assert comparison.ratio("new", "base").loses


def test_it_stops_when_the_interval_is_as_narrow_as_asked():
    comparison, machine = duel(0, 1.0, precision=0.03, budget_s=1000)
    assert comparison.stopped == "precise"
    assert comparison.ratio("base", "new").settled
    assert machine.now < 100


def test_it_stops_when_the_budget_is_spent_and_the_ratio_is_not_settled():
    comparison, machine = duel(0, 1.0, precision=1e-6, budget_s=12)
    assert comparison.stopped == "budget"
    assert not comparison.ratio("base", "new").settled
    assert 10 < machine.now <= 12.5
    assert comparison.seconds == machine.now


def test_a_screening_stops_as_soon_as_the_ratio_is_clear_of_the_threshold():
    patient, _ = duel(0, 1.5, precision=0.002)
    hasty, _ = duel(0, 1.5, precision=0.002, decide=True)
    assert hasty.stopped == "decided"
    assert hasty.ratio("base", "new").wins
    assert len(hasty.medians_ns("new")) < len(patient.medians_ns("new"))


@pytest.mark.parametrize(
    ("low", "value", "high", "decided"),
    [(1.04, 1.05, 1.06, True), (1.03, 1.05, 1.07, False), (0.99, 1.0, 1.005, True), (0.99, 1.0, 1.015, False)],
)
def test_a_ratio_is_decided_when_twice_its_interval_is_clear(low, value, high, decided):
    assert is_decided(Ratio(value=value, low=low, high=high, n=10, settled=False)) is decided


def test_a_very_slow_model_is_measured_within_the_budget():
    machine = Machine(0)
    pair = [Synthetic("base", machine, 4.0), Synthetic("new", machine, 2.0)]
    comparison = compare(pair, budget_s=40, clock=machine.clock)
    assert all(len(one) == 1 for one in comparison.slices["base"])
    assert machine.now <= 40
    assert comparison.ratio("base", "new").wins


def test_a_budget_under_one_block_still_gives_an_interval():
    machine = Machine(0)
    pair = [Synthetic("base", machine, 4.0), Synthetic("new", machine, 2.0)]
    comparison = compare(pair, budget_s=1, clock=machine.clock)
    assert comparison.ratio("base", "new").n == 2


def test_every_contender_has_its_turn_in_each_block_in_an_order_that_changes():
    machine, order = Machine(0), []

    class Noted(Synthetic):
        def slice(self, seconds):
            order.append(self.name)
            return super().slice(seconds)

    compare([Noted(name, machine) for name in "abc"], budget_s=10, precision=1e-6, clock=machine.clock)
    blocks = [tuple(order[i : i + 3]) for i in range(0, len(order), 3)]
    assert all(sorted(block) == ["a", "b", "c"] for block in blocks)
    assert len(set(blocks)) > 3


def test_the_same_seed_gives_the_same_comparison():
    one, other = (duel(7, 1.05)[0] for _ in range(2))
    assert one.medians_ns("new") == other.medians_ns("new")
    assert one.ratio("base", "new") == other.ratio("base", "new")


@pytest.mark.parametrize("when", ["warm-up", 1, 4])
def test_a_contender_that_fails_is_recorded_and_the_others_go_on(when):
    machine = Machine(0)
    three = [Synthetic("base", machine), Synthetic("bad", machine, fails_in=when), Synthetic("good", machine, 0.001)]
    comparison = compare(three, budget_s=60, clock=machine.clock)
    assert set(comparison.failures) == {"bad"}
    assert comparison.ratio("base", "good").wins
    for ask in (lambda: comparison.ratio("base", "bad"), lambda: comparison.latency("bad")):
        with pytest.raises(BuildFailed, match="it broke"):
            ask()


def test_a_comparison_ends_when_everybody_has_failed():
    machine = Machine(0)
    pair = [Synthetic("a", machine, fails_in=2), Synthetic("b", machine, fails_in="warm-up")]
    comparison = compare(pair, budget_s=60, clock=machine.clock)
    assert comparison.stopped == "failed"
    assert set(comparison.failures) == {"a", "b"}


def test_a_bug_is_not_taken_for_an_outcome():
    class Broken(Synthetic):
        def slice(self, seconds):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        compare([Broken("a", Machine(0))], budget_s=1)


def test_a_slice_without_a_run_is_a_failure_of_that_contender():
    class Empty(Synthetic):
        def slice(self, seconds):
            return np.array([], np.int64)

    machine = Machine(0)
    comparison = compare([Synthetic("a", machine), Empty("b", machine)], budget_s=5, clock=machine.clock)
    assert isinstance(comparison.failures["b"], Untrusted)


def test_the_caller_can_end_it_after_any_block():
    comparison, _ = duel(0, 1.0, stop_when=lambda state: len(state.medians_ns("new")) == 3)
    assert comparison.stopped == "asked"
    assert len(comparison.medians_ns("base")) == 3


def test_ratios_over_each_baseline_are_waited_for():
    machine = Machine(0)
    three = [Synthetic("a", machine), Synthetic("b", machine, slice_noise=0.1), Synthetic("c", machine)]
    given = {"precision": 0.02, "budget_s": 2000, "clock": machine.clock}
    comparison = compare(three, over=["b"], **given)
    assert comparison.stopped == "precise"
    assert comparison.ratio("b", "a").settled
    assert comparison.ratio("b", "c").settled


def test_a_single_contender_is_only_timed():
    machine = Machine(0)
    comparison = compare([Synthetic("a", machine, settles=False)], budget_s=60, clock=machine.clock)
    latency = comparison.latency("a", limit_ns=4_000_000)
    assert len(latency.slices_ns) == 10
    assert latency.runs == sum(len(one) for one in comparison.slices["a"])
    assert latency.median_ns == pytest.approx(2e6, rel=0.05)
    assert (latency.settled, latency.first_run_ns) == (False, 1e7)
    assert 0 < latency.misses < latency.runs


def test_progress_tells_the_warm_up_and_each_block():
    told = []
    duel(0, 1.0, budget_s=6, progress=lambda text, share: told.append((text, share)))
    assert [text for text, _ in told[:3]] == ["warming up base", "warming up new", "comparing, block 1"]
    assert 0 < told[2][1] < told[-1][1] <= 1


@pytest.mark.parametrize(
    "wrong", [{"budget_s": 0}, {"precision": 0}, {"slice_s": 0}, {"min_blocks": 0}], ids=lambda wrong: next(iter(wrong))
)
def test_numbers_that_cannot_be_are_refused(wrong):
    with pytest.raises(InvalidSetting, match=next(iter(wrong))):
        compare([Synthetic("a", Machine(0))], **({"budget_s": 1} | wrong))


def test_names_must_be_there_and_differ():
    machine = Machine(0)
    with pytest.raises(InvalidSetting, match="names of their own"):
        compare([Synthetic("a", machine), Synthetic("a", machine)], budget_s=1)
    with pytest.raises(InvalidSetting):
        compare([], budget_s=1)
    with pytest.raises(UnknownName, match="did you mean 'base'"):
        compare([Synthetic("base", machine)], budget_s=1, over=["bas"])
    comparison, _ = duel(0, 1.0, budget_s=5)
    with pytest.raises(UnknownName):
        comparison.ratio("base", "other")


def test_a_synthetic_contender_is_one():
    contender: Contender = Synthetic("a", Machine(0))
    assert contender.warm_up()
