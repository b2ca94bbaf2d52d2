"""What sends the requests of a run and tells the recorder what becomes of each."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Sequence
from typing import Any, Protocol

from hasten.errors import MissingDependency
from hasten.load.payloads import Payload
from hasten.load.recorder import Recorder
from hasten.load.target import Target

FIX = "pip install 'hasten[serve]'"

SENDERS = {
    "rest-json": "hasten.load.http1:Http1Sender",
    "rest-binary": "hasten.load.http1:Http1Sender",
    "http": "hasten.load.http1:Http1Sender",
    "grpc": "hasten.load.http2:Http2Sender",
    "session": "hasten.load.session:SessionSender",
}


class Sender(Protocol):
    """Sends requests by index. All calls on the event loop's thread; none blocks, and none but ``open`` raises."""

    async def open(self) -> None:
        """Reach the target. Raises NoAnswer, or another HastenError: it cannot be reached, and why."""

    def begin(self, recorder: Recorder) -> None:
        """Tell this recorder from now on; what an earlier run left under way is dropped."""

    def send(self, index: int, payload: int) -> None:
        """Let a request go; the recorder is told when it leaves and how it ends."""

    def withdraw(self, index: int) -> None:
        """Drop a request whose time is over; nothing more is told of it."""

    def settle(self, recorder: Recorder) -> None:
        """Read, after a run, what was kept unread: outcomes and statuses are final then."""

    def close(self) -> None:
        """Let go of connections. Closing twice is fine."""


def make_sender(target: Target, payloads: Sequence[Payload], loop: asyncio.AbstractEventLoop) -> Sender:
    """Make what speaks the target's protocol; nothing is connected yet. Raises MissingDependency."""
    module, _, name = SENDERS[target.protocol].partition(":")
    try:
        kind: Any = getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise MissingDependency(f"what load over {target.protocol} needs ({error.name or error})", FIX) from error
    made: Sender = kind(target, payloads, loop)
    return made
