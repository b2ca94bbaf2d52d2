"""An analysis as a TensorBoard event file. Needs the extra ``tensorboard``."""

from __future__ import annotations

from pathlib import Path

from tensorboardX import SummaryWriter

from hasten.analyse.analysis import Analysis
from hasten.report.export import curve_points, scalars
from hasten.report.service import markdown_of


def write(analysis: Analysis, folder: Path) -> None:
    """Write scalars at step 0, the curve with a step for each rate, and the tables as a text."""
    with SummaryWriter(str(folder)) as writer:
        for name, value in scalars(analysis).items():
            writer.add_scalar(name, value, 0)
        for step, numbers in curve_points(analysis):
            for name, value in numbers.items():
                writer.add_scalar(name, value, step)
        writer.add_text("analysis", markdown_of(analysis), 0)
