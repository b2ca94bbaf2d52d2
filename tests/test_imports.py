"""What importing costs: the package alone drags in neither torch nor an engine, and the base install imports it all."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hasten

HEAVY = ("torch", "onnxruntime", "openvino", "scipy", "onnx", "PIL", "jinja2", "rich", "arro3")
"""Distributions that a bare ``import hasten`` must not load."""

EXTRAS = (
    *("grpc", "hpack", "httptools", "opentelemetry", "prometheus_client", "uvicorn", "uvloop"),
    "tokenizers",
    *("torch", "torchvision", "onnxscript", "onnx_ir", "safetensors", "openvino", "nncf"),
    *("sklearn", "pandas", "pyarrow", "plotly", "datasets", "hypothesis", "pytest", "mypy", "ruff", "importlinter"),
    *("tensorboardX", "wandb", "mlflow"),
)
"""What the base install does not hold."""

OWNERS = {
    "torch": (
        *("frontends/pytorch", "torchview/", "engines/torch"),
        *("passes/finetune", "passes/distill", "passes/importance", "passes/prune_channels"),
    ),
    "openvino": ("engines/openvino", "measure/peaks_openvino"),
    "grpc": ("serve/grpc_library", "serve/app", "client/grpc", "conformance/grpc_wire"),
    "hpack": ("serve/http2", "serve/grpc_fast", "load/http2"),
    "httptools": ("serve/http1", "serve/listen", "client/http_async", "load/http1"),
    "opentelemetry": ("serve/otel",),
    "uvicorn": ("serve/asgi",),
    "tokenizers": ("steps/tokenise",),
    "uvloop": ("serve/app",),
    "tensorboardX": ("report/export_tensorboard",),
    "wandb": ("report/export_wandb",),
    "mlflow": ("report/export_mlflow",),
}
"""The only files, by the beginning of their names, that import an extra: plainly, at their top."""

WITHOUT_EXTRAS = f"""
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {EXTRAS} else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path = [Without(finder) for finder in sys.meta_path]
"""
"""Makes an interpreter one in which no extra is installed."""


def answer_of(code: str) -> object:
    """Run code in a fresh interpreter; it prints one line of JSON."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def sources() -> dict[str, Path]:
    """Give every source file by its place in the package."""
    root = Path(next(iter(hasten.__path__)))
    return {path.relative_to(root).as_posix(): path for path in sorted(root.rglob("*.py"))}


def module(place: str) -> str:
    return "hasten." + place.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def test_importing_hasten_loads_neither_torch_nor_an_engine() -> None:
    loaded = answer_of(f"import json, sys, hasten; print(json.dumps([m for m in {HEAVY} if m in sys.modules]))")
    assert loaded == []


def test_every_module_imports_with_no_extra_installed() -> None:
    owners = tuple(start for starts in OWNERS.values() for start in starts)
    wanted = [module(place) for place in sources() if not place.startswith(owners) and "__main__" not in place]
    code = f"""{WITHOUT_EXTRAS}
import importlib, json
failed = {{}}
for name in {wanted}:
    try:
        importlib.import_module(name)
    except ImportError as error:
        failed[name] = str(error)
print(json.dumps(failed))
"""
    assert answer_of(code) == {}


def test_a_missing_extra_is_named_with_the_command_that_installs_it() -> None:
    code = f"""{WITHOUT_EXTRAS}
import json
from hasten import registry
from hasten.errors import MissingDependency
found = {{}}
for kind, name in (("engine", "openvino"), ("frontend", "pytorch")):
    try:
        registry.load(kind, name)
    except MissingDependency as error:
        found[name] = error.command
print(json.dumps(found))
"""
    assert answer_of(code) == {
        "openvino": "pip install 'hasten[openvino]'",
        "pytorch": "pip install 'hasten[train]'",
    }


@pytest.mark.parametrize("runtime", OWNERS)
def test_a_heavy_runtime_is_named_in_its_own_files_alone(runtime: str) -> None:
    """Elsewhere not even a late import names it."""
    for place, path in sources().items():
        if not place.startswith(OWNERS[runtime]):
            found = re.findall(rf"^\s*(?:import|from) {runtime}\b.*", path.read_text(), re.MULTILINE)
            assert not found, f"{place}: {found[0].strip()}"
