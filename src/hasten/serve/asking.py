"""One request to a deployment made of others: who is asked what, and how the answers become one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from hasten.composition import Cascade, Composition, Ensemble
from hasten.errors import BadRequest, Cancelled, DeadlineExceeded, ServeError, ServerFault
from hasten.protocol.messages import InferRequest, InferResponse, RequestedOutput, Tensor, TensorMetadata
from hasten.serve.runner import Clock
from hasten.serve.statistics import Statistics
from hasten.serve.surroundings import Members
from hasten.serve.ticket import Done, Marks, Ticket
from hasten.steps.confidence import confidence, shares
from hasten.steps.top_k import best
from hasten.tensors import Array

Numbers = npt.NDArray[np.int64]
Answers = dict[str, Array]
"""Outputs by name, each [rows, ...]."""


@dataclass(frozen=True, kw_only=True)
class Asks:
    """What every request of one composed deployment has in common."""

    composition: Composition
    members: Members
    clock_ns: Clock
    outputs: tuple[TensorMetadata, ...]
    version: str
    statistics: Statistics
    left: Callable[[Asking], None]


class Asking:
    """A request on its way: its ticket. ``begin`` once; it ends once. On the event loop's thread alone."""

    def __init__(self, asks: Asks, request: InferRequest, marks: Marks, done: Done) -> None:
        self._asks = asks
        self._request = request
        self._marks = marks
        self._done = done
        self._tickets: dict[int, Ticket] = {}
        self._over = False

    def begin(self) -> None:
        """Ask the first."""
        names = {tensor.name for tensor in self._asks.outputs}
        wanted = [output.name for output in self._request.outputs]
        if unknown := [name for name in wanted if name not in names]:
            self.end(BadRequest(f"the model has no output {unknown[0]!r}; it has {sorted(names)}"))
        elif not self._request.inputs or not self._request.inputs[0].shape:
            self.end(BadRequest("a request needs an input with an axis of rows"))
        else:
            self.start()

    def start(self) -> None:
        """Ask whom the kind of deployment asks first."""
        raise NotImplementedError

    def cancel(self) -> None:
        """The client has left: nobody is asked any more, and ``done`` is not called."""
        self.end(Cancelled("the client has left"))

    def end(self, outcome: Answers | ServeError) -> None:
        """End with an answer or without, and withdraw what members still have. Ending twice is fine."""
        if self._over:
            return
        self._over = True
        asks, marks = self._asks, self._marks
        for ticket in self._tickets.values():
            ticket.cancel()
        asks.left(self)
        marks.ns[7] = asks.clock_ns()
        if isinstance(outcome, ServeError):
            asks.statistics.failed(outcome, spent_ns=marks.ns[7] - marks.ns[2])
            if outcome.reason != "cancelled":
                self._done(outcome)
            return
        rows = len(next(iter(outcome.values())))
        asks.statistics.answered(marks, rows)
        self._done(self._response(outcome))

    def ask(self, member: int, inputs: tuple[Tensor, ...], outputs: tuple[str, ...]) -> None:
        """Ask a member about some rows; ``heard`` gets what it says."""
        asks, request, now_ns = self._asks, self._request, self._asks.clock_ns()
        left_us = request.timeout_us - (now_ns - self._marks.ns[2]) // 1000 if request.timeout_us else 0
        if request.timeout_us and left_us <= 0:
            self.end(DeadlineExceeded("its time was over before every member could be asked; give it a longer timeout"))
            return
        whom = asks.composition.members[member]
        asked = InferRequest(
            model=whom.name,
            version=whom.version,
            inputs=inputs,
            outputs=tuple(RequestedOutput(name=name) for name in outputs),
            priority=request.priority,
            timeout_us=left_us,
        )
        marks = Marks()
        marks.ns[0] = marks.ns[1] = marks.ns[2] = now_ns
        ticket = asks.members.submit(asked, marks, partial(self._hear, member, marks))
        if not self._over:
            self._tickets[member] = ticket

    def heard(self, member: int, answers: Answers) -> None:
        """Go on with what a member says."""
        raise NotImplementedError

    def answered(self) -> None:
        """Note that the last member has answered: what follows is ``post``."""
        ns = self._marks.ns
        ns[3] = ns[4] = ns[5] = ns[2]
        ns[6] = self._asks.clock_ns()

    def _hear(self, member: int, marks: Marks, outcome: InferResponse | ServeError) -> None:
        self._tickets.pop(member, None)
        if isinstance(outcome, InferResponse):
            marks.ns[8] = marks.ns[9] = marks.ns[7]
            self._asks.members.sent(outcome, marks)
        if self._over:
            return
        if isinstance(outcome, ServeError):
            self.end(outcome)
        else:
            try:
                self.heard(member, {tensor.name: tensor.data for tensor in outcome.outputs})
            except (KeyError, ValueError, IndexError) as error:
                name = self._asks.composition.members[member].name
                self.end(ServerFault(f"member {name!r} answers other tensors than when this was loaded: {error}"))

    def _response(self, answers: Answers) -> InferResponse:
        request = self._request
        kinds = {tensor.name: tensor.datatype for tensor in self._asks.outputs}
        names = [output.name for output in request.outputs] if request.outputs else list(kinds)
        return InferResponse(
            model=request.model,
            version=self._asks.version,
            outputs=tuple(Tensor(name=name, datatype=kinds[name], data=answers[name]) for name in names),
            id=request.id,
        )


