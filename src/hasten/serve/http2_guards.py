"""What an HTTP/2 connection is guarded by: a credit for frames that ask for nothing, and bounded header blocks."""

from __future__ import annotations

from collections.abc import Callable

from hpack import Decoder, HPACKError

from hasten.protocol.http2_frames import Broken, Code

CREDIT = 1000.0
"""Control frames that a connection may send ahead of its calls."""
CREDIT_PER_S = 100.0
CREDIT_PER_CALL = 4.0
"""What an answered call gives back: its window updates, and the ping with which a client measures its window."""
KEPT_BLOCKS = 64


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
