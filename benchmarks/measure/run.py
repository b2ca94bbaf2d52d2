"""Compare synthetic work with itself, and with 10 % more of it: what is called a win, a loss, or nothing?

    python benchmarks/measure/run.py [--comparisons 100] [--condition quiet|busy|both] [--out FOLDER]

Exit code 1 where a claim of README.md is missed.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import numpy as np

from hasten import registry
from hasten.artifact import Artifact, Step
from hasten.host import Host, Load, load_since, this_host, ticks, versions
from hasten.isolation import Child, Limits
from hasten.measure.compare import compare
from hasten.measure.latency import WarmUp
from hasten.measure.statistics import LAUNCH_SD
from hasten.measure.worker import cpus_for, open_isolated
from hasten.measurement import Ratio
from hasten.plan import Part
from hasten.samples import Samples
from hasten.store import Store, write_atomically
from hasten.tensors import Signature, TensorSpec

UNITS = 100
WORKLOADS = {"1.00x": UNITS, "1.10x": UNITS * 110 // 100}
"""Units of work of the baseline; the candidate always does ``UNITS``."""

MOST_CALLED = 0.05
LEAST_FOUND = 0.95
WARM_UP = WarmUp(min_runs=10, min_s=0.2, max_s=5.0)
SETTINGS = {"precision": 0.01, "budget_s": 6.0, "min_blocks": 10, "slice_s": 0.1}
BEGIN, END = "<!-- results -->", "<!-- end of results -->"


@dataclass(frozen=True)
class Outcome:
    """One comparison."""

    workload: str
    seed: int
    ratio: Ratio
    called: str
    stopped: str | None
    warm: bool
    median_ns: float
    seconds: float


@dataclass(frozen=True)
class Results:
    """One condition: what ``results-CONDITION.json`` holds."""

    condition: str
    comparisons: int
    started: str
    seconds: float
    host: Host
    load: Load
    processor: int
    versions: dict[str, str]
    settings: dict[str, float]
    outcomes: list[Outcome]

    def count(self, workload: str, called: str) -> int:
        return sum(one.called == called for one in self.of(workload))

    def of(self, workload: str) -> list[Outcome]:
        return [one for one in self.outcomes if one.workload == workload]

    @property
    def missed(self) -> list[str]:
        """The claims that do not hold, each in a sentence."""
        called = self.count("1.00x", "win") + self.count("1.00x", "loss")
        found = self.count("1.10x", "win")
        problems = []
        if called > MOST_CALLED * self.comparisons:
            problems.append(f"{self.condition}: {called} of {self.comparisons} twins were called a win or a loss")
        if found < LEAST_FOUND * self.comparisons:
            problems.append(f"{self.condition}: only {found} of {self.comparisons} 1.10x workloads were found")
        return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comparisons", type=int, default=100, help="of each workload, in each condition")
    parser.add_argument("--condition", choices=["quiet", "busy", "both"], default="both")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="where results-*.json go")
    asked = parser.parse_args()
    registry.register("engine", "synthetic", registry.Entry("synthetic:Synthetic"))
    missed = []
    for condition in ("quiet", "busy") if asked.condition == "both" else (asked.condition,):
        results = measure(condition, asked.comparisons)
        write_atomically(asked.out / f"results-{condition}.json", msgspec.json.format(msgspec.json.encode(results)))
        missed += results.missed
    every = [
        msgspec.json.decode(path.read_bytes(), type=Results) for path in sorted(asked.out.glob("results-*.json"))[::-1]
    ]
    print(table(every))
    if (readme := asked.out / "README.md").exists():
        summarise(readme, every)
    for sentence in missed:
        print(f"MISSED: {sentence}", file=sys.stderr)
    return 1 if missed else 0


def measure(condition: str, comparisons: int) -> Results:
    """Run all comparisons of one condition."""
    (processor,) = cpus_for(1)
    others = sorted(os.sched_getaffinity(0) - {processor})
    if condition == "busy" and not others:
        sys.exit("the condition 'busy' needs a second processor, and this process may use one only")
    started, since, start = datetime.now(UTC).isoformat(timespec="seconds"), ticks(), time.monotonic()
    outcomes = []
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        if condition == "busy":
            for cpu in others:
                stack.enter_context(Child.start("synthetic:Neighbour", limits=Limits(cpus=(cpu,))))
        bench = prepare(Path(folder))
        for seed in range(comparisons):
            for workload in WORKLOADS:  # in turn, so that both meet the same machine
                outcomes.append(bench.compare(workload, seed, processor))
                print(f"{condition} {seed + 1}/{comparisons} {show(outcomes[-1])}", flush=True)
    return Results(
        condition=condition,
        comparisons=comparisons,
        started=started,
        seconds=time.monotonic() - start,
        host=this_host(),
        load=load_since(since),
        processor=processor,
        versions=versions(),
        settings={**SETTINGS, "launch_sd": LAUNCH_SD, "warm_up_min_s": WARM_UP.min_s, "units": UNITS},
        outcomes=outcomes,
    )


@dataclass(frozen=True)
class Bench:
    """A stored stand-in for a model, and samples, so that the comparison takes the way of every other."""

    store: Store
    artifact: Artifact
    samples: Path

    def compare(self, workload: str, seed: int, processor: int) -> Outcome:
        """Compare in two fresh processes on one processor."""
        start = time.monotonic()
        units = {"baseline": WORKLOADS[workload], "candidate": UNITS}
        names = list(units) if np.random.default_rng(seed).random() < 0.5 else list(units)[::-1]
        with ExitStack() as stack:
            opened = {name: stack.enter_context(self._open(name, units[name], processor)) for name in names}
            result = compare([opened["baseline"], opened["candidate"]], seed=seed, **SETTINGS)
        ratio = result.ratio("baseline", "candidate")
        return Outcome(
            workload=workload,
            seed=seed,
            ratio=ratio,
            called="win" if ratio.wins else "loss" if ratio.loses else "no difference" if ratio.settled else "unclear",
            stopped=result.stopped,
            warm=all(result.settled.values()),
            median_ns=result.latency("candidate").median_ns,
            seconds=time.monotonic() - start,
        )

    def _open(self, name: str, units: int, processor: int):
        return open_isolated(
            Part("synthetic", {"units": units}),
            self.artifact,
            self.store,
            self.samples,
            batch=1,
            limits=Limits(seconds=60, cpus=(processor,)),
            seed=0,
            name=name,
            warm_up=WARM_UP,
        )


def prepare(folder: Path) -> Bench:
    store = Store(folder / "store")
    signature = Signature((TensorSpec("x", "float32", ("n", 1)),), (TensorSpec("y", "float32", ("n", 1)),))
    with store.scratch() as scratch:
        (scratch / "nothing").write_bytes(b"")
        made = Artifact.of(scratch, "nothing", format="synthetic", signature=signature)
        artifact = store.put(made.after(Step(name="synthetic"), source=None))
    Samples({"x": np.zeros((8, 1), np.float32)}).save(folder / "samples")
    return Bench(store, artifact, folder / "samples")


def show(one: Outcome) -> str:
    ratio = one.ratio
    return (
        f"{one.workload}: {ratio.value:.4f} [{ratio.low:.4f}, {ratio.high:.4f}] from {ratio.n} blocks, "
        f"{one.called} ({one.stopped}, {one.seconds:.1f} s)"
    )


def table(every: list[Results]) -> str:
    """Give the summary as a Markdown table."""
    lines = [
        "| condition | true ratio | comparisons | win | loss | no difference | unclear | interval covers the truth "
        "| median ratio | median half-width | claim |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for results in every:
        for workload in WORKLOADS:
            ratios = [one.ratio for one in results.of(workload)]
            truth = WORKLOADS[workload] / UNITS
            covered = sum(ratio.low <= truth <= ratio.high for ratio in ratios)
            counts = [str(results.count(workload, word)) for word in ("win", "loss", "no difference", "unclear")]
            called = results.count(workload, "win") + results.count(workload, "loss")
            claim, holds = (
                (f"at most {MOST_CALLED:.0%} called", called <= MOST_CALLED * len(ratios))
                if workload == "1.00x"
                else (f"at least {LEAST_FOUND:.0%} found", results.count(workload, "win") >= LEAST_FOUND * len(ratios))
            )
            lines.append(
                f"| {results.condition} | {workload} | {len(ratios)} | {' | '.join(counts)} | {covered} "
                f"| {np.median([ratio.value for ratio in ratios]):.4f} "
                f"| {np.median([ratio.half_width for ratio in ratios]):.2%} "
                f"| {claim}: {'holds' if holds else 'MISSED'} |"
            )
    return "\n".join(lines)


def summarise(readme: Path, every: list[Results]) -> None:
    """Write table and conditions between the markers of README.md."""
    text = readme.read_text()
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    conditions = [
        f"* {one.condition}: {one.started}, {one.seconds / 60:.0f} minutes, {one.host.cpu}, {one.host.cores} cores "
        f"({one.host.quota or 'no'} quota), {one.host.system}, load {one.load.load_average:.2f}, "
        f"steal {'unknown' if one.load.steal_share is None else f'{one.load.steal_share:.2%}'}, "
        f"work of {np.median([o.median_ns for o in one.outcomes]) / 1e6:.2f} ms, "
        f"hasten {one.versions['hasten']}, numpy {one.versions['numpy']}, Python {one.versions['python']}"
        for one in every
    ]
    body = f"{BEGIN}\n\n{table(every)}\n\n" + "\n".join(conditions) + f"\n\n{END}"
    write_atomically(readme, (head + body + tail).encode())


if __name__ == "__main__":
    sys.exit(main())
