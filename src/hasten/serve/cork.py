"""What is written when a batch is done: all its answers one after the other, once the last of them is encoded.

Each write to a client that sleeps wakes it: on another core by an interrupt, tens of microseconds in a virtual machine.
A client that gets its answers together is woken once, and sends its next requests together.
"""

from __future__ import annotations

import logging
from typing import Protocol

logger = logging.getLogger(__name__)


class Held(Protocol):
    """A connection with answers that wait to be written."""

    def flush(self) -> None:
        """Write them. Called again without any, it does nothing."""


class Waiter(Protocol):
    """Who is told that an answer has gone out."""

    def sent(self) -> None:
        """It was handed to the socket."""


class Cork:
    """Holds connections back while the answers of a batch are made. On the event loop's thread alone."""

    __slots__ = ("_held", "active")

    def __init__(self) -> None:
        self.active = False
        """Answers shall be held: a batch is being answered."""
        self._held: list[Held] = []

    @property
    def size(self) -> int:
        """Answers that are held."""
        return len(self._held)

    def hold(self, connection: Held) -> None:
        """Flush a connection at the release."""
        self._held.append(connection)

    def release(self) -> None:
        """Flush all that was held, in order, and hold no more."""
        self.active = False
        held, self._held = self._held, []
        for connection in held:
            try:
                connection.flush()
            except Exception:
                logger.exception("answers could not be written")
