"""Who waits for an answer in a transport: told of it once, and then that it has gone out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from time import perf_counter_ns

from hasten.errors import ServeError
from hasten.protocol.messages import InferRequest, InferResponse
from hasten.serve.service import Service
from hasten.serve.ticket import Marks


class Answering(ABC):
    """What is known of a request while it is answered: the service's ``done``, and a connection's ``Waiter``.

    One object for both: what is made for each request is made often, with cold caches.
    """

    def __init__(self, service: Service, wanted: InferRequest, marks: Marks) -> None:
        self.service = service
        self.wanted = wanted
        self.marks = marks
        self.response: InferResponse | None = None
        """The answer, once there is one."""

    def __call__(self, outcome: InferResponse | ServeError) -> None:
        """See ``answer``. It stands here: mypyc 2.4 crashes where only a subclass can be called."""
        self.answer(outcome)

    @abstractmethod
    def answer(self, outcome: InferResponse | ServeError) -> None:
        """Tell the client what became of its request."""

    def sent(self) -> None:
        """The answer was handed to the socket."""
        self.marks.ns[9] = perf_counter_ns()
        if self.response is not None:
            self.service.sent(self.response, self.marks)
