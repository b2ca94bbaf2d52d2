"""``hasten demo``: the main job with nothing to bring."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Annotated

from hasten.cli import units
from hasten.cli.answer import COMMON, Answer, Common
from hasten.cli.optimize import GoalOptions, SearchOptions, optimize

BUDGET_S = 120.0
MAX_DROP = 0.02
"""The most that five hundred certify samples prove with room to spare: they resolve about one per cent."""


def demo(
    *,
    budget: Annotated[float, units.read_by(units.seconds)] = BUDGET_S,
    max_drop: Annotated[float, units.read_by(units.share)] = MAX_DROP,
    fresh: bool = False,
    common: Common = COMMON,
) -> Answer:
    """Run the main job on handwritten digits: a residual network that comes with hasten, and samples it never saw.

    .. code-block:: console

        hasten demo
        hasten demo --budget 60s --json

    Args:
        budget: Time for the whole.
        max_drop: Accuracy that may be lost.
        fresh: Forget an earlier demo, instead of showing it again.
        common: The options of every verb.
    """
    folder = Path(str(resources.files("hasten.cli") / "demo"))
    return optimize(
        str(folder / "digits.onnx"),
        data=str(folder / "digits.parquet"),
        goal=GoalOptions(max_drop=max_drop),
        search_options=SearchOptions(budget=budget, fresh=fresh),
        common=common,
    )
