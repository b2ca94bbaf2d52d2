"""What a model gets from its server."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

from hasten.serve.runner import Clock


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """The loop and clock, the cores that are a model's share, and whose code its steps may run."""

    loop: asyncio.AbstractEventLoop
    clock_ns: Clock
    cores: int
    code: Path | None = None
    """The folder whose Python files steps may run; None: none."""
