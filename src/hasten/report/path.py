"""The path from the untouched model to the chosen plan: what each step of the plan brought, as far as it was measured.

A step counts as measured where a trial stands between the two: on the chosen plan's engine, with some of its passes,
in their order and with their settings. A step without such a trial is not divided by guessing: it is shown together
with the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hasten.measurement import Latency, Measurement, Quality, Ratio
from hasten.plan import Part, Plan
from hasten.report import format as fmt
from hasten.search.result import Result, Trial

UNTOUCHED = "untouched"
"""What the first point of the path is called."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One point of the path: a measured plan, and what it has that the point before has not.

    All numbers are the search's own, so that two steps can be compared: those of the final comparison were taken at
    another time, on other samples, and of the finalists alone.
    """

    plan: str
    """The measured plan's key."""
    name: str
    """What was added, by name: ``fold + fuse``; ``untouched`` for the first."""
    parts: tuple[str, ...]
    """What was added, with its settings, in the plan's order. Several: they were measured only together."""
    latency: Latency
    change_ns: float | None
    """This point's median minus the last one's: under 0 where it became faster. None for the first."""
    over_original: Ratio
    quality: Quality | None
    """On the search samples; None: not judged."""
    file_bytes: int


def path_of(result: Result) -> tuple[Step, ...]:
    """Give the path, the untouched model first, the chosen plan last.

    Nothing where there is no way to show: the untouched model was chosen, or one of the two was not measured.
    """
    ends = (result.trial(result.original), result.trial(result.chosen))
    if result.original == result.chosen:
        return ()
    chain = [ends[0], *_between(result, *ends), ends[1]]
    measured = [(trial.plan, trial.measurement) for trial in chain if trial.measurement is not None]
    if len(measured) < len(chain):
        return ()
    steps: list[Step] = []
    for i, (plan, measurement) in enumerate(measured):
        steps.append(_step(plan, measurement, chain[i - 1].plan if i else None, steps[-1] if steps else None))
    return tuple(steps)


def change(step: Step) -> str:
    """Write what a step saved or cost in time, with its sign; nothing for the first."""
    if step.change_ns is None:
        return ""
    sign = "−" if step.change_ns < 0 else "+"
    return f"{sign}{fmt.duration(abs(step.change_ns))}"


def added_passes(before: Plan, after: Plan) -> tuple[int, ...]:
    """Give the positions in ``after`` of the passes that ``before``, from which it goes on, has not."""
    left = list(before.passes)
    positions = []
    for i, part in enumerate(after.passes):
        if left and part == left[0]:
            left.pop(0)
        else:
            positions.append(i)
    return tuple(positions)


def goes_on_from(after: Sequence[Part], before: Sequence[Part]) -> bool:
    """Say whether ``before`` can be had by leaving passes out of ``after``."""
    left = iter(after)
    return all(part in left for part in before)


def _between(result: Result, original: Trial, chosen: Trial) -> list[Trial]:
    """Give the most measured plans that each go on from the one before, from the untouched model to the chosen plan.

    Of two ways with as many points, the one whose points are beginnings of the chosen plan: it reads in its order.
    """
    passes = chosen.plan.passes
    within = [
        trial
        for trial in result.trials
        if trial.measurement is not None
        and trial.plan.engine == chosen.plan.engine
        and trial.key != original.key
        and len(trial.plan.passes) < len(passes)
        and goes_on_from(passes, trial.plan.passes)
    ]
    ways: list[tuple[int, int, list[Trial]]] = [(0, 0, [])]
    for trial in sorted(within, key=lambda trial: len(trial.plan.passes)):
        own = trial.plan.passes
        open_ways = [way for way in ways if not way[2] or _shorter(way[2][-1].plan.passes, own)]
        points, beginnings, chain = max(open_ways, key=lambda way: way[:2])
        ways.append((points + 1, beginnings + (own == passes[: len(own)]), [*chain, trial]))
    return max(ways, key=lambda way: way[:2])[2]


def _shorter(before: Sequence[Part], after: Sequence[Part]) -> bool:
    return len(before) < len(after) and goes_on_from(after, before)


def _step(plan: Plan, measured: Measurement, last: Plan | None, before: Step | None) -> Step:
    parts, names = [str(plan.engine)], [UNTOUCHED]
    if last is not None:
        positions = added_passes(last, plan)
        engine = [] if plan.engine == last.engine else [str(plan.engine)]
        parts = [*engine, *(str(plan.passes[i]) for i in positions)]
        names = [*engine, *(_name(plan.passes, i) for i in positions)]
    median = measured.latency.median_ns
    return Step(
        plan=plan.key,
        name=" + ".join(names),
        parts=tuple(parts),
        latency=measured.latency,
        change_ns=median - before.latency.median_ns if before else None,
        over_original=measured.speedup,
        quality=measured.quality,
        file_bytes=measured.resources.file_bytes,
    )


def _name(passes: Sequence[Part], position: int) -> str:
    """Name a pass; training on a graph that is quantized already has a name of its own."""
    name = passes[position].name
    behind = any(part.name.startswith("quantize") for part in passes[:position])
    return f"quantization-aware {name}" if name == "finetune" and behind else name
