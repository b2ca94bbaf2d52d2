"""The capacity model beside measurement: highest rates under three objectives for three models, and the best batching.

    python benchmarks/capacity/run.py small medium large choice-1 choice-2 choice-3 search

Each part takes a few minutes and writes results-PART.json beside this file; parts that are there are left alone
(delete the file to repeat one), and README's tables are written from all of them. The server has core 0 for itself,
the generator core 1.
"""

import contextlib
import json
import os
import random
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np

from hasten.analyse.batch_costs import costs_of
from hasten.analyse.capacity import Load, best_choices, choices, highest_rate
from hasten.analyse.costs_worker import measure_costs
from hasten.analyse.highest_rate import Rules, Seen, find_highest_rate
from hasten.analyse.live import fitted, undisturbed
from hasten.analyse.plan_serving import MEASURED, in_server
from hasten.analyse.served import served
from hasten.analyse.simulate import Setup
from hasten.deployment import Serving, read_deployment
from hasten.host import load_since, this_host, ticks, versions
from hasten.load.arrivals import Closed, Poisson
from hasten.load.figures import rate_of, times_of, why_invalid
from hasten.load.generate import open_load
from hasten.load.objective import Objective
from hasten.load.payloads import payloads_of
from hasten.load.target import LoadPlan, Target
from hasten.samples import Samples
from hasten.testing.deployments import deployed
from hasten.testing.models import convnet

HERE = Path(__file__).parent
BEGIN, END = "<!-- results -->", "<!-- end of results -->"
GENERATOR, SERVER = {1}, {0}
SIZES = (1, 2, 4, 8)
MODELS = {"small": (96, 24), "medium": (128, 24), "large": (128, 32)}
"""Image size and width of the convolution net."""

TIMES_BARE = (16, 32, 64)
"""The objectives' p99, in responses of the idle service: long beside what disturbs this machine's generator."""

BUDGET = Rules(budget_s=36.0, most_s=8.0, precision=0.05)
CHOICE_OF, CHOICE_TIMES = "small", 64
LARGEST = (1, 2, 4, 8, 16, 32)
CHOICES = ("choice-1", "choice-2", "choice-3")


def bundle(folder, model, sizes):
    size, width = MODELS[model]
    served = Serving(instances=1, batch_sizes=sizes, isolation="thread")
    path = deployed(convnet(size=size, width=width), folder / "bundle", threads=1, serving=served)
    deployment, built = read_deployment(path)
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


def learnt(load, goal, shares=(0.5, 0.75)):
    """Learn t(n) and what surrounds it from about ten seconds of load; gives it with the saturated rate."""
    alone = run(load, Closed(concurrency=1), 1.0)
    saturated = run(load, Closed(concurrency=32), 2.5)
    rate = rate_of(saturated).value
    rates = [float(f"{share * rate:.3g}") for share in shares]
    usual = [undisturbed(lambda seed, at=at: run(load, Poisson(rate=at), 3.0, seed), goal) for at in rates]
    costs = costs_of(usual, alone=alone, saturated=saturated)
    costs = fitted(costs, rate, load=Load(requests=3000), setup=setup)
    return costs, rate


def setup(costs, sizes=SIZES):
    return Setup(costs=costs, instances=1, cores=2, sizes=sizes)


def measured(load, objective, bare_ns, first, rules=BUDGET):
    def measure(rate, seconds, seed):
        seen = run(load, Poisson(rate=rate), seconds, seed)
        return Seen(times_ns=times_of(seen), late=why_invalid(seen, objective) is not None)

    return find_highest_rate(measure, objective, bare_ns=bare_ns, rules=replace(rules, first=first))


def objectives(bare_ns, times=TIMES_BARE):
    return [Objective(q=0.99, limit_ns=round(k * bare_ns / 1e5) * 1e5) for k in times]


def rates(model, keep):
    """Learn, predict and measure the highest rate of one model, an objective at a time; ``keep`` is told after each."""
    with tempfile.TemporaryDirectory() as folder:
        _, deployment, built, samples = bundle(Path(folder), model, SIZES)
        with load_on(deployment, built, samples, SIZES) as load:
            bare_ns = float(np.median(times_of(run(load, Closed(concurrency=1), 1.0))))
            rows = []
            for goal in objectives(bare_ns):
                began = time.monotonic()
                costs, saturated = learnt(load, goal)
                predicted = highest_rate(setup(costs), goal, Load()).rate
                predicting_s = time.monotonic() - began
                found = measured(load, goal, bare_ns, 0.6 * saturated)
                times = {str(size): costs.ns(size) for size in costs.sizes}
                about = {"predicting_s": predicting_s, "saturated": saturated, "t_ns": times}
                rows.append(
                    {"objective": str(goal), "predicted": predicted, "found": msgspec.to_builtins(found), **about}
                )
                keep({"model": model, "bare_ns": bare_ns, "rows": rows})


