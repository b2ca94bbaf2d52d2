"""Search a space of 125 plans in two ways: by measuring all of them, and in stages; compare what each finds and costs.

    python benchmarks/search/run.py [--seconds 1.5]

Writes results.json and README's table.
"""

import argparse
import tempfile
import time
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import msgspec
import numpy as np
import onnx

from hasten.artifact import Artifact
from hasten.graph.cut import cut
from hasten.graph.groups import channel_groups
from hasten.graph.model import read_model
from hasten.host import load_since, this_host, ticks, versions
from hasten.isolation import Limits
from hasten.measure.compare import compare
from hasten.measure.latency import WarmUp
from hasten.measure.worker import cpus_for, open_isolated
from hasten.passes.fold import fold
from hasten.plan import Inputs, Part, Plan, run_plan_isolated
from hasten.samples import Samples
from hasten.search.costmodel import cost_model, mean_error, parts_of, refit, wanted_blocks
from hasten.search.knapsack import Choice, Problem, front
from hasten.search.table import change_of, divergence, keep_of, losses, sensitivities, width_sites
from hasten.search.timing import time_blocks
from hasten.store import Store
from hasten.testing.models import Builder, stored

HERE = Path(__file__).parent
BEGIN, END = "<!-- results -->", "<!-- end of results -->"
SHARES = (0.75, 0.625, 0.5, 0.25)
BUILT = 7
"""Plans that the staged search builds and measures, the original not counted."""
ROUND = 3
"""Of them in a round, then time and loss are fitted anew."""
SAMPLES = 256
QUALITY, COST, ERROR = 0.95, 0.2, 0.1
"""The claims: time of the best of all over that of the best found; share of the seconds; mean error of predictions."""
PLAN = Plan(Part("onnxruntime", {"threads": 1, "batch": 1}), (Part("fold"),))
WARM = WarmUp(min_s=0.2, max_s=3.0)


@dataclass(frozen=True)
class Seen:
    """What was measured of one plan."""

    ns: float
    kl: float


@dataclass
class Place:
    """Where plans are built and measured, each once for each search that asks, with the seconds that it took."""

    store: Store
    source: Artifact
    samples: Path
    seconds: float
    """Of the comparison of one plan."""
    limits: Limits = field(default_factory=lambda: Limits(seconds=120, cpus=cpus_for(1)))

    def __post_init__(self) -> None:
        self.model = read_model(self.source)
        self.sites = width_sites(channel_groups(self.model), shares=SHARES)
        self.anchor = self.open(self.source, "original")
        self.reference = self.anchor.outputs(0, SAMPLES, 1)
        self.anchor_ns = compare([self.anchor], budget_s=2 * self.seconds).latency("original").median_ns

    def open(self, artifact: Artifact, name: str):
        built = run_plan_isolated(PLAN, artifact, Inputs(store=self.store), limits=self.limits)
        return open_isolated(
            PLAN.engine,
            built,
            self.store,
            self.samples,
            batch=1,
            limits=self.limits,
            seed=0,
            name=name,
            warm_up=WARM,
        )

    def see(self, choice: Choice) -> Seen:
        """Build a plan, judge its outputs, and measure it beside the original."""
        widths = change_of(self.sites, choice).widths
        artifact = stored(cut(self.model, keep_of(self.model, widths)), self.store)
        with self.open(artifact, "plan") as session:
            _, kl = divergence(self.reference, session.outputs(0, SAMPLES, 1))
            made = compare([self.anchor, session], budget_s=self.seconds, slice_s=0.05, min_blocks=6, precision=0.02)
        return Seen(self.anchor_ns / made.ratio("original", "plan").value, kl)


def network() -> onnx.ModelProto:
    """Make x [batch, 3, 32, 32] -> three convolutions -> y [batch, 10]; channels matter to different degrees."""
    net = Builder(0)
    h, inner = "x", 3
    for width, stride in ((64, 1), (96, 2), (128, 1)):
        h = net.add("Conv", h, net.weight(width, inner, 3, 3), pads=[1] * 4, strides=[stride] * 2)
        scale = net.random.permutation(np.geomspace(1.5, 0.02, width)).astype(np.float32)
        zeros, ones = np.zeros(width, np.float32), np.ones(width, np.float32)
        names = [net.constant(value) for value in (scale, zeros, zeros, ones)]
        h = net.add("Relu", net.add("BatchNormalization", h, *names, epsilon=1e-5))
        inner = width
    h = net.add("Flatten", net.add("GlobalAveragePool", h))
    net.add("Gemm", h, net.weight(10, inner, scale=2.0), net.weight(10, scale=0.1), transB=1)
    model = net.model(("x", ("batch", 3, 32, 32)), ("y", ("batch", 10)))
    fold(model)
    return model


def images() -> Samples:
    """Draw smooth seeded images."""
    coarse = np.random.default_rng(0).standard_normal((SAMPLES, 3, 8, 8)).astype(np.float32)
    return Samples({"x": np.kron(coarse, np.ones((1, 1, 4, 4), np.float32))})


def best_of(seen: dict[Choice, Seen], limit: float) -> Choice:
    """Give the fastest plan within the allowed loss; the original always is."""
    return min((choice for choice, item in seen.items() if item.kl <= limit), key=lambda choice: seen[choice].ns)


def exhaustive(place: Place) -> dict[Choice, Seen]:
    """Measure every plan."""
    seen = {}
    for choice in product(*(range(len(site.options)) for site in place.sites)):
        seen[choice] = place.see(choice)
        print(f"  {choice}: {seen[choice].ns / 1e6:.3f} ms, KL {seen[choice].kl:.4f}", flush=True)
    return seen


