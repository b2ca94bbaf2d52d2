"""A scheduler that writes down what it was told, instead of scheduling anything."""

from __future__ import annotations


class Told:
    """``waits_ns``: how long a loop that yields may have to wait; 0: the system lets nobody yield."""

    def __init__(self, waits_ns: int = 4_000_000, *, insists: bool = True) -> None:
        self.said: list[object] = []
        self.given_ns: dict[int, int] = {}
        self.waits_ns = waits_ns
        self.works = insists

    def yields(self, slice_ns: int) -> int:
        self.said.append(slice_ns)
        return self.waits_ns

    def insists(self) -> bool:
        self.said.append("no more")
        return self.works

    def gives(self, thread: int, slice_ns: int) -> None:
        self.given_ns[thread] = slice_ns