class AskingEnsemble(Asking):
    """All members are asked at once."""

    def __init__(self, asks: Asks, request: InferRequest, marks: Marks, done: Done) -> None:
        super().__init__(asks, request, marks, done)
        self._scores: dict[int, Array] = {}

    def start(self) -> None:
        """Ask all."""
        for member in range(len(self._asks.composition.members)):
            if not self._over:
                self.ask(member, self._request.inputs, (self._asks.composition.how.scores,))

    def heard(self, member: int, answers: Answers) -> None:
        """Combine, once all have answered."""
        how = self._asks.composition.how
        self._scores[member] = answers[how.scores]
        if len(self._scores) == len(how.members) and isinstance(how, Ensemble):
            self.answered()
            self.end({how.scores: combined(how, [self._scores[at] for at in range(len(how.members))])})


class AskingCascade(Asking):
    """One member after the other is asked, about ever fewer rows."""

    def __init__(self, asks: Asks, request: InferRequest, marks: Marks, done: Done) -> None:
        super().__init__(asks, request, marks, done)
        self._open: Numbers = np.arange(
            len(request.inputs[0].data) if request.inputs and request.inputs[0].shape else 0
        )
        self._answers: Answers = {}
        self._by: Numbers = np.zeros(len(self._open), np.int64)

    def start(self) -> None:
        """Ask the first about every row."""
        self.ask(0, self._request.inputs, self._names())

    def heard(self, member: int, answers: Answers) -> None:
        """Keep what a member says of its rows, and ask the next about those that it is not sure of."""
        how = self._asks.composition.how
        for name, array in answers.items():
            kept = self._answers.setdefault(name, np.empty((len(self._by), *array.shape[1:]), array.dtype))
            kept[self._open] = array
        self._by[self._open] = member
        if member < len(how.members) - 1 and isinstance(how, Cascade):
            sure = confidence(answers[how.scores], how.confidence, logits=how.softmax)
            self._open = self._open[sure < how.thresholds[member]]
            if len(self._open):
                inputs = tuple(
                    Tensor(name=t.name, datatype=t.datatype, data=t.data[self._open], parameters=t.parameters)
                    for t in self._request.inputs
                )
                self.ask(member + 1, inputs, self._names())
                return
        self.answered()
        self.end({**self._answers, self._asks.outputs[-1].name: self._by})

    def _names(self) -> tuple[str, ...]:
        return tuple(tensor.name for tensor in self._asks.outputs[:-1])


def combined(how: Ensemble, scores: list[Array]) -> Array:
    """Give the scores [rows, classes] of an ensemble for those of its members, in float32."""
    each = np.stack([shares(array, logits=how.softmax) for array in scores])  # [members, rows, classes]
    if how.combine == "vote":
        return votes(best(each, 1)[..., 0], each.shape[2])
    weights = np.asarray(how.weights or [1.0] * len(scores), np.float64)
    mean: Array = np.tensordot(weights / weights.sum(), each, axes=1).astype(np.float32)
    return mean


def votes(chosen: Numbers, classes: int) -> Array:
    """Give the share of the votes [rows, classes] that each class got; ``chosen`` [members, rows] is who it was for."""
    counted = np.zeros((chosen.shape[1], classes))
    for its in chosen:
        counted[np.arange(len(its)), its] += 1
    return (counted / len(chosen)).astype(np.float32)
