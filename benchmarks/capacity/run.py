"""The capacity model beside measurement: highest rates under three objectives for three models, and the best batching.

    python benchmarks/capacity/run.py small medium large choice-1 choice-2 choice-3

Each part takes under three minutes and writes results-PART.json beside this file; parts that are there are left alone
(delete the file to repeat one), and README's tables are written from all of them. The server has core 0 for itself,
the generator core 1.
"""

import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np

from hasten.analyse.batch_costs import costs_of
from hasten.analyse.capacity import Load, choices, highest_rate
from hasten.analyse.costs_worker import measure_costs
from hasten.analyse.highest_rate import Rules, Seen, find_highest_rate
from hasten.analyse.live import fitted
from hasten.analyse.plan_serving import in_server
from hasten.analyse.served import served
from hasten.analyse.simulate import Setup
from hasten.deployment import Deployment, Serving, write_deployment
from hasten.engines.onnxruntime import OnnxRuntime
from hasten.host import load_since, this_host, ticks, versions
from hasten.load.arrivals import Closed, Poisson
from hasten.load.figures import times_of, why_invalid
from hasten.load.generate import open_load
from hasten.load.objective import Objective
from hasten.load.payloads import payloads_of
from hasten.load.target import LoadPlan, Target
from hasten.samples import Samples
from hasten.store import Store
from hasten.testing.models import convnet, stored
from hasten.transform import Context, run_pass

HERE = Path(__file__).parent
BEGIN, END = "<!-- results -->", "<!-- end of results -->"
GENERATOR, SERVER = {1}, {0}
SIZES = (1, 2, 4, 8)
MODELS = {"small": (96, 24), "medium": (128, 24), "large": (128, 32)}
"""Image size and width of the convolution net."""

TIMES_BARE = (16, 32, 64)
"""The objectives' p99, in responses of the idle service: long beside what disturbs this machine's generator."""

BUDGET = Rules(budget_s=36.0, most_s=8.0, precision=0.05)
CHOICE_OF, CHOICE_TIMES = "small", 32
LARGEST = {"choice-1": (1, 2), "choice-2": (4, 8), "choice-3": (16, 32)}


def bundle(folder, model, sizes):
    size, width = MODELS[model]
    store = Store(folder / "store")
    ctx = Context(folder=store.root, samples=None, seed=0, progress=lambda text, share: None)
    built = run_pass(OnnxRuntime(threads=1), stored(convnet(size=size, width=width), store), store, ctx)
    deployment = Deployment(
        name="net",
        artifact=built.digest,
        engine="onnxruntime",
        settings={"threads": 1},
        source=built.digest,
        plan="",
        verdict="MEETS",
        host=this_host().binding,
        serving=Serving(instances=1, batch_sizes=sizes, isolation="thread"),
    )
    path = write_deployment(deployment, built, folder / "bundle")
    x = np.random.default_rng(0).standard_normal((64, 3, size, size)).astype(np.float32)
    return path, deployment, built, Samples({built.signature.inputs[0].name: x})


@contextlib.contextmanager
def load_on(deployment, built, samples, sizes):
    """Serve on the server's core, and give a generator on the other one."""
    os.sched_setaffinity(0, SERVER)
    serving = Serving(instances=1, batch_sizes=sizes, isolation="thread")
    with served(deployment, built, serving=serving) as url:
        os.sched_setaffinity(0, GENERATOR)
        target = Target(url=url, model="net")
        with open_load(target, payloads_of(target, samples)) as load:
            yield load


def run(load, arrivals, seconds, seed=0):
    return load.run(LoadPlan(arrivals=arrivals, duration_s=seconds, seed=seed))


def learnt(load):
    """Learn t(n) and what surrounds it from about ten seconds of load; gives it with the saturated rate."""
    alone = run(load, Closed(concurrency=1), 1.0)
    saturated = run(load, Closed(concurrency=32), 2.5)
    rate = len(times_of(saturated)) / 2.5
    usual = [run(load, Poisson(rate=float(f"{share * rate:.3g}")), 3.0, seed=k) for k, share in enumerate((0.5, 0.75))]
    costs = costs_of(usual, alone=alone, saturated=saturated)
    costs = fitted(costs, rate, load=Load(requests=3000), setup=setup)
    return costs, rate, float(np.median(times_of(alone)))


def setup(costs, sizes=SIZES):
    return Setup(costs=costs, instances=1, cores=2, sizes=sizes)


def measured(load, objective, bare_ns, first):
    def measure(rate, seconds, seed):
        seen = run(load, Poisson(rate=rate), seconds, seed)
        return Seen(times_ns=times_of(seen), late=why_invalid(seen, objective) is not None)

    return find_highest_rate(measure, objective, bare_ns=bare_ns, rules=replace(BUDGET, first=first))


def objectives(bare_ns, times=TIMES_BARE):
    return [Objective(q=0.99, limit_ns=round(k * bare_ns / 1e5) * 1e5) for k in times]


def rates(model, keep):
    """Predict and measure the highest rate of one model under three objectives; ``keep`` is told after each."""
    with tempfile.TemporaryDirectory() as folder:
        _, deployment, built, samples = bundle(Path(folder), model, SIZES)
        with load_on(deployment, built, samples, SIZES) as load:
            began = time.monotonic()
            costs, saturated, bare_ns = learnt(load)
            goals = objectives(bare_ns)
            predicted = [highest_rate(setup(costs), goal, Load()).rate for goal in goals]
            predicting_s = time.monotonic() - began
            rows = []
            for goal, rate in zip(goals, predicted, strict=True):
                found = measured(load, goal, bare_ns, 0.6 * saturated)
                rows.append({"objective": str(goal), "predicted": rate, "found": msgspec.to_builtins(found)})
                times = {str(size): costs.ns(size) for size in costs.sizes}
                about = {"model": model, "t_ns": times, "bare_ns": bare_ns, "predicting_s": predicting_s}
                keep({**about, "rows": rows})