def choice(part, keep):
    """One round: predict every batching of one model from sessions and one server, then measure each, in this order.

    What this machine gives drifts by more within minutes than the ways differ: rounds in other orders make it fair.
    """
    with tempfile.TemporaryDirectory() as folder:
        path, deployment, built, samples = bundle(Path(folder), CHOICE_OF, LARGEST)
        began = time.monotonic()
        os.sched_setaffinity(0, SERVER)
        row = {name: array[:1] for name, array in samples.inputs.items()}
        timed = measure_costs(path, row, threads=1, cores=1, sizes=LARGEST)
        with load_on(deployment, built, samples, SIZES) as load:
            bare_ns = float(np.median(times_of(run(load, Closed(concurrency=1), 1.0))))
            goal = objectives(bare_ns, (CHOICE_TIMES,))[0]
            seen, saturated = learnt(load, goal, shares=(0.6,))
        costs = in_server(timed, timed=timed, seen=seen)
        ranked = best_choices(choices([(1, costs)], cores=1), goal, Load(requests=8000), keep=1)
        predicted = {way.setup.sizes[-1]: way.highest.rate for way in ranked}
        predicting_s = time.monotonic() - began
        for largest in LARGEST:  # those that were left out cannot be the best
            predicted.setdefault(largest, costs.best_rate(1, [size for size in LARGEST if size <= largest]))
        rows = []
        for largest in random.Random(part).sample(LARGEST, len(LARGEST)):
            begun = time.monotonic()
            allowed = tuple(size for size in LARGEST if size <= largest)
            with load_on(deployment, built, samples, allowed) as load:
                found = measured(load, goal, bare_ns, 0.7 * saturated)
            seconds = time.monotonic() - begun
            told = {"largest": largest, "predicted": predicted[largest], "seconds": seconds}
            rows.append({**told, "found": msgspec.to_builtins(found)})
            top = [way.setup.sizes[-1] for way in ranked[:MEASURED]]
            keep({"objective": str(goal), "top": top, "predicting_s": predicting_s, "rows": rows})


def full_search(keep):
    """Search one way to batch by the rules that ``hasten analyse`` has, for what that takes."""
    with tempfile.TemporaryDirectory() as folder:
        _, deployment, built, samples = bundle(Path(folder), CHOICE_OF, SIZES)
        with load_on(deployment, built, samples, SIZES) as load:
            bare_ns = float(np.median(times_of(run(load, Closed(concurrency=1), 1.0))))
            goal = objectives(bare_ns, (CHOICE_TIMES,))[0]
            found = measured(load, goal, bare_ns, None, Rules())
            keep({"objective": str(goal), "found": msgspec.to_builtins(found)})


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
            first = min(row["t_ns"], key=int)
            lines.append(
                f"| {model} | {row['t_ns'][first] / 1e6:.2f} ms | {row['objective']} | {row['predicted']:.0f} "
                f"| {rate:.0f} | {row['found']['confirmed']} of 3 | {shown} |"
            )
    if errors:
        lines += ["", f"Mean error {statistics.mean(errors):.1%}, worst {max(errors):.1%}, {len(errors)} objectives."]
    lines += choice_lines()
    text = (HERE / "README.md").read_text()
    head, rest = text.split(BEGIN)[0], text.split(END)[1]
    (HERE / "README.md").write_text(f"{head}{BEGIN}\n{chr(10).join(lines)}\n{END}{rest}")


def choice_lines():
    """Write the ways to batch, each with its rates by round, and what choosing by prediction was worth."""
    rounds = [json.loads(p.read_text())["result"] for p in sorted(HERE.glob("results-choice-*.json"))]
    if not rounds:
        return []
    found = {size: [row for told in rounds for row in told["rows"] if row["largest"] == size] for size in LARGEST}
    means = {size: statistics.mean(row["found"]["rate"] for row in rows) for size, rows in found.items()}
    lines = ["", "| batch sizes up to | predicted/s | measured/s | its rounds | error |", "|---|---|---|---|---|"]
    for size, rows in found.items():
        guess = statistics.mean(row["predicted"] for row in rows)
        each = ", ".join(f"{row['found']['rate']:.0f}" for row in rows)
        lines.append(f"| {size} | {guess:.0f} | {means[size]:.0f} | {each} | {guess / means[size] - 1:+.1%} |")
    lines += ["", f"The smallest model, {' and '.join(sorted({told['objective'] for told in rounds}))}. Chosen:", ""]
    best = max(means.values())
    for told in rounds:
        took, guess = sum(row["seconds"] for row in told["rows"]), told["predicting_s"]
        top = [row for row in told["rows"] if row["largest"] in told["top"]]
        chosen = max(top, key=lambda row: row["found"]["rate"])["largest"]
        lines.append(
            f"* of {', '.join(map(str, told['top']))} (the best predictions, measured) sizes up to {chosen}, whose "
            f"mean is {means[chosen] / best - 1:+.1%} of the best mean; predicting all took {guess:.0f} s, measuring "
            f"all {took:.0f} s ({took / guess:.1f} times as long)."
        )
    path = HERE / "results-search.json"
    if path.is_file():
        seconds = json.loads(path.read_text())["result"]["found"]["seconds"]
        guess = statistics.mean(told["predicting_s"] for told in rounds)
        lines += [
            "",
            f"These searches were cut to {BUDGET.budget_s:.0f} s of load each. By the rules of `hasten analyse` one "
            f"takes {seconds:.0f} s, six of them {6 * seconds:.0f} s: {6 * seconds / guess:.0f} times the prediction.",
        ]
    return lines


def main(parts):
    for part in parts or [*MODELS, *CHOICES, "search"]:
        path = HERE / f"results-{part}.json"
        if not path.is_file():
            since = ticks()

            def keep(result, path=path, since=since):
                path.write_text(json.dumps({"result": result, "conditions": conditions(since)}, indent=1))

            if part == "search":
                full_search(keep)
            else:
                (rates if part in MODELS else choice)(part, keep)
        print(part, "done", flush=True)
    readme()


if __name__ == "__main__":
    main(sys.argv[1:])
