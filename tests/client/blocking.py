"""An asyncio client as a blocking one, so that one test speaks to both kinds."""

from __future__ import annotations

import asyncio
from typing import Any

import hasten


class Blocking:
    """An ``AsyncClient`` with a loop of its own, so that one test speaks to both kinds."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        self._runner = asyncio.Runner()
        self._client = hasten.AsyncClient(*args, **settings)

    def __enter__(self) -> Blocking:
        return self

    def __exit__(self, *told: object) -> None:
        self._runner.run(self._client.close())
        self._runner.close()

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **named: self._runner.run(getattr(self._client, name)(*args, **named))

    def turn(self) -> None:
        """Let the loop read what has come."""

        async def turns() -> None:
            for _ in range(4):
                await asyncio.sleep(0)

        self._runner.run(turns())
