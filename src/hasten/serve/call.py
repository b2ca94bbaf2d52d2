"""One request on its way through a model: its pieces in the queue, and the parts of its answer."""

from __future__ import annotations

from collections.abc import Callable, Hashable

from hasten.errors import Cancelled, ServeError
from hasten.protocol.messages import InferRequest
from hasten.serve.batching import Entry
from hasten.serve.intake import TakenIn
from hasten.serve.joining import cut, glue
from hasten.serve.runner import Outputs
from hasten.serve.ticket import Done, Marks
from hasten.tensors import Feed

Finish = Callable[["Call", Outputs | ServeError], None]


class Piece(Entry):
    """The rows of a call that wait together; ``index`` is its place in the call."""

    def __init__(self, call: Call, index: int, feed: Feed, rows: int, key: Hashable, n_bytes: int) -> None:
        super().__init__(feed, rows, key, call.marks.ns[2], call.priority, n_bytes)
        self.call = call
        self.index = index


class Call:
    """A request that was taken in. It ends once: answered, failed or cancelled. On the event loop's thread alone.

    ``finish`` is told of its end, and what it ended with.
    """

    def __init__(self, request: InferRequest, marks: Marks, done: Done, priority: int, finish: Finish) -> None:
        self.request = request
        self.marks = marks
        self.done = done
        self.priority = priority
        self.finish = finish
        self.rows = 0
        self.pieces: tuple[Piece, ...] = ()
        self.over = False
        self.admitted_ns = 0
        """When it was let in, where its answer was predicted."""
        self.expected_ns = 0
        """From its admission to its answer, as predicted; 0: nobody asked."""
        self.withdraw: Callable[[Call], None] | None = None
        """Told once when the client has left: takes the pieces out of the queue."""
        self.parts: list[Outputs] = []
        """The outputs of the pieces that were run, where there are several."""
        self.left = 0
        """Pieces that have not been run."""

    def divide(self, taken: TakenIn, largest: int) -> None:
        """Make the pieces, whose number the caller has bounded: one, unless it has more rows than a run may have."""
        feed, rows, key, n_bytes = taken.feed, taken.rows, taken.key, taken.n_bytes
        self.rows = rows
        if rows <= largest:
            self.pieces = (Piece(self, 0, feed, rows, key, n_bytes),)
            self.left = 1
            return
        cuts = cut(feed, rows, largest)
        each = n_bytes // rows
        self.pieces = tuple([Piece(self, index, part, n, key, n * each) for index, (part, n) in enumerate(cuts)])
        self.parts = [{} for _ in cuts]
        self.left = len(cuts)

    def part(self, index: int, outputs: Outputs) -> None:
        """Take the outputs of a piece; the last one ends the call."""
        if self.over:
            return
        self.left -= 1
        if not self.parts:
            self._end(outputs)
            return
        self.parts[index] = outputs
        if not self.left:
            self._end(glue(self.parts))

    def fail(self, error: ServeError) -> None:
        """End without an answer; what still waits is withdrawn."""
        if self.over:
            return
        if self.withdraw is not None and len(self.pieces) > 1:
            self.withdraw(self)
        self._end(error)

    def cancel(self) -> None:
        """The client has left: ``done`` is not called any more."""
        if self.over:
            return
        if self.withdraw is not None:
            self.withdraw(self)
        self._end(Cancelled("the client has left"))

    def _end(self, outcome: Outputs | ServeError) -> None:
        self.over = True
        try:
            self.finish(self, outcome)
        except Exception:
            self.over = isinstance(outcome, ServeError)  # of an answer that cannot be told, the caller tells why
            raise
        self.pieces = ()  # they refer back to the call: nothing is left to the cyclic collector
