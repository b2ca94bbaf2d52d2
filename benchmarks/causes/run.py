"""Causes of slow requests, planted on a real server: is the planted one named?

    python benchmarks/causes/run.py throttled large_batch_mate client_late cold_shape waited_for_instance

Each part is ten cases of six seconds, in two halves of under three minutes with --half 1 or 2; it writes
results-PART.json beside this file, and README's table from all of them. The server has core 0, the generator core 1.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np

from hasten.analyse.causes import explain
from hasten.analyse.host_samples import sampling
from hasten.deployment import Serving
from hasten.host import load_since, this_host, ticks, versions
from hasten.load.arrivals import read_arrivals
from hasten.load.cores import server_pid
from hasten.load.generate import open_load
from hasten.load.payloads import payloads_of
from hasten.load.target import LoadPlan, Target
from hasten.samples import Samples
from hasten.testing.deployments import deployed
from hasten.testing.models import convnet

HERE = Path(__file__).parent
BEGIN, END = "<!-- results -->", "<!-- end of results -->"
GENERATOR, SERVER = {1}, {0}
CASES, SECONDS = 10, 6.0
SIZE, WIDTH = 64, 16
LARGE_SIZE, LARGE_WIDTH = 96, 24
"""A run of 28 rows takes longer here than this machine stands still by itself now and then."""

SIZES = (1, 2, 4, 8, 16, 32)
STOP_S = 0.1


def bundle(folder, engine, size=SIZE, width=WIDTH):
    served = Serving(instances=1, batch_sizes=SIZES, isolation="thread")
    model = convnet(size=size, width=width)
    path = deployed(model, folder / "bundle", threads=1, engine=engine, serving=served)
    x = np.random.default_rng(0).standard_normal((64, 3, size, size)).astype(np.float32)
    return path, Samples({model.graph.input[0].name: x})


@contextlib.contextmanager
def serving(path):
    os.sched_setaffinity(0, SERVER)
    process = subprocess.Popen([sys.executable, str(HERE / "server.py"), str(path)], stdout=subprocess.PIPE, text=True)
    try:
        url = process.stdout.readline().strip()
        os.sched_setaffinity(0, GENERATOR)
        yield url, process.pid
    finally:
        process.send_signal(signal.SIGCONT)
        process.send_signal(signal.SIGTERM)
        process.wait(20)
        process.stdout.close()


@contextlib.contextmanager
def stopping(pid, seed):
    """Stop a process for 100 ms, eight times: as a cgroup's quota does, without its counters."""
    random, over = np.random.default_rng(seed), threading.Event()

    def work():
        for gap in random.uniform(0.3, 0.9, 8):
            if over.wait(gap):
                return
            os.kill(pid, signal.SIGSTOP)
            time.sleep(STOP_S)
            os.kill(pid, signal.SIGCONT)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def case(url, pid, samples, cause, seed):
    target = Target(url=url, model="net")
    arrivals = "burst:rate=150,size=80,every=700ms" if cause == "waited_for_instance" else "poisson:rate=250"
    with contextlib.ExitStack() as stack:
        load = stack.enter_context(open_load(target, payloads_of(target, samples)))
        sampled = stack.enter_context(sampling(server_pid(target)))
        if cause == "throttled":
            stack.enter_context(stopping(pid, seed))
        if cause == "client_late":
            stack.enter_context(stopping(load._children[0].pid, seed))
        plan = LoadPlan(arrivals=read_arrivals(arrivals), duration_s=SECONDS, seed=seed)
        run = load.run(plan)
        host = sampled.samples()
    found = explain(run, host=host)
    return {
        "seed": seed,
        "named": found.main,
        "causes": [[one.cause, one.requests, one.lost_share] for one in found.causes],
        "example": found.causes[0].examples[0].because,
        "answered": found.answered,
        "threshold_ns": found.threshold_ns,
    }


