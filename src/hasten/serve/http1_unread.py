"""What a client has still to read of its answers, looked at from time to time: one that reads on is waited for."""

from __future__ import annotations


class Unread:
    """The bytes that were left to read at a time, and those that were written since."""

    __slots__ = ("_left_bytes", "_since_s")

    def __init__(self, left_bytes: int, since_s: float) -> None:
        self._left_bytes = left_bytes
        self._since_s = since_s

    def add(self, n_bytes: int) -> None:
        """Count what is written behind them."""
        self._left_bytes += n_bytes

    def shrinks(self, left_bytes: int, now_s: float, rate: float) -> bool:
        """Say whether ``left_bytes`` are left now because the client read ``rate`` bytes per second or more."""
        return 0 < left_bytes <= self._left_bytes - rate * (now_s - self._since_s)
