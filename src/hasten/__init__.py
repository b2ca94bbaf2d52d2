"""hasten: from a trained model to a proven, faster one.

    result = hasten.optimize("model.onnx", "val.parquet", hasten.Goal(max_drop=0.01, p99_ns=5e6))
    print(result.verdict.word, result.deployment)

Names are imported when they are first used: ``import hasten`` loads no engine, no NumPy and no torch.

Nothing is sent to anybody: libraries that would tell their makers of the models that they run are told not to, before
they are imported. Who wants them to says so by the same variables (``SILENCED``).
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hasten.artifact import Artifact
    from hasten.client.client import AsyncClient, Client
    from hasten.deployment import Deployment, read_deployment
    from hasten.errors import HastenError
    from hasten.frontends import import_model
    from hasten.plan import Inputs, Part, Plan, run_plan, run_plan_isolated
    from hasten.samples import Samples
    from hasten.samples.preprocess import Preprocess
    from hasten.samples.readers import read_samples
    from hasten.samples.split import split
    from hasten.search.optimize import optimize
    from hasten.search.prepare import Data
    from hasten.search.result import Goal, Result, read_result
    from hasten.search.task import Effort
    from hasten.store import Store
    from hasten.transform import Context, run_pass

_HOMES = {
    "Artifact": "hasten.artifact",
    "AsyncClient": "hasten.client.client",
    "Client": "hasten.client.client",
    "Context": "hasten.transform",
    "Data": "hasten.search.prepare",
    "Deployment": "hasten.deployment",
    "Effort": "hasten.search.task",
    "Goal": "hasten.search.result",
    "HastenError": "hasten.errors",
    "Inputs": "hasten.plan",
    "Part": "hasten.plan",
    "Plan": "hasten.plan",
    "Preprocess": "hasten.samples.preprocess",
    "Result": "hasten.search.result",
    "Samples": "hasten.samples",
    "Store": "hasten.store",
    "import_model": "hasten.frontends",
    "optimize": "hasten.search.optimize",
    "read_deployment": "hasten.deployment",
    "read_result": "hasten.search.result",
    "read_samples": "hasten.samples.readers",
    "run_pass": "hasten.transform",
    "run_plan": "hasten.plan",
    "run_plan_isolated": "hasten.plan",
    "split": "hasten.samples.split",
}

SILENCED = {
    "ORT_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "WANDB_ERROR_REPORTING": "false",
}
"""What ONNX Runtime (from 1.32 on, on Linux), MLflow and wandb read before they begin."""

for _variable, _value in SILENCED.items():
    os.environ.setdefault(_variable, _value)

__all__ = [
    "Artifact",
    "AsyncClient",
    "Client",
    "Context",
    "Data",
    "Deployment",
    "Effort",
    "Goal",
    "HastenError",
    "Inputs",
    "Part",
    "Plan",
    "Preprocess",
    "Result",
    "Samples",
    "Store",
    "import_model",
    "optimize",
    "read_deployment",
    "read_result",
    "read_samples",
    "run_pass",
    "run_plan",
    "run_plan_isolated",
    "split",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'hasten' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
