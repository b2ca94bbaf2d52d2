"""Starting the servers that are compared, each pinned to one core and in an environment of its own."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

HERE = Path(__file__).parent
HASTEN = (
    "import sys; from pathlib import Path; from hasten.serve.app import Listening, serve; "
    "serve(Path(sys.argv[1]), Listening(port=0, grpc_port=0, drain_s=0.0), "
    "lambda o: print(o.http.rpartition(':')[2], o.grpc.rpartition(':')[2], flush=True))"
)


class NotStarted(Exception):
    """A server did not come up; says which."""


@dataclass(frozen=True)
class Place:
    """What a stack is started with: the bundle's TOML file, the environments, the core, a folder for its files."""

    bundle: Path
    model: str
    envs: Path
    core: int
    folder: Path

    @property
    def onnx(self) -> str:
        return str(self.bundle.parent / "model" / "model.onnx")

    def python(self, env: str) -> str:
        found = self.envs / env / "bin" / "python"
        if not found.exists():
            raise FileNotFoundError(f"{found} is not there: make the environment {env!r} as README.md says")
        return str(found)


@dataclass
class Server:
    process: subprocess.Popen[str]
    ports: dict[str, int]

    def cpu_s(self) -> float:
        """Processor time of it and its children."""
        whole = psutil.Process(self.process.pid)
        times = [process.cpu_times() for process in (whole, *whole.children(recursive=True))]
        return sum(each.user + each.system for each in times)

    def stop(self) -> None:
        children = psutil.Process(self.process.pid).children(recursive=True)
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for child in children:
            if child.is_running():
                child.kill()


def _run(
    words: list[str], place: Place, *, reads: bool = True, own: bool = False, more: dict[str, str] | None = None
) -> subprocess.Popen[str]:
    said = subprocess.PIPE if reads else subprocess.DEVNULL
    log = (place.folder / f"{Path(words[0]).parent.parent.name}.log").open("w")
    env = {key: value for key, value in os.environ.items() if own or key != "PYTHONPATH"}
    env |= more or {}
    return subprocess.Popen(
        ["taskset", "-c", str(place.core), *words], stdout=said, stderr=log, text=True, env=env, cwd=place.folder
    )


def _ports(process: subprocess.Popen[str]) -> list[int]:
    assert process.stdout is not None
    found = [int(port) for port in process.stdout.readline().split()]
    if not found:
        raise NotStarted(f"{Path(process.args[3]).parent.parent.name} did not start; its log is beside the bundle")
    return found


def hasten(place: Place, python: str = sys.executable) -> Server:
    process = _run([python, "-c", HASTEN, str(place.bundle)], place, own=python == sys.executable)
    ports = _ports(process)
    return Server(process, {"json": ports[0], "binary": ports[0], "grpc": ports[1]})


def compiled(place: Place) -> Server:
    """hasten, compiled (docs/how-to/compile.md)."""
    return hasten(place, place.python("compiled"))


def optimised(place: Place) -> Server:
    """The same on a Python that was built with its own optimisations (PGO and LTO), as Debian's and Docker's are."""
    return hasten(place, place.python("optimised"))


def bare(place: Place) -> Server:
    """No server, and what bounds every one: sockets, copies and runs in C."""
    words = [sys.executable, str(HERE / "peers" / "bare.py"), str(place.bundle), place.model]
    return Server(process := _run(words, place, own=True), {"binary": _ports(process)[0]})


def uvicorn(place: Place) -> Server:
    peers = str(HERE.parent / "transport" / "peers.py")
    process = _run([sys.executable, peers, "uvicorn-model", place.onnx], place, own=True)
    return Server(process, {"binary": _ports(process)[0]})


def fastapi(place: Place) -> Server:
    words = [place.python("fastapi"), str(HERE / "peers" / "fastapi_ort.py"), place.onnx, place.model, "2"]
    process = _run(words, place)
    port = _ports(process)[0]
    return Server(process, {"json": port, "binary": port})


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port: int = held.getsockname()[1]
        return port


