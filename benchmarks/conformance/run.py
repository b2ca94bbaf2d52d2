"""Runs the suite against hasten (both transports) and against peers, each in its own environment.

    python benchmarks/conformance/run.py --mlserver ENV/bin/python --kserve ENV/bin/python

Writes results/NAME.json and the table of README.md. Servers listen on loopback, and are ended afterwards.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SERVERS, RESULTS = HERE / "servers", HERE / "results"
PORT, GRPC_PORT = 18430, 18431
PACKAGES = {
    "hasten": ("hasten", "onnxruntime", "uvloop", "httptools", "uvicorn", "grpcio"),
    "mlserver": ("mlserver", "mlserver-sklearn", "scikit-learn", "uvicorn", "uvloop", "grpcio", "fastapi", "pydantic"),
    "kserve": ("kserve", "uvicorn", "uvloop", "grpcio", "fastapi", "pydantic"),
}
LEVELS = ("required", "recommended", "extension")

Command = Callable[[str, Path], list[str]]


def hasten(transport: str) -> Command:
    def command(python: str, folder: Path) -> list[str]:
        subprocess.run([python, SERVERS / "hasten_net.py", folder], check=True)
        ports = ["--port", str(PORT), "--grpc-port", str(GRPC_PORT), "--drain", "1ms"]
        return [python, "-m", "hasten", "serve", str(folder), *ports, "--transport", transport, "--shared-memory"]

    return command


def mlserver(python: str, folder: Path) -> list[str]:
    subprocess.run([python, SERVERS / "mlserver_net.py", folder / "models", str(PORT), str(GRPC_PORT)], check=True)
    return [str(Path(python).parent / "mlserver"), "start", str(folder / "models")]


def kserve(python: str, folder: Path) -> list[str]:
    return [python, str(SERVERS / "kserve_net.py"), str(PORT), str(GRPC_PORT)]


def wait_ready(process: subprocess.Popen[bytes], seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/v2/models/net/ready", timeout=2):
                return
        except (OSError, urllib.error.URLError):
            time.sleep(0.2)
    raise SystemExit(f"the server did not get ready (exit code {process.poll()})")


def check(name: str, python: str, command: Command, more: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(command(python, Path(folder)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            wait_ready(process)
            url, grpc = f"http://127.0.0.1:{PORT}", f"127.0.0.1:{GRPC_PORT}"
            suite = [sys.executable, "-m", "hasten", "conformance", url, "--grpc", grpc, "--model", "net", "--json"]
            done = subprocess.run([*suite, *more], capture_output=True, text=True, check=False)
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
    if done.returncode not in (0, 3):
        raise SystemExit(done.stderr)
    found = {"server": name, "versions": versions(python, name), "python": platform.python_version()}
    text = json.dumps({**found, "exit_code": done.returncode, **json.loads(done.stdout)}, indent=1)
    (RESULTS / f"{name}.json").write_text(text + "\n")
    print(name, done.returncode, json.loads(done.stdout)["counts"])


def versions(python: str, name: str) -> dict[str, str]:
    code = (
        "import json, sys, importlib.metadata as m\nfound = {}\nfor n in sys.argv[1:]:\n"
        "    try: found[n] = m.version(n)\n    except m.PackageNotFoundError: found[n] = 'absent'\n"
        "print(json.dumps(found))"
    )
    words = PACKAGES[name.partition("-")[0]]
    done = subprocess.run([python, "-c", code, *words], capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


def share(counted: dict[str, int]) -> str:
    met = counted.get("met", 0)
    told = met + counted.get("not met", 0)
    return f"{met} of {told}" if told else "none offered"


def table() -> str:
    rows = ["| server | required | recommended | extensions that it claims | version |", "|---|---|---|---|---|"]
    found: list[dict[str, Any]] = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    for result in found:
        cells = [share(result["counts"].get(level, {})) for level in LEVELS]
        version = next(iter(result["versions"].values()))
        rows.append(f"| {result['server']} | {' | '.join(cells)} | {version} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mlserver", help="the interpreter of an environment with mlserver and mlserver-sklearn")
    parser.add_argument("--kserve", help="the interpreter of an environment with kserve")
    given = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    check("hasten-fast", sys.executable, hasten("fast"), ["--reload"])
    check("hasten-library", sys.executable, hasten("library"), ["--reload"])
    if given.mlserver:
        check("mlserver", given.mlserver, mlserver, [])
    if given.kserve:
        check("kserve", given.kserve, kserve, ["--assume", "binary_tensor_data"])
    page = HERE / "README.md"
    before, _, rest = page.read_text().partition("<!-- table -->\n")
    after = rest.partition("<!-- end -->")[2]
    page.write_text(f"{before}<!-- table -->\n{table()}\n<!-- end -->{after}")


if __name__ == "__main__":
    main()
