"""What an HTTP/2 connection is guarded by: a credit for frames that ask for nothing, bounded header blocks, arrivals.

By its arrivals, a call whose message stalls is told from those beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import inf
from typing import Final, Protocol

from hpack import Decoder, HPACKError

from hasten.protocol.http2_frames import Broken, Code

CREDIT: Final = 1000.0
"""Control frames that a connection may send ahead of its calls."""
CREDIT_PER_S: Final = 100.0
CREDIT_PER_CALL: Final = 4.0
"""What an answered call gives back: its window updates, and the ping with which a client measures its window."""
KEPT_BLOCKS: Final = 64


class Credit:
    """Control frames that a peer may still send: used up by a flood, given back by calls and by time."""

    __slots__ = ("_left", "_since_s")

    def __init__(self, now_s: float) -> None:
        self._left = CREDIT
        self._since_s = now_s

    def earn(self, frames: float) -> None:
        """Give back."""
        self._left = min(CREDIT, self._left + frames)

    def pay(self, clock_s: Callable[[], float]) -> None:
        """Count a frame that asks for nothing. Raises Broken where the credit is used up."""
        self._left -= 1
        if self._left < 0:
            now_s = clock_s()
            self.earn(CREDIT_PER_S * (now_s - self._since_s))
            self._since_s = now_s
            if self._left < 0:
                raise Broken(Code.ENHANCE_YOUR_CALM, "too many control frames for the calls that are made")


class Receives(Protocol):
    """A call, as its arrival is seen."""

    body: bytearray
    counted: bool
    """Its message has not come whole."""


class Arrivals:
    """How much of each call's message had come when the connection was last looked at."""

    __slots__ = ("_bytes", "_last")

    def __init__(self) -> None:
        self._bytes: dict[int, float] = {}
        self._last = 0
        """The newest call then. A call that is newer has not had all of the time yet."""

    def begin(self, last: int) -> None:
        """Look from now on: what comes of a call counts from its first byte."""
        self._bytes.clear()
        self._last = last

    def renew(self, number: int) -> None:
        """Let the next look pass for a stream: another message of it begins."""
        self._bytes[number] = -inf

    def stalled(self, calls: Mapping[int, Receives], last: int, least_bytes: float) -> list[int]:
        """Look again: give the calls of whose messages fewer bytes have come since the last look."""
        before, upto = self._bytes, self._last
        self._bytes, self._last = {number: len(call.body) for number, call in calls.items() if call.counted}, last
        return [
            number
            for number, came in self._bytes.items()
            if number <= upto and came - before.get(number, 0) < least_bytes
        ]


class HeaderBlocks:
    """HPACK (RFC 7541) of one connection. A block that has left the table alone is not decoded a second time."""

    def __init__(self, limit_bytes: int) -> None:
        self._decoder = Decoder(max_header_list_size=limit_bytes)
        self._known: dict[bytes, dict[bytes, bytes]] = {}

    def decode(self, block: bytes) -> dict[bytes, bytes]:
        """Give the headers of a block, repeated ones joined by a comma; they are shared, and not to be changed.

        Raises:
            Broken: it cannot be decoded, or its headers are over the limit.
        """
        known = self._known.get(block)
        if known is not None:
            return known
        entries = self._decoder.header_table.dynamic_entries
        count, newest = len(entries), entries[0] if entries else None
        headers: dict[bytes, bytes] = {}
        try:
            for name, value in self._decoder.decode(block, raw=True):
                headers[name] = headers[name] + b", " + value if name in headers else value
        except HPACKError as error:
            raise Broken(Code.COMPRESSION_ERROR, f"headers that cannot be decoded: {error}") from error
        entries = self._decoder.header_table.dynamic_entries
        changed = len(entries) != count or (entries[0] if entries else None) is not newest
        if changed or (block and block[0] & 0xE0 == 0x20):  # the latter resizes the table
            self._known.clear()
        elif len(self._known) < KEPT_BLOCKS:
            self._known[block] = headers
        return headers
