"""What a model gets from its server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from hasten.protocol.messages import InferResponse, ModelMetadata
from hasten.serve.bursts import Bursts
from hasten.serve.cork import Cork
from hasten.serve.pace import Pace
from hasten.serve.runner import Clock
from hasten.serve.ticket import Infers, Marks
from hasten.serve.turns import Turns


class Members(Infers, Protocol):
    """What a deployment made of others needs of its service."""

    def sent(self, response: InferResponse, marks: Marks) -> None:
        """Count the phases of a member's answer, all marks set."""

    def model_metadata(self, name: str, version: str | None = None) -> ModelMetadata:
        """Give what a client may know of a member. Raises ModelNotFound, ModelNotReady."""

    def model_ready(self, name: str, version: str | None = None) -> bool:
        """Say whether a member takes requests. Raises ModelNotFound."""

    def takes_image(self, name: str) -> bool:
        """Say whether a member's only input is the file of an image. Raises ModelNotFound, ModelNotReady."""

    def members_of(self, name: str) -> Sequence[str]:
        """Give the names of the members of a deployment of the repository; of a model of its own there are none."""

    async def load(self, name: str, version: str | None = None) -> None:
        """Load a member. Raises ModelNotFound, ModelNotReady."""


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """The loop and clock, the cores that are a model's share, whose code its steps may run, and the other models."""

    loop: asyncio.AbstractEventLoop
    clock_ns: Clock
    cores: int
    cork: Cork = field(default_factory=Cork)
    """What holds the answers of a batch together, shared with the transports."""
    turns: Turns = field(default_factory=Turns)
    """How long requests may have waited to be read, told by the transports."""
    bursts: Bursts = field(default_factory=lambda: Bursts(Turns()))
    """Told when a model is behind: requests are then read in bursts."""
    code: Path | None = None
    """The folder whose Python files steps may run; None: none."""
    members: Members | None = None
    """Where a deployment made of others finds its members; None: nowhere."""
    pace: Pace = field(default_factory=Pace)
    """How loads rest: requests may be taken already."""
    offline: bool = False
    """Nobody waits for one answer: objectives, timeouts and bounds of deployments do not hold."""
    gone: Callable[[], object] = lambda: None
    """Told when a version has gone, and nothing of it is needed any more."""
