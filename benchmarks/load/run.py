"""The generator against what is known: planted stalls, h2load, MLPerf's LoadGen, and its own highest rate.

    python benchmarks/load/run.py [stall] [h2load] [loadgen] [service] [rate]

Writes results-PART.json beside this file, and README's tables from all of them.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import msgspec
import numpy as np

from hasten.deployment import Serving, read_deployment
from hasten.engines.onnxruntime import OnnxRuntime
from hasten.host import load_since, this_host, ticks, versions
from hasten.load.accuracy import measure_accuracy
from hasten.load.arrivals import read_arrivals
from hasten.load.figures import figures_of, times_of
from hasten.load.generate import open_load
from hasten.load.payloads import payloads_of, payloads_of_files
from hasten.load.target import LoadPlan, Target
from hasten.measure.percentiles import percentile
from hasten.measure.statistics import quantile
from hasten.samples import Samples
from hasten.testing.deployments import deployed
from hasten.testing.models import convnet

HERE = Path(__file__).parent
BEGIN, END = "<!-- results -->", "<!-- end of results -->"
SERVER_CORE, OUR_CORE = 0, 1
BODY = bytes(256)


@contextlib.contextmanager
def server(kind, *options):
    """Run a server of servers.py in a process of its own; gives its URL, and at the end a list of what it says."""
    words = [sys.executable, str(HERE / "servers.py"), kind, "--core", str(SERVER_CORE), *options]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    told = []
    try:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}", told
        said, _ = process.communicate("", timeout=20)
        told.append(json.loads(said))
    finally:
        process.kill()


@contextlib.contextmanager
def generator(url):
    target = Target(url=url, protocol="http")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "body").write_bytes(BODY)
        payloads = payloads_of_files(target, [Path(folder) / "body"])
    with open_load(target, payloads) as load:
        yield load


def plan(line, duration_s, seed=0):
    return LoadPlan(arrivals=read_arrivals(line), duration_s=duration_s, seed=seed, timeout_s=10.0)


def stall():
    """Our p99 and a closed loop's beside the true one, which the server's own log of its stalls gives."""
    rows = []
    for seed in range(3):
        with server("stall", "--stall-ms", "200", "--every-s", "2") as (url, told), generator(url) as load:
            load.run(plan("constant:rate=100", 1.0))
            run = load.run(plan("poisson:rate=500", 20.0, seed))
            closed = load.run(plan("closed:concurrency=1", 10.0))
            began_ns = int(load_began(run))
        arrivals = run.requests.scheduled_ns
        waits = np.zeros(len(arrivals))
        for start, end in told[0]["stalls_ns"]:
            inside = (arrivals + began_ns >= start) & (arrivals + began_ns < end)
            waits[inside] = end - began_ns - arrivals[inside]
        figures = figures_of(run)
        rows.append(
            {
                "seed": seed,
                "true_p99_ms": quantile(waits, 0.99) / 1e6,
                "formula_p99_ms": 200 - 0.01 * 2000,
                "open_p99_ms": quantile(times_of(run), 0.99) / 1e6,
                "closed_p99_ms": quantile(times_of(closed), 0.99) / 1e6,
                "requests": len(arrivals),
                "ok": figures.ok,
                "closed_requests": len(closed.requests.outcome),
                "issue_delay_p99_ms": figures.issue_delay_p99_ns / 1e6,
            }
        )
    return rows


def load_began(run):
    """Give when a run began, on the clock that the server's log has: both are the machine's monotonic one."""
    import time

    return time.perf_counter_ns() - (time.time_ns() - run.began_unix_ns)


def h2load():
    """Medians at an equal rate, in turns: of a server that answers at once, and of one that takes the same 2 ms."""
    return [*beside_h2load("null", 500, 3.0, 4), *beside_h2load("queue", 100, 4.0, 4)]


def beside_h2load(kind, rate, seconds, turns):
    rows = []
    for turn in range(turns):
        found = {}
        for who in ("ours", "h2load") if turn % 2 == 0 else ("h2load", "ours"):
            with server(kind) as (url, _):  # a fresh one for each: a queue takes the same times again
                found[who] = ours_at(url, rate, seconds) if who == "ours" else h2load_at(url, rate, seconds)
        medians = {f"{who}_median_us": quantile(times, 0.5) / 1e3 for who, times in found.items()}
        rows.append({"server": kind, "rate": rate, "turn": turn, **medians, "requests": len(found["ours"])})
    return rows


def ours_at(url, rate, seconds):
    with generator(url) as load:
        run = load.run(plan(f"constant:rate={rate}", seconds)).requests
    return (run.done_ns - run.sent_ns)[run.outcome == 0]


def h2load_at(url, rate, seconds):
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "body").write_bytes(BODY)
        log = Path(folder) / "log"
        words = ["taskset", "-c", str(OUR_CORE), "h2load", "--h1", "-c", "1", "-t", "1", "--rps", str(rate)]
        words += ["-n", str(int(rate * seconds)), "-d", f"{folder}/body", f"--log-file={log}", url]
        subprocess.run(words, check=True, capture_output=True)
        return np.array([int(line.split("\t")[2]) for line in log.read_text().splitlines()]) * 1e3


def loadgen():
    """p99 by our open loop and by MLPerf's LoadGen, server scenario, at 250/s on a queue with one worker."""
    rows = []
    for turn in range(3):
        for who in ("ours", "loadgen") if turn % 2 == 0 else ("loadgen", "ours"):
            with server("queue", "--mean-ms", "2") as (url, _):
                if who == "ours":
                    with generator(url) as load:
                        times = times_of(load.run(plan("poisson:rate=250", 15.0, 100 + turn)))
                else:
                    words = [sys.executable, str(HERE / "mlperf.py"), url, "--qps", "250", "--seconds", "15"]
                    words += ["--seed", str(200 + turn), "--core", str(OUR_CORE)]
                    done = subprocess.run(words, check=True, capture_output=True, text=True)
                    times = np.array(json.loads(done.stdout.splitlines()[-1])["latencies_ns"], float)
            found = percentile(times, 0.99)
            told = msgspec.to_builtins(found)
            rows.append({"turn": turn, "who": who, "p50_ms": quantile(times, 0.5) / 1e6, "p99": told})
    return rows