def staged(place: Place, limit: float):
    """Search in stages. Gives what was measured, the fitted cost model, and the seconds of each stage."""
    spent, start = {}, time.monotonic()

    def lap(name: str) -> None:
        nonlocal start
        spent[name], start = time.monotonic() - start, time.monotonic()

    table = sensitivities(place.source, place.sites, place.store, place.samples, limits=place.limits)
    lap("sensitivities")
    parts = parts_of(place.model, place.sites, {"batch": 1})
    times = time_blocks(wanted_blocks(parts, place.sites), PLAN.engine, place.store, limits=place.limits)
    lap("blocks")
    original = tuple(0 for _ in place.sites)
    seen = {original: Seen(place.anchor_ns, 0.0)}
    model = refit(cost_model(parts, place.sites, times), {original: place.anchor_ns})
    lost = losses(place.sites, table, by="kl")
    scale = 1.0
    while len(seen) <= BUILT:
        problem = Problem(lost, model.terms(), model.fixed_ns)
        ahead = [item for item in front(problem) if item.choice not in seen]
        # Fastest first of those that keep the limit; where all of them are measured, those that just miss it.
        ahead.sort(key=lambda item: (item.loss * scale > limit, abs(np.log((item.loss * scale + 1e-9) / limit))))
        for item in ahead[: min(ROUND, BUILT + 1 - len(seen))]:
            seen[item.choice] = place.see(item.choice)
        if not ahead:
            break
        model = refit(cost_model(parts, place.sites, times), {choice: item.ns for choice, item in seen.items()})
        ratios = [item.kl / problem.loss(choice) for choice, item in seen.items() if problem.loss(choice) > 0]
        scale = float(np.median(ratios))
    lap("plans")
    return seen, model, spent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.5, help="of the comparison of one plan")
    asked = parser.parse_args()
    since = ticks()
    with tempfile.TemporaryDirectory() as scratch:
        store = Store(Path(scratch) / "home")
        images().save(Path(scratch) / "samples")
        place = Place(store, stored(network(), store), Path(scratch) / "samples", asked.seconds)
        with place.anchor:
            limit = place.see(tuple(site.options.index(site.options[0] // 2) for site in place.sites)).kl
            few, model, spent = staged(place, limit)
        # A store of its own: what one search has built must not save the other the work.
        other = Store(Path(scratch) / "other")
        whole = Place(other, stored(place.model, other), place.samples, asked.seconds)
        with whole.anchor:
            start = time.monotonic()
            every = exhaustive(whole)
            whole_s = time.monotonic() - start
    record = describe(place, limit, few, every, model, spent, whole_s)
    record |= {"host": this_host(), "load": load_since(since), "versions": versions()}
    (HERE / "results.json").write_bytes(msgspec.json.format(msgspec.json.encode(record)))
    write_table(msgspec.json.decode((HERE / "results.json").read_bytes()))
    held = record["quality"] >= QUALITY and record["cost"] <= COST and record["error_built"] <= ERROR
    print("holds" if held else "MISSED")
    return 0 if held else 1


def describe(place: Place, limit: float, few, every, model, spent, whole_s: float) -> dict:
    """Put the figures together. The two bests are compared by one set of times: that of the exhaustive search."""
    found, truth = best_of(few, limit), best_of(every, limit)
    times = {choice: item.ns for choice, item in every.items()}
    return {
        "sites": place.sites,
        "limit_kl": limit,
        "found": found,
        "best": truth,
        "quality": every[truth].ns / every[found].ns,
        "seconds_staged": spent,
        "seconds_exhaustive": whole_s,
        "cost": sum(spent.values()) / whole_s,
        "error_built": mean_error(model, {choice: item.ns for choice, item in few.items()}),
        "error_all": mean_error(model, times),
        "factors": model.correction,
        "plans": [
            {
                "choice": choice,
                "ms": item.ns / 1e6,
                "kl": item.kl,
                "predicted_ms": model.time_ns(choice) / 1e6,
                "built_by_staged": choice in few,
            }
            for choice, item in every.items()
        ],
    }


def write_table(record) -> None:
    """Write the recorded figures into the README, between its markers."""
    page = HERE / "README.md"
    before, _, rest = page.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    ms = {tuple(plan["choice"]): plan["ms"] for plan in record["plans"]}
    widths = {
        name: " · ".join(str(site["options"][at]) for site, at in zip(record["sites"], record[name], strict=True))
        for name in ("found", "best")
    }
    stages = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in record["seconds_staged"].items())
    built = sum(plan["built_by_staged"] for plan in record["plans"])
    lines = [
        "| | staged | exhaustive |",
        "|---|---|---|",
        f"| plans measured | {built} | {len(ms)} |",
        f"| seconds | {sum(record['seconds_staged'].values()):.1f} ({stages}) | {record['seconds_exhaustive']:.1f} |",
        f"| widths of the best | {widths['found']} | {widths['best']} |",
        f"| its time, ms (one set of times) | {ms[tuple(record['found'])]:.3f} | {ms[tuple(record['best'])]:.3f} |",
        "",
        f"Quality of the best found: {record['quality']:.3f} (claimed: at least {QUALITY}). Share of the seconds: "
        f"{record['cost']:.1%} (at most {COST:.0%}). Mean error of predictions after the refit: "
        f"{record['error_built']:.1%} on the plans built (at most {ERROR:.0%}), {record['error_all']:.1%} on all.",
    ]
    page.write_text(before + BEGIN + "\n" + "\n".join(lines) + "\n" + END + after)
    print("\n".join(lines))


if __name__ == "__main__":
    raise SystemExit(main())