def wait_ready(url: str, process: subprocess.Popen[str], limit_s: float = 60.0) -> None:
    end_s = time.monotonic() + limit_s
    while True:
        try:
            with urllib.request.urlopen(url, timeout=2):  # noqa: S310 - loopback
                return
        except urllib.error.HTTPError:
            return  # it answers, whatever it says of this path
        except OSError:
            if process.poll() is not None or time.monotonic() > end_s:
                raise NotStarted(
                    f"{Path(process.args[3]).parent.parent.name} did not start; its log is beside the bundle"
                ) from None
            time.sleep(0.2)


def mlserver(place: Place) -> Server:
    folder = place.folder / "mlserver"
    folder.mkdir(exist_ok=True)
    shutil.copy(HERE / "peers" / "mlserver_ort.py", folder)
    http, grpc, metrics = free_port(), free_port(), free_port()
    settings = {"http_port": http, "grpc_port": grpc, "metrics_port": metrics, "parallel_workers": 0, "debug": False}
    model = {
        "name": place.model,
        "implementation": "mlserver_ort.OnnxModel",
        "parameters": {"uri": place.onnx},
    }
    (folder / "settings.json").write_text(json.dumps({**settings, "host": "127.0.0.1"}))
    (folder / "model-settings.json").write_text(json.dumps(model))
    words = [place.python("mlserver").replace("python", "mlserver"), "start", str(folder)]
    process = _run(words, place, reads=False)
    wait_ready(f"http://127.0.0.1:{http}/v2/models/{place.model}/ready", process)
    return Server(process, {"json": http, "grpc": grpc})


def litserve(place: Place) -> Server:
    port = free_port()
    words = [place.python("litserve"), str(HERE / "peers" / "litserve_ort.py"), place.onnx, place.model, str(port)]
    process = _run(words, place, reads=False)
    wait_ready(f"http://127.0.0.1:{port}/health", process)
    return Server(process, {"json": port})


def kserve(place: Place) -> Server:
    http, grpc = free_port(), free_port()
    words = [place.python("kserve"), str(HERE / "peers" / "kserve_ort.py"), place.onnx, place.model]
    process = _run([*words, str(http), str(grpc)], place, reads=False)
    wait_ready(f"http://127.0.0.1:{http}/v2/models/{place.model}/ready", process)
    return Server(process, {"json": http, "binary": http, "grpc": grpc})


def bentoml(place: Place) -> Server:
    port = free_port()
    shutil.copy(HERE / "peers" / "bentoml_ort.py", place.folder)
    words = [place.python("bentoml").replace("bin/python", "bin/bentoml"), "serve", "bentoml_ort:Net"]
    told = {"MODEL": place.onnx, "NAME": place.model, "BENTOML_DO_NOT_TRACK": "1", "BENTOML_HOME": str(place.folder)}
    process = _run([*words, "--host", "127.0.0.1", "--port", str(port)], place, reads=False, more=told)
    wait_ready(f"http://127.0.0.1:{port}/readyz", process)
    return Server(process, {"json": port})


def ray_serve(place: Place) -> Server:
    port = free_port()
    told = {"RAY_USAGE_STATS_ENABLED": "0"}
    words = [place.python("ray"), str(HERE / "peers" / "ray_ort.py"), place.onnx, place.model, str(port)]
    process = _run(words, place, reads=False, more=told)
    wait_ready(f"http://127.0.0.1:{port}/-/healthz", process)
    return Server(process, {"json": port})


BOUND = "bare"

STACKS: dict[str, Callable[[Place], Server]] = {
    "hasten": hasten,
    "compiled": compiled,
    "optimised": optimised,
    BOUND: bare,
    "uvicorn": uvicorn,
    "fastapi": fastapi,
    "mlserver": mlserver,
    "litserve": litserve,
    "kserve": kserve,
    "bentoml": bentoml,
    "ray": ray_serve,
}
PROTOCOLS = {
    "hasten": ("json", "binary", "grpc"),
    "compiled": ("json", "binary", "grpc"),
    "optimised": ("json", "binary", "grpc"),
    BOUND: ("binary",),
    "uvicorn": ("binary",),
    "fastapi": ("json", "binary"),
    "mlserver": ("json", "grpc"),
    "litserve": ("json",),
    "kserve": ("json", "binary", "grpc"),
    "bentoml": ("json",),
    "ray": ("json",),
}
"""What each speaks: MLServer knows no binary tensors over REST; LitServe, BentoML and Ray Serve no such protocol."""
