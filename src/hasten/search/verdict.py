"""From certified finalists to one word and the sentence that says why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hasten.measure.quality import proves, refutes, samples_needed
from hasten.measure.statistics import (
    P99_CONFIDENCE,
    median_interval,
    percentile_fails,
    percentile_holds,
    runs_needed,
)
from hasten.measurement import Estimate, Latency, Measurement
from hasten.search.result import Certificate, Goal, Objective, Verdict

BETTER: Mapping[Objective, str] = {"latency": "faster", "size": "smaller", "memory": "smaller in memory"}
"""The word for a plan that is better by an objective."""


@dataclass(frozen=True)
class Judgement:
    """Of one finalist: which parts of the goal hold, which are missed, which are open. Each a sentence."""

    missed: tuple[str, ...] = ()
    open: tuple[str, ...] = ()
    noisy: tuple[str, ...] = ()
    more_samples: int | None = None


def judge(certificate: Certificate, goal: Goal) -> Judgement:
    """Hold a finalist against every constraint."""
    missed: list[str] = []
    undecided: list[str] = []
    more: int | None = None
    quality = certificate.quality
    if goal.max_drop is not None and quality is not None:
        interval, allowed = percent(quality.drop), f"{goal.max_drop * 100:g} %"
        if lost := _lost(certificate, goal):
            missed.append(lost)
        elif not proves(quality, goal.max_drop):
            more = samples_needed(quality, goal.max_drop)
            tail = f"about {more:,} more certify samples would decide" if more else "no sample size would prove it"
            undecided.append(
                f"a drop of {interval} in {quality.metric} on {quality.drop.n} samples does not prove "
                f"at most {allowed}; {tail}"
            )
    sentences, unsure = _limits(certificate.measurement, goal)
    return Judgement((*missed, *sentences), tuple(undecided), tuple(unsure), more)


def _lost(certificate: Certificate, goal: Goal) -> str | None:
    """Say that a finalist loses more than allowed, where that is beyond doubt."""
    quality = certificate.quality
    if goal.max_drop is None or quality is None or not refutes(quality, goal.max_drop):
        return None
    allowed = f"{goal.max_drop * 100:g} %"
    return f"it loses {percent(quality.drop)} of {quality.metric}, more than the {allowed} allowed"


def percent(drop: Estimate) -> str:
    """Write a drop with its interval: ``0.30 % [-0.10, 0.70]``."""
    value, low, high = (number * 100 + 0.0 for number in (drop.value, drop.low, drop.high))
    return f"{value:.2f} % [{low:.2f}, {high:.2f}]"


def _limits(measurement: Measurement, goal: Goal) -> tuple[list[str], list[str]]:
    missed: list[str] = []
    noisy: list[str] = []
    latency, resources = measurement.latency, measurement.resources
    if goal.p99_ns is not None:
        _p99(latency, goal.p99_ns, missed, noisy)
    if goal.min_throughput is not None:
        _throughput(latency, goal, missed, noisy)
    if goal.max_file_bytes is not None and resources.file_bytes > goal.max_file_bytes:
        missed.append(f"its files take {resources.file_bytes:,} bytes, more than {goal.max_file_bytes:,}")
    if goal.max_memory_bytes is not None and resources.peak_rss_bytes > goal.max_memory_bytes:
        missed.append(
            f"it takes up to {resources.peak_rss_bytes:,} bytes of memory, more than {goal.max_memory_bytes:,}"
        )
    return missed, noisy


def _throughput(latency: Latency, goal: Goal, missed: list[str], noisy: list[str]) -> None:
    """Hold the interval of samples a second against the limit."""
    wanted = goal.min_throughput or 0.0
    bounds = median_interval(latency.slices_ns)
    if bounds is None:
        noisy.append(f"{len(latency.slices_ns)} slices tell no interval of its throughput; it takes six")
        return
    low, high = (goal.batch * 1e9 / ns for ns in reversed(bounds))
    if high < wanted:
        missed.append(f"it does {low:,.0f} to {high:,.0f} samples/s, fewer than the {wanted:,.0f} asked")
    elif low < wanted:
        noisy.append(f"it does {low:,.0f} to {high:,.0f} samples/s, which does not prove {wanted:,.0f}")


def _p99(latency: Latency, limit_ns: float, missed: list[str], noisy: list[str]) -> None:
    """Hold runs over the limit against it by the exact binomial test, in both directions.

    The runs were looked at before, so that what they are to hold is what each look had to.
    """
    misses, limit_ms = latency.misses or 0, limit_ns / 1e6
    if percentile_holds(latency.runs, misses, 0.99, P99_CONFIDENCE):
        return
    if percentile_fails(latency.runs, misses, 0.99):
        missed.append(f"{misses} of {latency.runs} runs took over {limit_ms:g} ms: p99 is not under it")
        return
    needed = runs_needed(0.99, misses, P99_CONFIDENCE)
    noisy.append(f"{latency.runs} runs with {misses} over {limit_ms:g} ms prove no p99; it takes {needed:,} of them")


def choose(
    certificates: Sequence[Certificate], goal: Goal, *, original: str, faster: Mapping[tuple[str, str], bool]
) -> tuple[Certificate, Verdict]:
    """Choose among finalists, best objective first, and say how good it is.

    Args:
        certificates: The finalists, best objective first, of equals the simplest first; the original is among them.
        goal: What was asked.
        original: Key of the untouched model.
        faster: For (a, b): a is faster than b beyond doubt.
    """
    judged = {item.plan: judge(item, goal) for item in certificates}
    sound = [item for item in certificates if not judged[item.plan].missed and not judged[item.plan].noisy]
    proven = [item for item in sound if not judged[item.plan].open]
    undecided = [item for item in sound if judged[item.plan].open]
    ahead = bool(proven and undecided) and _ahead(undecided[0], proven[0], certificates, faster)
    if proven and (proven[0].plan != original or not ahead):  # what is open outranks "do nothing" alone
        only_it = bool(judged[original].missed)
        return _proven(proven[0], certificates, goal, original, faster, needed=only_it)
    if undecided:
        item = undecided[0]
        return item, Verdict(
            word="UNPROVEN", sentence="; ".join(judged[item.plan].open), more_samples=judged[item.plan].more_samples
        )
    shaky = [item for item in certificates if judged[item.plan].noisy and not judged[item.plan].missed]
    if shaky:
        return shaky[0], Verdict(word="INCONCLUSIVE", sentence="; ".join(judged[shaky[0].plan].noisy))
    item = min(certificates, key=lambda c: (_loses_quality(c, goal), certificates.index(c)))
    return item, Verdict(word="BEST_EFFORT", sentence="; ".join(judged[item.plan].missed))


def _ahead(
    a: Certificate, b: Certificate, order: Sequence[Certificate], faster: Mapping[tuple[str, str], bool]
) -> bool:
    return order.index(a) < order.index(b) and faster.get((a.plan, b.plan), False)


def _loses_quality(certificate: Certificate, goal: Goal) -> bool:
    quality = certificate.quality
    return goal.max_drop is not None and quality is not None and not proves(quality, goal.max_drop)


def _proven(
    item: Certificate,
    certificates: Sequence[Certificate],
    goal: Goal,
    original: str,
    faster: Mapping[tuple[str, str], bool],
    *,
    needed: bool,
) -> tuple[Certificate, Verdict]:
    """Say how good a proven plan is. ``needed``: the original misses the goal, so it need not be faster."""
    ratio = item.over_original
    if item.plan == original:
        better = [c for c in certificates if faster.get((c.plan, original), False)]
        lost = [c for c in better if _lost(c, goal)]
        if lost:
            sentence = f"what was {BETTER[goal.objective]} did not hold on the certify split: {_lost(lost[0], goal)}"
            return item, Verdict(word="REGRESSION", sentence=f"{sentence}. The untouched model stays")
        return item, Verdict(word="MEETS", sentence=f"{_kept_back(better, goal)}; the untouched model meets the goal")
    if goal.objective == "latency" and not needed and not ratio.settled and not ratio.wins:
        sentence = f"{ratio.value:.2f}x [{ratio.low:.2f}, {ratio.high:.2f}] is too wide to say that it is faster"
        return item, Verdict(word="INCONCLUSIVE", sentence=sentence)
    sentence = f"{ratio.value:.2f}x [{ratio.low:.2f}, {ratio.high:.2f}] over the original"
    if item.quality is not None:
        drop = item.quality.drop
        sentence += f", {item.quality.metric} drop {percent(drop)} on {drop.n} samples that the search never saw"
    return item, Verdict(word="MEETS", sentence=sentence)


def _kept_back(better: Sequence[Certificate], goal: Goal) -> str:
    """Say why none of the plans that are better than the original beyond doubt, best first, was chosen."""
    word = BETTER[goal.objective]
    for item in better:
        judgement = judge(item, goal)
        if judgement.missed:
            return f"what is {word} beyond doubt does not keep the goal: {'; '.join(judgement.missed)}"
        if judgement.noisy or judgement.open:
            return f"what is {word} beyond doubt is not proven to: {'; '.join((*judgement.noisy, *judgement.open))}"
    return f"nothing that was tried is {word} beyond doubt"
