"""Servers beside each other, a (model, protocol) at a time: throughput, latency at one rate, goodput when overloaded.

    python benchmarks/serving/run.py --model mlp --protocol binary [--envs ENVS] [--stacks NAME ...] [--out FOLDER]

Servers have the last core, the generator the first. A piece is a file of --out; one that is there is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bundles import SHAPES, bodies, request_of, write_bundle
from stacks import BOUND, PROTOCOLS, STACKS, NotStarted, Place, Server

from hasten.deployment import Serving
from hasten.host import load_since, this_host, ticks, versions

CONNECTIONS = 16
MODEL = "the model alone"
SIZES = (1, 2, 4, 8)
"""Rows of one run, as the server's deployment has them."""
INPUTS = {"mlp": "x", "resnet20": "input"}
OBJECTIVE_MS = 50.0
"""An answer later than this is of no use; hasten's deployment says so, the others cannot be told."""
OVERLOAD = 1.5
RATES = {"mlp": 300, "resnet20": 60}
"""Requests a second at which latencies are compared: what every stack can do."""


def closed(place: Place, server: Server, protocol: str, seconds: float) -> dict[str, Any]:
    """Give requests a second and processor time a request of a closed loop: wrk, or h2load for gRPC."""
    before_s = server.cpu_s()
    url = f"http://127.0.0.1:{server.ports[protocol]}{path_of(place.model, protocol)}"
    if protocol == "grpc":
        words = [
            "h2load",
            "-t1",
            f"-c{CONNECTIONS}",
            "-m1",
            f"-D{seconds * 1000:.0f}ms",
            "-d",
            str(place.folder / "grpc.bin"),
        ]
        said = _text([*words, "-H", "content-type: application/grpc", "-H", "te: trailers", url])
        rate = float(re.search(r"([\d.]+) req/s", said)[1])  # type: ignore[index]
        failed = int(re.search(r"(\d+) failed", said)[1])  # type: ignore[index]
    else:
        said = _text(
            ["wrk", "-t1", f"-c{CONNECTIONS}", f"-d{seconds:g}s", "-s", str(place.folder / f"{protocol}.lua"), url]
        )
        rate = float(re.search(r"Requests/sec:\s+([\d.]+)", said)[1])  # type: ignore[index]
        failed = int(found[1]) if (found := re.search(r"Non-2xx or 3xx responses: (\d+)", said)) else 0
    spent_s = server.cpu_s() - before_s
    return {
        "requests_per_s": round(rate, 1),
        "failed": failed,
        "server_cpu_us": round(spent_s / max(rate * seconds, 1) * 1e6, 1),
    }


def opened(place: Place, server: Server, protocol: str, *, rate: float, seconds: float) -> dict[str, Any]:
    """Give what ``hasten load`` finds of an open loop: Poisson arrivals, latency from the scheduled time."""
    port = server.ports[protocol]
    words = [
        "--arrivals",
        f"poisson:rate={rate:g}",
        "--duration",
        f"{seconds:g}s",
        "--slo",
        f"p99 <= {OBJECTIVE_MS:g}ms",
    ]
    words += ["--timeout", "2s", "--json", "--home", str(place.folder / "home")]
    if protocol == "grpc":
        words = [f"grpc://127.0.0.1:{port}", place.model, "--data", str(place.folder / "x.npz"), *words]
    else:
        url = f"http://127.0.0.1:{port}{path_of(place.model, protocol)}"
        headers = json.loads((place.folder / f"{protocol}.headers.json").read_text())
        words = [url, "--protocol", "http", "--data", str(place.folder / f"{protocol}.body"), *words]
        words += [f"--header={name}: {value}" for name, value in headers.items()]
    env = {**os.environ, "PYTHONPATH": os.environ.get("GENERATOR_PYTHONPATH", os.environ.get("PYTHONPATH", ""))}
    done = subprocess.run(
        ["taskset", "-c", "0", sys.executable, "-m", "hasten", "load", *words],
        capture_output=True,
        text=True,
        check=False,
        env=env,
    )
    if done.returncode not in (0, 3, 4):
        raise SystemExit(done.stderr)
    figures: dict[str, Any] = json.loads(done.stdout)["figures"]
    return {"rate": rate, "seconds": seconds, **figures}


