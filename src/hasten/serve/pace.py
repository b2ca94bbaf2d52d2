"""How what is loaded beside requests rests: each step of it holds the interpreter, which the event loop needs too."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

SHARE, LEAST_S = 2.0, 0.03
"""A step leaves so many times as long as it took to the requests, and at least so much: a queue that built up behind
it has gone before the next one begins (docs/decisions/0009)."""


@dataclass(frozen=True)
class Pace:
    """Rests between the steps of a load, where requests are served ``beside`` it."""

    beside: Callable[[], bool] = lambda: False
    sleep: Callable[[float], None] = time.sleep

    def rest(self, spent_s: float = 0.0) -> None:
        """Rest after a step, in the thread that did it."""
        if self.beside():
            self.sleep(max(SHARE * spent_s, LEAST_S))

    async def pause(self) -> None:
        """Rest after a step of the event loop itself, which goes on with requests."""
        if self.beside():
            await asyncio.sleep(LEAST_S)
