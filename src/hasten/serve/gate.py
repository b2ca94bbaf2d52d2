"""A model's gate: whether a request may come in, by what waits, by what runs, and by how late answers have been."""

from __future__ import annotations

from typing import Any, Final, Protocol

from hasten.errors import Overloaded, ServeError
from hasten.serve.admission import Asked, Inside, Limits, Margin, queued_ns, refusal
from hasten.serve.batching import NEVER
from hasten.serve.call import Call
from hasten.serve.line import Line
from hasten.serve.turns import Turns

UNSEEN_SHARE: Final = 4
"""One in so many parts of a limit is what a request counts at most for a wait that nobody saw."""


class Runs(Protocol):
    """The instances, as the gate needs them."""

    @property
    def calls(self) -> int:
        """Calls that have not ended."""

    @property
    def ready(self) -> int:
        """Instances that take batches."""

    def free_ns(self, now_ns: int) -> int:
        """Say how long until one of them is free."""


class Shut:
    """What was said to the last that was refused for its wait: others would be told the same for a while.

    It holds for those of its ``priority`` and less urgent ones: until ``until_ns`` for any, and until ``turn_until_ns``
    for those that were read in the same turn of the loop, and have waited as long to be.
    """

    def __init__(
        self, text: str, retry_s: float, priority: int, until_ns: int, turn_ns: int, turn_until_ns: int
    ) -> None:
        self.text = text
        self.retry_s = retry_s
        self.priority = priority
        self.until_ns = until_ns
        self.turn_ns = turn_ns
        self.turn_until_ns = turn_until_ns

    def error(self) -> Overloaded:
        """Say it once more. One that is raised belongs to one request: it holds on to what it passed."""
        return Overloaded(self.text, reason="predicted_wait", retry_after_s=self.retry_s)


class Gate:
    """Asked for each request; told of each answer. On the event loop's thread alone.

    It does not keep the instances, which keep it: a version that has gone leaves nothing to the collector.
    """

    def __init__(self, line: Line[Any], *, limits: Limits, turns: Turns) -> None:
        self.margin = Margin()
        self._line = line
        self._limits = limits
        self._turns = turns
        self._shut: Shut | None = None

    def admit(self, runs: Runs, call: Call, n_bytes: int, deadline_ns: int, now_ns: int) -> ServeError | None:
        """Say why a call, whose rows are counted and not divided yet, may not come in, or None."""
        limits, batcher, rows = self._limits, self._line.batcher, call.rows
        limit_ns, refused = limits.wait_ns, None
        roomy = (
            runs.calls < limits.concurrency
            and batcher.rows + rows <= limits.rows
            and batcher.n_bytes + n_bytes <= limits.n_bytes
        )
        if roomy and deadline_ns == NEVER and limit_ns is None:
            return None  # the usual case: nothing to predict
        free_ns, expected_ns = self._predicted_ns(runs, rows, call.priority, now_ns)
        wait_ns = int(expected_ns * self.margin.factor)
        in_time = now_ns + wait_ns < deadline_ns and (limit_ns is None or self._waited_ns(now_ns) + wait_ns <= limit_ns)
        if not (roomy and in_time):  # what exactly is in the way, if anything
            asked = Asked(rows=rows, n_bytes=n_bytes, priority=call.priority, deadline_ns=deadline_ns)
            refused = self._judge(runs, asked, now_ns, free_ns, expected_ns)
        if refused is None and limit_ns is not None and self.margin.concerns(expected_ns, limit_ns):
            call.expected_ns, call.admitted_ns = expected_ns, now_ns
        return refused

    def refused(self, runs: Runs, asked: Asked, now_ns: int, *, keeps: bool = True) -> ServeError | None:
        """Say why what is asked for may not come in, or None.

        ``keeps``: it would come in now, so that what it is told may be told to others.
        """
        shut = self.shut(asked.priority, now_ns)
        if shut is not None:
            return shut
        free_ns, expected_ns = self._predicted_ns(runs, asked.rows, asked.priority, now_ns)
        return self._judge(runs, asked, now_ns, free_ns, expected_ns, keeps=keeps)

    @property
    def is_open(self) -> bool:
        """Nobody was refused of whom others may be told."""
        return self._shut is None

    def shut(self, priority: int, now_ns: int) -> ServeError | None:
        """Say why nobody of this priority or a less urgent one may come in now, where that is known from the last.

        Without a look at the queue: where every third request is refused, that must cost next to nothing.
        """
        shut = self._shut
        if shut is None or priority < shut.priority:
            return None
        if now_ns < shut.until_ns or (now_ns < shut.turn_until_ns and self._turns.since_ns == shut.turn_ns):
            return shut.error()
        return None

    def open(self) -> None:
        """Something has ended, or left: who was refused before may come in now."""
        self._shut = None

    def _waited_ns(self, now_ns: int) -> int:
        """Say how long a request may have waited to be read.

        What it may have waited while the loop's thread yielded counts for a part of a short limit at most: it waited
        for nothing where a core was idle, and nobody knows.
        """
        turns, limit_ns = self._turns, self._limits.wait_ns
        seen_ns, unseen_ns = turns.waited_ns(now_ns), turns.maybe_ns
        return seen_ns + (unseen_ns if limit_ns is None else min(unseen_ns, limit_ns // UNSEEN_SHARE))

    def answered(self, call: Call) -> None:
        """Take in how long an answer took, where it was predicted; told of each piece, it hears of the last."""
        if call.expected_ns and call.over:
            self.margin.learn(self._line.clock_ns() - call.admitted_ns, call.expected_ns)

    def _predicted_ns(self, runs: Runs, rows: int, priority: int, now_ns: int) -> tuple[int, int]:
        """Estimate the time until an instance is free, and the time to the answer."""
        with self._line.lock:
            free_ns = runs.free_ns(now_ns)
            return free_ns, free_ns + queued_ns(self._line.batcher, rows, priority, runs.ready)

    def _judge(
        self, runs: Runs, asked: Asked, now_ns: int, free_ns: int, expected_ns: int, *, keeps: bool = True
    ) -> ServeError | None:
        """Give what ``refused`` does, by the times that were predicted."""
        inside = Inside(calls=runs.calls, instances=runs.ready, free_ns=free_ns)
        with self._line.lock:
            refused = refusal(
                self._line.batcher,
                asked,
                limits=self._limits,
                inside=inside,
                now_ns=now_ns,
                wait_ns=int(expected_ns * self.margin.factor),
                waited_ns=self._waited_ns(now_ns),
            )
            if keeps and isinstance(refused, Overloaded) and refused.reason == "predicted_wait":
                self._shut_for(asked.priority, inside, now_ns, refused)
        return refused

    def _shut_for(self, priority: int, inside: Inside, now_ns: int, refused: Overloaded) -> None:
        """Keep a refusal for as long as a single row would be refused too, if nothing ended meanwhile."""
        queued = queued_ns(self._line.batcher, 1, priority, inside.instances)
        factor, turns = self.margin.factor, self._turns
        over_ns = int((inside.free_ns + queued) * factor) - (self._limits.wait_ns or 0)
        self._shut = Shut(
            str(refused),
            refused.retry_after_s,
            priority,
            now_ns + int(over_ns / factor),
            turns.since_ns,
            now_ns + int((over_ns + self._waited_ns(now_ns)) / factor),
        )