def choice(part, keep):
    """Predict every batching of one model from sessions and one server, and measure some of them."""
    with tempfile.TemporaryDirectory() as folder:
        sizes = (1, 2, 4, 8, 16, 32)
        path, deployment, built, samples = bundle(Path(folder), CHOICE_OF, sizes)
        began = time.monotonic()
        os.sched_setaffinity(0, SERVER)
        row = {name: array[:1] for name, array in samples.inputs.items()}
        timed = measure_costs(path, row, threads=1, cores=1, sizes=sizes)
        with load_on(deployment, built, samples, SIZES) as load:
            seen, saturated, bare_ns = learnt(load)
        costs = in_server(timed, timed=timed, seen=seen)
        goal = objectives(bare_ns, (CHOICE_TIMES,))[0]
        ways = choices([(1, costs)], cores=1)
        predicted = {
            way.sizes[-1]: highest_rate(setup(costs, way.sizes), goal, Load(requests=8000)).rate for way in ways
        }
        predicting_s = time.monotonic() - began
        rows = []
        for largest in LARGEST[part]:
            begun = time.monotonic()
            allowed = tuple(size for size in sizes if size <= largest)
            with load_on(deployment, built, samples, allowed) as load:
                found = measured(load, goal, bare_ns, 0.5 * saturated)
            seconds = time.monotonic() - begun
            told = {"largest": largest, "predicted": predicted[largest], "seconds": seconds}
            rows.append({**told, "found": msgspec.to_builtins(found)})
            keep({"objective": str(goal), "predicted": predicted, "predicting_s": predicting_s, "rows": rows})


def conditions(since):
    return {
        "host": msgspec.to_builtins(this_host()),
        "load": msgspec.to_builtins(load_since(since)),
        "versions": dict(versions()),
        "cores": {"server": sorted(SERVER), "generator": sorted(GENERATOR)},
    }


def readme():
    """Write README's tables."""
    names = ("model", "a run of one row", "objective", "predicted/s", "measured/s", "confirmed", "error")
    lines, errors = [f"| {' | '.join(names)} |", "|---|---|---|---|---|---|---|"], []
    for model in MODELS:
        path = HERE / f"results-{model}.json"
        if not path.is_file():
            continue
        told = json.loads(path.read_text())["result"]
        for row in told["rows"]:
            rate = row["found"]["rate"]
            error = (row["predicted"] - rate) / rate if rate else None
            errors += [] if error is None else [abs(error)]
            shown = "no rate held" if error is None else f"{error:+.1%}"
            first = min(told["t_ns"], key=int)
            lines.append(
                f"| {model} | {told['t_ns'][first] / 1e6:.2f} ms | {row['objective']} | {row['predicted']:.0f} "
                f"| {rate:.0f} | {row['found']['confirmed']} of 3 | {shown} |"
            )
    if errors:
        lines += ["", f"Mean error {statistics.mean(errors):.1%}, worst {max(errors):.1%}, {len(errors)} objectives."]
    lines += choice_lines()
    text = (HERE / "README.md").read_text()
    head, rest = text.split(BEGIN)[0], text.split(END)[1]
    (HERE / "README.md").write_text(f"{head}{BEGIN}\n{chr(10).join(lines)}\n{END}{rest}")


def choice_lines():
    parts = [json.loads(p.read_text())["result"] for p in sorted(HERE.glob("results-choice-*.json"))]
    rows = [(part, row) for part in parts for row in part["rows"]]
    if not rows:
        return []
    lines = ["", "| batch sizes up to | predicted/s | measured/s | error |", "|---|---|---|---|"]
    for _, row in rows:
        rate = row["found"]["rate"]
        error = f"{(row['predicted'] - rate) / rate:+.1%}" if rate else "no rate held"
        lines.append(f"| {row['largest']} | {row['predicted']:.0f} | {rate:.0f} | {error} |")
    best = max(rows, key=lambda pair: pair[1]["found"]["rate"])[1]
    chosen = max(rows, key=lambda pair: pair[1]["predicted"])[1]
    took, guess = sum(row["seconds"] for _, row in rows), statistics.mean(part["predicting_s"] for part in parts)
    share = chosen["found"]["rate"] / best["found"]["rate"] - 1 if best["found"]["rate"] else 0.0
    goal, ways = parts[0]["objective"], len(rows)
    lines += [
        "",
        f"{goal}. Chosen: sizes up to {chosen['largest']}, {share:+.1%} of the measured best. Predicting all took "
        f"{guess:.0f} s, measuring {ways} of them {took:.0f} s ({took / guess:.1f} times as long).",
    ]
    return lines


def main(parts):
    for part in parts or [*MODELS, *LARGEST]:
        path = HERE / f"results-{part}.json"
        if not path.is_file():
            since = ticks()

            def keep(result, path=path, since=since):
                path.write_text(json.dumps({"result": result, "conditions": conditions(since)}, indent=1))

            (rates if part in MODELS else choice)(part, keep)
        print(part, "done", flush=True)
    readme()


if __name__ == "__main__":
    main(sys.argv[1:])
