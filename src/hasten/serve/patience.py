"""When something that runs is said to hang."""

from __future__ import annotations

LAST_LOOK_NS = 1_000_000_000
"""How long what is over its time is given yet, from when that was seen."""


class Patience:
    """Looks at something that runs again and again, and says when it hangs.

    It is looked at twice, a second apart, after its time: a process that was stopped for a while, in the middle of a
    run, does not hang, and what it hears first when it goes on may be the clock.
    """

    __slots__ = ("_began_ns", "_until_ns")

    def __init__(self) -> None:
        self._began_ns = self._until_ns = 0
        """When the run began that was found over its time, and until when it has."""

    def left_ns(self, began_ns: int, limit_ns: int, now_ns: int) -> int:
        """Give how long until a run is to be looked at again, in nanoseconds; 0 or less: it hangs.

        Args:
            began_ns: When the run under way began.
            limit_ns: How long it may take.
            now_ns: The time, of the same clock.
        """
        left_ns = began_ns + limit_ns - now_ns
        if left_ns > 0:
            return left_ns
        if self._began_ns != began_ns:
            self._began_ns, self._until_ns = began_ns, now_ns + LAST_LOOK_NS
        return self._until_ns - now_ns
