"""What is known of the requests of one run while it goes on: columns that grow, filled by a sender as things happen.

Everything here runs on the event loop's thread. What can wait is left until the run is over: a server's timing is kept
as it came, and read then.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable
from time import perf_counter_ns

import numpy as np

from hasten.client.calls import numbers_of, phases_of
from hasten.load.run import OUTCOMES, PHASES, Ints

OK, REFUSED, TIMEOUT, ERROR, UNSENT = range(len(OUTCOMES))
GROW = 8192
LONGEST_TIMING_BYTES = 4096
MOST_REASONS = 32
"""Different texts of failures that are counted apart."""

Ended = Callable[[int], None]


class Recorder:
    """Columns of the requests, by index, in nanoseconds since ``began_ns`` of ``time.perf_counter_ns``.

    ``ended`` is called with the index of every request that has ended, however it did.
    """

    def __init__(self, *, began_ns: int, ended: Ended) -> None:
        self.began_ns = began_ns
        self.ended = ended
        self.sent = array("q")
        self.first = array("q")
        self.done = array("q")
        self.outcome = array("q")
        self.status = array("q")
        self.received = array("q")
        self.told: list[bytes | None] = []
        """What the server told of its phases, as it came."""
        self.answered = 0
        self.missed = 0
        self.unreached_ns = 0
        """Since when nothing was reached at that address; 0: the last attempt reached something."""
        self.unreached_last_ns = 0
        """When an attempt reached nothing last."""
        self.reasons: Counter[str] = Counter()

    def room(self, requests: int) -> None:
        """Make room for so many requests in all."""
        more = requests - len(self.sent)
        if more <= 0:
            return
        unknown = array("q", [-1]) * more
        for column in (self.sent, self.first, self.done, self.status):
            column.extend(unknown)
        self.outcome.extend(array("q", [UNSENT]) * more)
        self.received.extend(array("q", bytes(8 * more)))
        self.told.extend([None] * more)

    def let_go(self, index: int) -> None:
        """Note that a request leaves now."""
        self.sent[index] = perf_counter_ns() - self.began_ns

    def began(self, index: int) -> None:
        """Note that the first byte of an answer is here."""
        self.first[index] = perf_counter_ns() - self.began_ns

    def answer(self, index: int, outcome: int, status: int, received_bytes: int) -> None:
        """Note that the answer is here as a whole."""
        self.done[index] = perf_counter_ns() - self.began_ns
        self.outcome[index] = outcome
        self.status[index] = status
        self.received[index] = received_bytes
        self.reached()
        if outcome == OK:
            self.answered += 1
        else:
            self.missed += 1
        self.ended(index)

    def fail(self, index: int, reason: str, *, unreached: bool = False) -> None:
        """Note that there will be no answer; ``unreached``: nobody was there to give one."""
        self.outcome[index] = ERROR
        self.missed += 1
        if reason in self.reasons or len(self.reasons) < MOST_REASONS:
            self.reasons[reason] += 1
        if unreached:
            self.unreached_last_ns = perf_counter_ns()
            self.unreached_ns = self.unreached_ns or self.unreached_last_ns
        else:
            self.reached()
        self.ended(index)

    def reached(self) -> None:
        """Note that somebody is there: a connection was opened, or answered."""
        self.unreached_ns = 0

    def time_out(self, index: int) -> None:
        """Note that its time is over."""
        self.outcome[index] = TIMEOUT
        self.missed += 1
        self.ended(index)


def ints(column: array[int], requests: int) -> Ints:
    """Give the first entries of a column as an array of its own."""
    return np.frombuffer(column, np.int64)[:requests].copy()


def phases_told(told: list[bytes | None]) -> tuple[Ints, Ints, Ints]:
    """Read what servers told: phases [n, PHASES], rows of the batch [n] and instance [n]; -1: not told.

    ``name;dur=MILLISECONDS`` is a phase, as Server-Timing has it; ``rows;desc="N"`` and ``instance;desc="N"`` are ours.
    """
    phases = np.full((len(told), len(PHASES)), -1, np.int64)
    batch_rows = np.full(len(told), -1, np.int64)
    instance = np.full(len(told), -1, np.int64)
    places = {name: at for at, name in enumerate(PHASES)}
    for index, raw in enumerate(told):
        if raw is None or len(raw) > LONGEST_TIMING_BYTES:
            continue
        text = raw.decode("latin-1")
        for name, value_ns in phases_of(text).items():
            if name in places:
                phases[index, places[name]] = value_ns
        numbers = numbers_of(text)
        batch_rows[index] = numbers.get("rows", -1)
        instance[index] = numbers.get("instance", -1)
    return phases, batch_rows, instance