def mixed(url, samples, seed):
    """Requests of one row, and one in fifty of 28: both kinds by one plan, told apart by their payloads."""
    target = Target(url=url, model="net")
    one, many = payloads_of(target, samples), payloads_of(target, samples, batch=28, distinct=4)
    with (
        open_load(target, one) as small,
        open_load(target, many) as large,
        sampling(server_pid(target)) as sampled,
    ):
        runs = {}

        def go(name, load, rate):
            plan = LoadPlan(arrivals=read_arrivals(f"poisson:rate={rate}"), duration_s=SECONDS, seed=seed)
            runs[name] = load.run(plan)

        thread = threading.Thread(target=go, args=("large", large, 3))
        thread.start()
        go("small", small, 120)
        thread.join()
        host = sampled.samples()
    run = together(runs["small"], runs["large"])
    found = explain(run, host=host)
    causes = [[one.cause, one.requests, one.lost_share] for one in found.causes]
    return {
        "seed": seed,
        "named": found.main,
        "causes": causes,
        "example": found.causes[0].examples[0].because,
        "answered": found.answered,
        "threshold_ns": found.threshold_ns,
    }


def together(small, large):
    """Join two records of the same time into one."""
    shift = large.began_unix_ns - small.began_unix_ns
    columns = {}
    for field in vars(small.requests):
        a, b = getattr(small.requests, field), getattr(large.requests, field)
        moved = np.where(b >= 0, b + shift, b) if field in ("scheduled_ns", "sent_ns", "first_ns", "done_ns") else b
        columns[field] = np.concatenate([a, moved])
    order = np.argsort(columns["scheduled_ns"], kind="stable")
    requests = replace(small.requests, **{name: column[order] for name, column in columns.items()})
    return replace(small, requests=requests)


def part(cause, seeds):
    found = []
    with tempfile.TemporaryDirectory() as folder:
        measures = (LARGE_SIZE, LARGE_WIDTH) if cause == "large_batch_mate" else (SIZE, WIDTH)
        path, samples = bundle(Path(folder), "cold" if cause == "cold_shape" else "onnxruntime", *measures)
        fresh = cause == "cold_shape"
        with contextlib.ExitStack() as stack:
            place = None if fresh else stack.enter_context(serving(path))
            for seed in seeds:
                if fresh:
                    with serving(path) as (url, pid):
                        found.append(case(url, pid, samples, cause, seed))
                elif cause == "large_batch_mate":
                    found.append(mixed(place[0], samples, seed))
                else:
                    found.append(case(*place, samples, cause, seed))
    return found


def readme():
    lines = ["| planted | named in | what else was named |", "|---|---|---|"]
    for path in sorted(HERE.glob("results-*.json")):
        told = json.loads(path.read_text())
        cause, cases = told["cause"], told["cases"]
        right = sum(one["named"] == cause for one in cases)
        others = sorted({str(one["named"]) for one in cases if one["named"] != cause})
        lines.append(f"| {cause.replace('_', ' ')} | {right} of {len(cases)} | {', '.join(others) or '–'} |")
    text = (HERE / "README.md").read_text()
    head, rest = text.split(BEGIN)[0], text.split(END)[1]
    (HERE / "README.md").write_text(f"{head}{BEGIN}\n{chr(10).join(lines)}\n{END}{rest}")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("causes", nargs="+")
    parser.add_argument("--half", type=int, choices=(1, 2))
    options = parser.parse_args()
    for cause in options.causes:
        path = HERE / f"results-{cause}.json"
        told = json.loads(path.read_text()) if path.is_file() else {"cause": cause, "cases": [], "conditions": []}
        seeds = range(CASES) if options.half is None else range((options.half - 1) * 5, options.half * 5)
        left = [seed for seed in seeds if seed not in [one["seed"] for one in told["cases"]]]
        since = ticks()
        told["cases"] += part(cause, left)
        told["conditions"].append(
            {
                "host": msgspec.to_builtins(this_host()),
                "load": msgspec.to_builtins(load_since(since)),
                "versions": dict(versions()),
            }
        )
        path.write_text(json.dumps(told, indent=1))
        print(cause, [one["named"] for one in told["cases"]], flush=True)
    readme()


if __name__ == "__main__":
    main()
