"""What the service adds to a bare session call, one small binary request at a time, at moderate rates.

    python benchmarks/serving/overhead.py [--rates 300 1000 2000] [--rounds 6] [--python envs/compiled/bin/python]

In turns: hasten with the tiny MLP, and a server that answers at once and does nothing (benchmarks/load/servers.py):
what the machine's network and the generator take by themselves. The server has the last core, the generator the first.
Writes results/overhead.json, or --out.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgspec
import numpy as np
from bundles import SHAPES, write_bundle

from hasten.analyse.phases import join_phases
from hasten.deployment import Serving, read_deployment
from hasten.engines.onnxruntime import OnnxRuntime
from hasten.host import load_since, this_host, ticks, versions
from hasten.load.arrivals import Poisson
from hasten.load.figures import times_of
from hasten.load.generate import open_load
from hasten.load.payloads import payloads_of, payloads_of_files
from hasten.load.target import LoadPlan, Target
from hasten.measure.statistics import quantile
from hasten.samples import Samples

HERE = Path(__file__).parent
SERVERS = HERE.parent / "load" / "servers.py"


@contextlib.contextmanager
def started(words: list[str], *, own: bool = True):
    """Start a server; one of another environment takes nothing of this one's path."""
    env = {key: value for key, value in os.environ.items() if own or key != "PYTHONPATH"}
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
    try:
        yield process.stdout.readline().strip()
    finally:
        process.terminate()
        process.communicate(timeout=30)


def session_us(bundle: Path, feed: dict[str, np.ndarray], rate: float) -> float:
    """Give the median of a bare call, at the rate that requests come with: the caches are as cold as there."""
    _, built = read_deployment(bundle)
    times = []
    with contextlib.closing(OnnxRuntime(threads=1).open(built)) as session:
        for _ in range(300):
            time.sleep(1 / rate)
            began = time.perf_counter_ns()
            session.run(feed)
            times.append(time.perf_counter_ns() - began)
    return float(np.median(times)) / 1e3


def measured(load, rate: float, seconds: float, seed: int):
    load.run(LoadPlan(arrivals=Poisson(rate=rate), duration_s=1.0, seed=seed))
    return load.run(LoadPlan(arrivals=Poisson(rate=rate), duration_s=seconds, seed=seed + 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=float, nargs="+", default=[300, 1000, 2000], help="requests a second")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--python", default=sys.executable, help="whose hasten serves: that of another environment")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "overhead.json")
    asked = parser.parse_args()
    core = (os.cpu_count() or 2) - 1
    since = ticks()
    rounds: dict[float, list[dict[str, float]]] = {rate: [] for rate in asked.rates}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        bundle = write_bundle(folder, "mlp", Serving(instances=1))
        x = np.random.default_rng(0).standard_normal((64, *SHAPES["mlp"][1:])).astype(np.float32)
        (folder / "body").write_bytes(bytes(256))
        serve = [asked.python, "-m", "hasten", "serve", str(bundle), "--port", "0", "--grpc-port", "0", "--json"]
        null = [sys.executable, str(SERVERS), "null", "--core", str(core)]
        own = asked.python == sys.executable
        with started(["taskset", "-c", str(core), *serve], own=own) as told, started(null) as port:
            os.sched_setaffinity(0, {0})
            ours = Target(url=json.loads(told)["http"], model="mlp")
            bare = Target(url=f"http://127.0.0.1:{port}", protocol="http")
            with (
                open_load(ours, payloads_of(ours, Samples({"x": x}))) as first,
                open_load(bare, payloads_of_files(bare, [folder / "body"])) as second,
            ):
                for turn, rate in itertools.product(range(asked.rounds), asked.rates):
                    run = measured(first, rate, asked.seconds, 10 * turn)
                    nothing = measured(second, rate, asked.seconds, 10 * turn)
                    joined = join_phases(run)
                    inside = joined.response_ns - joined.part("transfer") - joined.part("transfer_back")
                    rounds[rate].append(
                        {
                            "response_p50_us": quantile(times_of(run), 0.5) / 1e3,
                            "null_p50_us": quantile(times_of(nothing), 0.5) / 1e3,
                            "inside_p50_us": quantile(inside - joined.part("issue_delay"), 0.5) / 1e3,
                            "infer_p50_us": quantile(joined.part("infer"), 0.5) / 1e3,
                            "session_us": session_us(bundle, {"x": x[:1]}, rate),
                        }
                    )
                    print(rate, rounds[rate][-1], flush=True)
    medians = {
        rate: {key: statistics.median(one[key] for one in found) for key in found[0]} for rate, found in rounds.items()
    }
    document = {
        "rates": [{"rate": rate, "medians": medians[rate], "rounds": rounds[rate]} for rate in asked.rates],
        "load": msgspec.to_builtins(load_since(since)),
    }
    document |= {"host": msgspec.to_builtins(this_host()), "versions": versions()}
    asked.out.parent.mkdir(exist_ok=True)
    asked.out.write_text(json.dumps(document, indent=1) + "\n")
    for rate, found in medians.items():
        over = found["response_p50_us"] - found["session_us"]
        print(f"{rate:g}/s: p50 {found['response_p50_us']:.0f} us, a bare call {found['session_us']:.0f} us;", end=" ")
        print(f"a server that does nothing {found['null_p50_us']:.0f} us; over both", end=" ")
        print(f"{over - found['null_p50_us']:.0f} us; inside the server {found['inside_p50_us']:.0f} us")


if __name__ == "__main__":
    main()