def service():
    """Single stream by us and by MLPerf's LoadGen, in turns, on a service and on its bare session; and its accuracy."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        bundle, samples = network(Path(folder))
        data = Path(folder) / "data.npz"
        np.savez(data, labels=samples.labels, **samples.inputs)
        with served_by_us(bundle) as url:
            targets = {
                "service": (Target(url=url, model="net"), ["--url", url]),
                "session": (Target(url=str(bundle), protocol="session", model="net"), ["--session", str(bundle)]),
            }
            for kind, (target, words) in targets.items():
                for turn in range(3):
                    for who in ("ours", "loadgen") if turn % 2 == 0 else ("loadgen", "ours"):
                        times = alone(target, samples) if who == "ours" else mlperf_on(words, data)["latencies_ns"]
                        told = msgspec.to_builtins(percentile(np.array(times, float), 0.9))
                        p50 = quantile(np.array(times, float), 0.5) / 1e6
                        rows.append({"kind": kind, "turn": turn, "who": who, "p50_ms": p50, "p90": told})
                answers = np.array(mlperf_on([*words, "--accuracy"], data)["answers"])
                accuracy = {"ours": measure_accuracy(target, samples).value.value}
                accuracy["loadgen"] = float((answers == samples.labels).mean())
                rows.append({"kind": kind, "who": "both", "samples": len(answers), "accuracy": accuracy})
    return rows


def network(folder):
    """Write a deployment of a convolution net; gives it with samples that it labels itself, but for one in seven."""
    model = convnet(size=64, width=16)
    path = deployed(model, folder / "bundle", threads=1, serving=Serving(instances=1, batch_sizes=(1,)))
    _, built = read_deployment(path)
    name = built.signature.inputs[0].name
    x = np.random.default_rng(0).standard_normal((500, 3, 64, 64)).astype(np.float32)
    with contextlib.closing(OnnxRuntime(threads=1).open(built)) as session:
        scores = np.concatenate([next(iter(session.run({name: x[i : i + 1]}).values())) for i in range(len(x))])
    labels = scores.argmax(1)
    labels[::7] = (labels[::7] + 1) % scores.shape[1]
    return path, Samples({name: x}, labels)


@contextlib.contextmanager
def served_by_us(bundle):
    words = ["taskset", "-c", str(SERVER_CORE), sys.executable, "-m", "hasten", "serve", str(bundle), "--json"]
    process = subprocess.Popen([*words, "--port", "0", "--grpc-port", "0"], stdout=subprocess.PIPE, text=True)
    try:
        yield json.loads(process.stdout.readline())["http"]
    finally:
        process.terminate()
        process.communicate(timeout=60)


def alone(target, samples):
    with open_load(target, payloads_of(target, samples)) as load:
        load.run(plan("closed:concurrency=1", 1.0))
        return times_of(load.run(plan("closed:concurrency=1", 8.0)))


def mlperf_on(words, data):
    command = [sys.executable, str(HERE / "mlperf_model.py"), *words, "--data", str(data), "--seconds", "8"]
    done = subprocess.run([*command, "--core", str(OUR_CORE)], check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def rate():
    """The highest rate against the null target with an issue delay under 1 ms at p99, on one core."""
    rows = []
    with server("null") as (url, _), generator(url) as load:
        load.run(plan("poisson:rate=500", 1.0))
        for wanted in (1000, 5000, 7500, 10_000, 12_500, 15_000, 20_000):
            run = load.run(plan(f"poisson:rate={wanted}", 5.0))
            found = figures_of(run)
            delay = run.requests.sent_ns - run.requests.scheduled_ns
            rows.append(
                {
                    "rate": wanted,
                    "ok": found.ok,
                    "planned": found.planned,
                    "answered_rate": found.ok_rate,
                    "issue_delay_p50_us": quantile(delay, 0.5) / 1e3,
                    "issue_delay_p99_us": quantile(delay, 0.99) / 1e3,
                    "response_p50_us": quantile(times_of(run), 0.5) / 1e3,
                    "response_p99_us": quantile(times_of(run), 0.99) / 1e3,
                }
            )
            if found.issue_delay_p99_ns > 5e6:
                break
    return rows


PARTS = {"stall": stall, "h2load": h2load, "loadgen": loadgen, "service": service, "rate": rate}


def record(part):
    since = ticks()
    rows = PARTS[part]()
    conditions = {"host": msgspec.to_builtins(this_host()), "versions": versions()}
    conditions["load"] = msgspec.to_builtins(load_since(since))
    conditions["cores"] = {"server": SERVER_CORE, "generator": OUR_CORE}
    document = {"rows": rows, "conditions": conditions}
    (HERE / f"results-{part}.json").write_bytes(msgspec.json.format(msgspec.json.encode(document)))


def read(part):
    path = HERE / f"results-{part}.json"
    return json.loads(path.read_text())["rows"] if path.exists() else []


def service_table(rows):
    lines = ["MLPerf's single stream by us and by its LoadGen, on our server and on its bare session (1 row):", ""]
    lines += ["| of | turn | by | p50 | p90 | interval |", "|---|---|---|---|---|---|"]
    for row in rows:
        if "p90" in row:
            low, value, high = (row["p90"][name] / 1e6 for name in ("low_ns", "value_ns", "high_ns"))
            lines.append(
                f"| {row['kind']} | {row['turn']} | {row['who']} | {row['p50_ms']:.3f} ms | {value:.3f} ms "
                f"| {low:.3f} to {high:.3f} ms |"
            )
    lines.append("")
    for row in (row for row in rows if "accuracy" in row):
        both = row["accuracy"]
        lines.append(
            f"Accuracy mode on the {row['kind']}, {row['samples']} samples: {both['ours']:.4f} by us, "
            f"{both['loadgen']:.4f} by LoadGen."
        )
    lines.append("")
    return lines


def tables():
    lines = []
    if rows := read("stall"):
        lines += ["A server that stalls for 200 ms every 2 s, 500 requests/s:", ""]
        lines += ["| seed | true p99 | open loop | off by | closed loop | off by |", "|---|---|---|---|---|---|"]
        for row in rows:
            true, ours, closed = row["true_p99_ms"], row["open_p99_ms"], row["closed_p99_ms"]
            lines.append(
                f"| {row['seed']} | {true:.1f} ms | {ours:.1f} ms | {ours / true - 1:+.1%} | {closed:.3f} ms "
                f"| {true / closed:.0f} times |"
            )
        lines.append("")
    for kind, told in (("null", "answers at once"), ("queue", "takes the same 2 ms (mean) in both")):
        rows = [row for row in read("h2load") if row["server"] == kind]
        if not rows:
            continue
        ratios = [row["ours_median_us"] / row["h2load_median_us"] for row in rows]
        lines += [
            f"Medians from sending to the end beside `h2load --rps {rows[0]['rate']}`, of a server that {told}: ratio "
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}).",
            "",
            "| turn | ours | h2load |",
            "|---|---|---|",
            *(f"| {row['turn']} | {row['ours_median_us']:.0f} µs | {row['h2load_median_us']:.0f} µs |" for row in rows),
            "",
        ]
    if rows := read("loadgen"):
        lines += ["p99 on a queue with one worker, 250 requests/s, with 95 % intervals:", ""]
        lines += ["| turn | by | p50 | p99 | interval |", "|---|---|---|---|---|"]
        for row in rows:
            p99 = row["p99"]
            high = "" if p99["high_ns"] is None else f"{p99['high_ns'] / 1e6:.2f} ms"
            lines.append(
                f"| {row['turn']} | {row['who']} | {row['p50_ms']:.2f} ms | {p99['value_ns'] / 1e6:.2f} ms "
                f"| {p99['low_ns'] / 1e6:.2f} to {high} |"
            )
        lines.append("")
    if rows := read("service"):
        lines += service_table(rows)
    if rows := read("rate"):
        lines += ["The generator on one core against a server that answers at once on the other:", ""]
        lines += ["| requests/s | answered | issue delay p50 | p99 | response p50 | p99 |", "|---|---|---|---|---|---|"]
        for row in rows:
            cells = [f"{row[name]:.0f} µs" for name in row if name.endswith("_us")]
            lines.append(f"| {row['rate']} | {row['ok']} of {row['planned']} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="*", default=list(PARTS))
    for name in parser.parse_args().parts:
        record(name)
    page = HERE / "README.md"
    text = page.read_text()
    head, tail = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    page.write_text(f"{head}\n{tables()}\n{tail}")
