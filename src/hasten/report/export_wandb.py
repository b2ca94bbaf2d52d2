"""An analysis as a Weights & Biases run that stays on this machine (offline). Needs the extra ``wandb``."""

from __future__ import annotations

from pathlib import Path

import wandb

from hasten.analyse.analysis import Analysis
from hasten.report.export import curve_points, scalars, settings


def write(analysis: Analysis, folder: Path) -> None:
    """Write a run into ``folder``; ``wandb sync`` sends it, where somebody wants that."""
    quiet = wandb.Settings(console="off", silent=True, disable_git=True, x_disable_stats=True)
    run = wandb.init(
        project="hasten",
        dir=str(folder),
        mode="offline",
        config=settings(analysis),
        settings=quiet,
        reinit="create_new",
    )
    for rate, numbers in curve_points(analysis):
        run.log({"requests_per_s": rate, **numbers})
    run.summary.update(scalars(analysis))
    run.finish()
