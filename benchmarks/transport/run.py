"""What a transport costs: requests a second and processor time a request of hasten's and of bare ones, interleaved.

    python benchmarks/transport/run.py [--compiled envs/compiled/bin/python] [--out FILE.json]

Servers are pinned to the last core and wrk or h2load to the first: 16 connections, each with one request at a time.
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
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "serving"))
from bundles import bodies, request_of, write_bundle

import hasten
from hasten.deployment import Serving
from hasten.host import load_since, this_host, ticks, versions

HERE = Path(__file__).parent
CONNECTIONS = 16
GENERATOR = os.environ.get("GENERATOR_CORE", "0")
PATH = {"binary": "/v2/models/mlp/infer", "grpc": "/inference.GRPCInferenceService/ModelInfer"}
STACKS = {
    "hasten rest": ("hasten", "binary"),
    "hasten rest, compiled": ("compiled", "binary"),
    "uvicorn raw asgi, model": ("uvicorn-model", "binary"),
    "uvicorn raw asgi, echo": ("uvicorn-echo", "binary"),
    "asyncio.Protocol + httptools, model": ("bare-model", "binary"),
    "asyncio.Protocol + httptools, echo": ("bare-echo", "binary"),
    "hasten grpc": ("hasten", "grpc"),
    "hasten grpc, compiled": ("compiled", "grpc"),
    "grpc.aio, model": ("grpcaio-model", "grpc"),
}
HASTEN = (
    "import sys; from pathlib import Path; from hasten.serve.app import Listening, serve; "
    "serve(Path(sys.argv[1]), Listening(port=0, grpc_port=0, drain_s=0.0), "
    "lambda o: print(o.http.rpartition(':')[2], o.grpc.rpartition(':')[2], flush=True))"
)


@dataclass
class Server:
    process: subprocess.Popen[str]
    ports: dict[str, int]

    def cpu_s(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def start(kind: str, bundle: Path, core: int, compiled: str | None) -> Server:
    model = str(bundle.parent / "model" / "model.onnx")
    words = [str(HERE / "peers.py"), kind, model] if kind not in ("hasten", "compiled") else ["-c", HASTEN, str(bundle)]
    env = {key: value for key, value in os.environ.items() if kind != "compiled" or key != "PYTHONPATH"}
    python = compiled if kind == "compiled" and compiled else sys.executable
    words = ["taskset", "-c", str(core), python, *words]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=env)
    assert process.stdout is not None
    ports = [int(port) for port in process.stdout.readline().split()]
    if not ports:
        raise SystemExit(f"{kind} did not start")
    return Server(process, {"binary": ports[0], "grpc": ports[-1]})


def load(kind: str, port: int, seconds: float, folder: Path) -> float:
    """Give requests a second of a closed loop."""
    url = f"http://127.0.0.1:{port}{PATH[kind]}"
    if kind == "grpc":
        words = [
            "h2load",
            "-t1",
            f"-c{CONNECTIONS}",
            "-m1",
            f"-D{seconds * 1000:.0f}ms",
            "-d",
            str(folder / "grpc.bin"),
        ]
        words += ["-H", "content-type: application/grpc", "-H", "te: trailers", url]
        found = _text(words)
        succeeded = re.search(r"(\d+) succeeded, (\d+) failed, (\d+) errored", found)
        if succeeded is None or int(succeeded[2]) or int(succeeded[3]):
            raise SystemExit(found)
        return float(re.search(r"([\d.]+) req/s", found)[1])  # type: ignore[index]
    found = _text(["wrk", "-t1", f"-c{CONNECTIONS}", f"-d{seconds:g}s", "-s", str(folder / "binary.lua"), url])
    if "Non-2xx" in found or "Socket errors" in found:
        raise SystemExit(found)
    return float(re.search(r"Requests/sec:\s+([\d.]+)", found)[1])  # type: ignore[index]


def _text(words: list[str]) -> str:
    return subprocess.run(["taskset", "-c", GENERATOR, *words], capture_output=True, text=True, check=True).stdout


def write_bodies(folder: Path) -> None:
    found = bodies(request_of("mlp", "x"))
    (folder / "grpc.bin").write_bytes(found["grpc"][0])
    body, headers = found["binary"]
    (folder / "body.bin").write_bytes(body)
    lines = [
        f'local file = io.open("{folder / "body.bin"}", "rb")',
        'wrk.method = "POST"',
        'wrk.body = file:read("*a")',
    ]
    lines += [f'wrk.headers["{name}"] = "{value}"' for name, value in headers.items()]
    (folder / "binary.lua").write_text("\n".join(lines) + "\n")


def check(server: Server) -> None:
    """Both ways of hasten answer, and the same."""
    request = request_of("mlp", "x")
    x = request.inputs[0].data
    found = []
    for url in (f"http://127.0.0.1:{server.ports['binary']}", f"grpc://127.0.0.1:{server.ports['grpc']}"):
        with hasten.Client(url) as client:
            result = client.infer("mlp", {"x": x})
            assert result.phases_ns["infer"] > 0
            found.append(result.outputs["y"].tolist())
    assert found[0] == found[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--compiled", help="the Python that has the compiled server; else that is left out")
    parser.add_argument("--only", nargs="*", default=list(STACKS))
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    core = (os.cpu_count() or 2) - 1
    before, rows = ticks(), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_bodies(folder)
        bundle = write_bundle(folder, "mlp", Serving(instances=1))
        stacks = {stack: STACKS[stack] for stack in asked.only if asked.compiled or STACKS[stack][0] != "compiled"}
        kinds = dict.fromkeys(kind for kind, _ in stacks.values())
        servers = {kind: start(kind, bundle, core, asked.compiled) for kind in kinds}
        try:
            if "hasten" in servers:
                check(servers["hasten"])
            for kind, protocol in stacks.values():  # warm
                load(protocol, servers[kind].ports[protocol], 1.0, folder)
            order = random.Random(0)
            for at in range(asked.rounds):
                for stack in order.sample(list(stacks), len(stacks)):
                    kind, protocol = stacks[stack]
                    server = servers[kind]
                    began_s, cpu_s = time.perf_counter(), server.cpu_s()
                    rate = load(protocol, server.ports[protocol], asked.seconds, folder)
                    spent = server.cpu_s() - cpu_s
                    requests = rate * asked.seconds
                    rows.append(
                        {
                            "round": at,
                            "stack": stack,
                            "requests_per_s": round(rate, 1),
                            "server_cpu_us": round(spent / requests * 1e6, 2),
                            "seconds": round(time.perf_counter() - began_s, 2),
                        }
                    )
        finally:
            for server in servers.values():
                server.process.terminate()
            for server in servers.values():
                server.process.wait(10)
    show(rows, list(stacks))
    if asked.out:
        document = {
            "when": datetime.now(UTC).isoformat(timespec="seconds"),
            "host": {"cpu": this_host().cpu, "cores": this_host().cores, "fingerprint": this_host().fingerprint},
            "load": {"average": load_since(before).load_average, "steal": load_since(before).steal_share},
            "versions": versions(),
            "settings": {"connections": CONNECTIONS, "rounds": asked.rounds, "seconds": asked.seconds},
            "rows": rows,
        }
        asked.out.write_text(json.dumps(document, indent=1) + "\n")


def show(rows: list[dict[str, float]], stacks: list[str]) -> None:
    """Print medians, and the ratio to uvicorn's raw ASGI with a model: the median over rounds of the ratio in each."""
    by = {stack: [row for row in rows if row["stack"] == stack] for stack in stacks}
    base = by.get("uvicorn raw asgi, model")
    print(f"{'stack':<38}{'req/s':>9}{'CPU us':>9}{'ratio':>7}")
    for stack, found in by.items():
        rate, cpu = (statistics.median(row[key] for row in found) for key in ("requests_per_s", "server_cpu_us"))
        ratio = ""
        if base:
            pairs = [a["requests_per_s"] / b["requests_per_s"] for a, b in zip(found, base, strict=True)]
            ratio = f"{statistics.median(pairs):.2f}"
        print(f"{stack:<38}{rate:>9.0f}{cpu:>9.1f}{ratio:>7}")


if __name__ == "__main__":
    main()
