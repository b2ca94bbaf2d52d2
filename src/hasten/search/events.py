"""What a search tells while it runs, for whoever shows it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from hasten.search.result import Trial

Kind = Literal["stage", "trial-start", "trial-end", "note", "progress"]


@dataclass(frozen=True, kw_only=True)
class Event:
    """One piece of news."""

    kind: Kind
    stage: str
    text: str
    share: float | None = None
    """Of the work named in ``text``, 0 to 1; None where nobody knows."""
    trial: Trial | None = None
    """With "trial-end": what came of it."""
    best: Trial | None = None
    """The best trial so far that meets the goal on the search split."""
    left_s: float | None = None
    """Seconds until the end, estimated; None before there is anything to estimate from."""


Listener = Callable[[Event], None]