def _text(words: list[str]) -> str:
    done = subprocess.run(["taskset", "-c", "0", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}\n{done.stdout}{done.stderr}")
    return done.stdout


def path_of(model: str, protocol: str) -> str:
    return "/inference.GRPCInferenceService/ModelInfer" if protocol == "grpc" else f"/v2/models/{model}/infer"


def write_bodies(folder: Path, model: str) -> None:
    """Write what the generators send."""
    import numpy as np

    for protocol, (body, headers) in bodies(request_of(model, INPUTS[model])).items():
        (folder / ("grpc.bin" if protocol == "grpc" else f"{protocol}.body")).write_bytes(body)
        (folder / f"{protocol}.headers.json").write_text(json.dumps(headers))
        lines = [f'local file = io.open("{folder / protocol}.body", "rb")', 'wrk.method = "POST"']
        lines += ['wrk.body = file:read("*a")'] + [f'wrk.headers["{k}"] = "{v}"' for k, v in headers.items()]
        (folder / f"{protocol}.lua").write_text("\n".join(lines) + "\n")
    x = np.random.default_rng(0).standard_normal((64, *SHAPES[model][1:])).astype(np.float32)
    np.savez(folder / "x.npz", **{INPUTS[model]: x})


ALONE = (
    "import sys, time; import numpy as np; from pathlib import Path\n"
    "from hasten.deployment import read_deployment; from hasten.engines.onnxruntime import OnnxRuntime\n"
    "_, built = read_deployment(Path(sys.argv[1])); session = OnnxRuntime().open(built)\n"
    "spec = built.signature.inputs[0]\n"
    "for n in map(int, sys.argv[3:]):\n"
    "    x = np.random.default_rng(0).standard_normal((n, *spec.shape[1:])).astype(np.float32)\n"
    "    feed = {spec.name: x}; [session.run(feed) for _ in range(20)]\n"
    "    runs, begun = 0, time.perf_counter()\n"
    "    while time.perf_counter() < begun + float(sys.argv[2]): session.run(feed); runs += 1\n"
    "    print(n, n * runs / (time.perf_counter() - begun))"
)


def alone(place: Place, sizes: tuple[int, ...], seconds: float) -> dict[int, float]:
    """Give the rows a second of the model alone on the servers' core, by batch size: no server at all."""
    words = ["taskset", "-c", str(place.core), sys.executable, "-c", ALONE, str(place.bundle), str(seconds)]
    done = subprocess.run([*words, *map(str, sizes)], capture_output=True, text=True, check=True)
    return {int(size): float(rate) for size, rate in map(str.split, done.stdout.splitlines())}


def piece(place: Place, protocol: str, names: list[str], asked: argparse.Namespace) -> dict[str, Any]:
    """Run one (model, protocol) with all its stacks, closed loops interleaved."""
    servers: dict[str, Server] = {}
    found: dict[str, dict[str, Any]] = {}
    ceilings: list[float] = []
    sizes = alone(place, SIZES, 0.7)
    best_size = max(sizes, key=sizes.__getitem__)
    try:
        for name in names:
            try:
                servers[name] = STACKS[name](place)
            except (FileNotFoundError, NotStarted) as error:
                found[name] = {"not_run": str(error)}
        for server in servers.values():
            closed(place, server, protocol, 1.0)
        rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in servers}
        order = random.Random(0)
        for _ in range(asked.rounds):
            for name in order.sample([*servers, MODEL], len(servers) + 1):
                if name == MODEL:
                    ceilings.append(alone(place, (best_size,), asked.seconds)[best_size])
                else:
                    rounds[name].append(closed(place, servers[name], protocol, asked.seconds))
        for name, server in servers.items():
            best = statistics.median(one["requests_per_s"] for one in rounds[name])
            found[name] = {"closed": rounds[name]}
            found[name]["equal_rate"] = opened(
                place, server, protocol, rate=RATES[place.model], seconds=asked.open_seconds
            )
            # From one core the generator cannot overload servers of tiny models; what bounds servers refuses nothing.
            if place.model != "mlp" and name != BOUND:
                around = [alone(place, (best_size,), 1.0)[best_size]]
                found[name]["overload"] = opened(
                    place, server, protocol, rate=OVERLOAD * best, seconds=asked.open_seconds
                )
                around.append(alone(place, (best_size,), 1.0)[best_size])
                found[name]["bound_rows_per_s"] = around
    finally:
        for server in servers.values():
            server.stop()
    return {"best_size": best_size, "ceilings_rows_per_s": ceilings, "stacks": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=list(SHAPES), required=True)
    parser.add_argument("--protocol", choices=("json", "binary", "grpc"), required=True)
    parser.add_argument("--stacks", nargs="*", default=list(STACKS))
    parser.add_argument("--envs", type=Path, default=Path("envs"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--open-seconds", type=float, default=10.0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    asked = parser.parse_args()
    kept = asked.out / f"{asked.model}-{asked.protocol}.json"
    if kept.exists():
        show(json.loads(kept.read_text()))
        return
    names = [name for name in asked.stacks if asked.protocol in PROTOCOLS[name]]
    before, began_s = ticks(), time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_bodies(folder, asked.model)
        bundle = write_bundle(folder, asked.model, Serving(instances=1, objective_ms=OBJECTIVE_MS))
        core = (os.cpu_count() or 2) - 1
        place = Place(bundle, asked.model, asked.envs.absolute(), core, folder)
        document = {
            "model": asked.model,
            "protocol": asked.protocol,
        } | piece(place, asked.protocol, names, asked)
    document |= {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "took_s": round(time.monotonic() - began_s, 1),
        "host": {"cpu": this_host().cpu, "cores": this_host().cores, "fingerprint": this_host().fingerprint},
        "steal": load_since(before).steal_share,
        "versions": versions(),
    }
    asked.out.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(document, indent=1) + "\n")
    show(document)


def show(document: dict[str, Any]) -> None:
    """Print one piece."""
    limits = document["ceilings_rows_per_s"]
    text = f"the model alone does {statistics.median(limits):.0f} rows/s, {document['best_size']} at a time"
    print(f"{document['model']} over {document['protocol']}: {text}")
    print(f"{'stack':<10}{'req/s':>8}{'of it':>7}{'CPU us':>8}{'p50 ms':>8}{'p99 ms':>8}{'goodput':>9}{'of bound':>9}")
    for name, found in document["stacks"].items():
        if "not_run" in found:
            print(f"{name:<10}{found['not_run']}")
            continue
        rate, cpu = (
            statistics.median(one[key] for one in found["closed"]) for key in ("requests_per_s", "server_cpu_us")
        )
        shares = [one["requests_per_s"] / limit for one, limit in zip(found["closed"], limits, strict=True)]
        row = f"{name:<10}{rate:>8.0f}{statistics.median(shares):>7.2f}{cpu:>8.0f}"
        times = {one["q"]: one["value_ns"] for one in found["equal_rate"]["percentiles"]}
        for q in (0.5, 0.99):
            row += f"{times[q] / 1e6:>8.2f}" if times.get(q) else f"{'-':>8}"
        if "overload" in found:
            good = goodput(found["overload"])
            bound = min(max(found["bound_rows_per_s"]), found["overload"]["rate"])  # after it, some still work it off
            row += f"{good:>9.0f}{good / bound:>9.2f}"
        print(row)


def goodput(figures: dict[str, Any]) -> float:
    """Give the answers a second that came within the objective."""
    verdict = figures["verdict"]
    return float(verdict["requests"] - verdict["misses"]) / float(figures["seconds"])


if __name__ == "__main__":
    main()
