"""The turns of an event loop: how long what is read now may have waited in its socket before it was seen.

A loop asks the system for the sockets that have something, reads all of them, and asks again. Where reading takes long
(bodies of JSON on a core that is shared with the runs) a request waits in its socket for up to a whole turn, which no
clock of ours sees: admission that does not know it lets in what will be late. What was not there when the turn before
began has come since then, unless the loop slept in between.
"""

from __future__ import annotations

import asyncio


class Turns:
    """The turns in which sockets are read. On the event loop's thread alone; it costs nothing until ``watch``."""

    __slots__ = ("_began_ns", "_busy", "_loop", "_within", "maybe_ns", "since_ns", "unseen_ns")

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._within = False
        """A turn's sockets are being read."""
        self._busy = False
        """The loop has not slept since the turn before."""
        self._began_ns = 0
        self.since_ns = 0
        """Since when what is read in this turn may have waited; it names the turn."""
        self.maybe_ns = 0
        """What it may have waited before that, for all that is known: the loop may have waited for a core."""
        self.unseen_ns = 0
        """How long at most the loop may have waited for a core since it was woken (``bursts``)."""

    def watch(self, loop: asyncio.AbstractEventLoop) -> None:
        """Follow the turns from now on: somebody asks for them."""
        self._loop = loop

    def reads(self, now_ns: int) -> None:
        """A socket is read."""
        if self._within or self._loop is None:
            return
        self._within = True
        self.since_ns = self._began_ns if self._busy else now_ns
        self.maybe_ns = 0 if self._busy else min(self.unseen_ns, now_ns - self._began_ns)
        self._began_ns = now_ns
        self._loop.call_soon(self._over)

    def waited_ns(self, now_ns: int) -> int:
        """Say how long at most a request that was read in this turn has waited to be; 0 outside of one."""
        return now_ns - self.since_ns if self._within else 0

    def _over(self) -> None:
        """Every socket of the turn was read. The loop does not sleep while something is to be called."""
        self._within, self._busy = False, True
        self.maybe_ns = 0
        if self._loop is not None:
            self._loop.call_soon(self._look)

    def _look(self) -> None:
        """The system was asked again: without a read the loop may sleep now."""
        self._busy = self._within
