"""An analysis as a run in an MLflow file store. Needs the extra ``mlflow``."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from mlflow.tracking import MlflowClient

from hasten.analyse.analysis import Analysis
from hasten.report.export import curve_points, scalars, settings
from hasten.report.service import markdown_of

EXPERIMENT = "hasten"
ALLOW = "MLFLOW_ALLOW_FILE_STORE"


def write(analysis: Analysis, folder: Path) -> None:
    """Write a run with its settings, numbers, the curve by rate, and the tables as an artifact."""
    with _file_store_allowed():
        _write(MlflowClient(tracking_uri=folder.resolve().as_uri()), analysis)


def _write(client: MlflowClient, analysis: Analysis) -> None:
    known = client.get_experiment_by_name(EXPERIMENT)
    experiment = known.experiment_id if known is not None else client.create_experiment(EXPERIMENT)
    run = client.create_run(experiment, run_name=analysis.asked.model or "endpoint").info.run_id
    for name, setting in settings(analysis).items():
        client.log_param(run, name, setting)
    for name, value in scalars(analysis).items():
        client.log_metric(run, _name(name), value)
    for step, numbers in curve_points(analysis):
        for name, value in numbers.items():
            client.log_metric(run, _name(name), value, step=step)
    client.log_text(run, markdown_of(analysis), "analysis.md")
    client.set_terminated(run)


@contextlib.contextmanager
def _file_store_allowed() -> Iterator[None]:
    """MLflow 3.17 and later refuse a file store unless the environment asks for it; it is what needs no server."""
    before = os.environ.get(ALLOW)
    os.environ[ALLOW] = "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ[ALLOW]
        else:
            os.environ[ALLOW] = before


def _name(name: str) -> str:
    return re.sub(r"[^\w\-./ ]", "_", name)
