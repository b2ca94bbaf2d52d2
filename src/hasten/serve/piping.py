"""Requests through the steps of a deployment: prepared in threads, run by the model, finished in threads.

The life of such a request: it is checked against what clients see, bounded, its rows are prepared in a thread, and then
it is one of the model's requests like any other, so that images of any size share batches. Its answer goes through the
steps after the model, in a thread again. What is wrong with a row fails its own request alone. Requests wait for a
thread as they wait for the model: by priority, then by when they are due, and none beyond its deadline.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from hasten.deployment import Serving
from hasten.errors import (
    BadRequest,
    Cancelled,
    DeadlineExceeded,
    ModelNotReady,
    Overloaded,
    ServeError,
    ServerFault,
    TooLarge,
)
from hasten.protocol.messages import InferRequest
from hasten.serve.admission import LEAST_RETRY_S, Asked
from hasten.serve.batching import NEVER
from hasten.serve.call import Call
from hasten.serve.intake import Intake, TakenIn, content_bytes
from hasten.serve.patience import LAST_LOOK_NS, Patience
from hasten.serve.runner import Outputs
from hasten.serve.step_threads import StepThreads, Turn
from hasten.serve.surroundings import Surroundings
from hasten.serve.ticket import Done, Marks, Ticket
from hasten.steps.pipeline import ROWS, Pipeline
from hasten.tensors import Array, Feed

logger = logging.getLogger(__name__)

ROW_WEIGHT = 0.125
"""Share of a new time in the running average of what preparing a row takes."""

OUTLIER = 4.0
"""A row that took longer than this many averages (a huge picture, a first import) counts as this many."""

LATE = "its time was over before its steps were done; give it a longer timeout"
STUCK = "all threads for its steps hang; see what its steps do, and restart the server"


@dataclass(frozen=True, kw_only=True)
class Stations:
    """What a model does for a request with steps, on the event loop's thread."""

    taken: Callable[[], bool]
    """It takes requests."""
    enter: Callable[[Call, TakenIn, int], None]
    """Let a prepared call wait for its run, or fail it."""
    left: Callable[[Call], None]
    """A call has left the model's queue."""
    answer: Callable[[Call, Outputs | ServeError], None]
    """End a call: count it, and tell its client."""
    refused: Callable[[Asked, int], ServeError | None]
    """Say why the model would not take it now, or would answer too late."""
    time_ns: Callable[[InferRequest], int | None]
    """The time after its arrival from which an answer is of no use."""


@dataclass(frozen=True, kw_only=True)
class Served:
    """The model that the steps are around."""

    name: str
    version: str
    serving: Serving


class Piped:
    """One request on its way through steps: its ticket. ``seen_ns`` is a step's thread's; the rest is the loop's."""

    __slots__ = (
        *("began_ns", "call", "deadline_ns", "entered_ns", "left", "limit", "n_bytes", "patience", "rows", "seen_ns"),
        "turn",
    )

    def __init__(self, call: Call, *, rows: int, n_bytes: int, deadline_ns: int) -> None:
        self.call = call
        self.rows = rows
        self.n_bytes = n_bytes
        self.deadline_ns = deadline_ns
        self.began_ns = 0
        """When its first row was begun."""
        self.seen_ns = 0
        """When a thread was last seen to begin a row, or its answer; 0: none is at work on it."""
        self.entered_ns = 0
        """When it was prepared, and entered the model's queue."""
        self.turn: Turn | None = None
        """Among those that wait for a thread to prepare or to finish them."""
        self.limit: asyncio.TimerHandle | None = None
        """Ends it at its deadline while steps have it; the model does so itself."""
        self.left = False
        self.patience = Patience()

    def cancel(self) -> None:
        """The client has left: ``done`` is not called any more."""
        self.left = True
        self.call.cancel()


class Piping:
    """The steps of one model, running. On the event loop's thread."""

    def __init__(
        self, model: Served, pipeline: Pipeline, *, intake: Intake, stations: Stations, around: Surroundings
    ) -> None:
        self.threads = StepThreads(model.name, max(1, around.cores), starting=around.bursts.paused)
        self._model = model
        self._pipeline = pipeline
        self._outer = Intake(pipeline.signature, ROWS, as_bytes=True)
        self._inner = intake
        self._stations = stations
        self._around = around
        self._inside: dict[Call, Piped] = {}
        self._at_work: set[Piped] = set()
        """Handed to a thread that has not told what came of it, also where the client has left meanwhile."""
        self._waiting_rows = 0
        self._waiting_bytes = 0
        self._rows_at: Counter[int] = Counter()
        """The rows that wait or are prepared, by priority."""
        self._row_ns = 0.0
        self._watch: asyncio.TimerHandle | None = None
        self._emptied = asyncio.Event()
        self._emptied.set()

    def submit(self, request: InferRequest, marks: Marks, done: Done) -> Ticket:
        """Take a request in; see ``Infers.submit``."""
        now_ns = self._around.clock_ns()
        if not marks.ns[2]:
            marks.ns[2] = now_ns
        priority = request.priority or self._model.serving.priority
        call = Call(request, marks, done, priority, self._through)
        try:
            if not self._stations.taken():
                raise ModelNotReady(f"version {self._model.version} of model {self._model.name!r} takes no requests")
            taken = self._outer.take(request)
            piped = self._admitted(call, taken, now_ns)
        except ServeError as error:
            call.fail(error)
            return call
        self._inside[call] = piped
        self._emptied.clear()
        if self._watch is None:
            self._arm()
        self._waiting_rows += piped.rows
        self._waiting_bytes += piped.n_bytes
        self._rows_at[priority] += piped.rows
        if self._pipeline.pre:
            self._queue(piped, taken.feed, now_ns)
        else:
            piped.began_ns = now_ns
            self._prepared(piped, dict(taken.feed))
        return piped

    @property
    def inside(self) -> int:
        """Requests that have not ended."""
        return len(self._inside)

    async def emptied(self) -> None:
        """Wait until no request is inside, the model's part included."""
        await self._emptied.wait()

    def close(self) -> None:
        """Fail what is inside and let the threads end."""
        for piped in list(self._inside.values()):
            self._fail(piped, ModelNotReady(f"model {self._model.name!r} was unloaded before this request was done"))
        self.threads.close()
        if self._watch is not None:
            self._watch.cancel()

    def _admitted(self, call: Call, taken: TakenIn, now_ns: int) -> Piped:
        """Bound a request before a byte is decoded.

        Raises:
            TooLarge: it alone would take more than the queue may. ServeError: there is no room, or no time, now.
        """
        serving, rows = self._model.serving, taken.rows
        n_bytes = sum(content_bytes(array) for array in taken.feed.values())
        after = rows * self._pipeline.row_bytes
        if rows > serving.queue_rows or max(n_bytes, after) > serving.queue_bytes:
            raise TooLarge(
                f"{rows} rows of {n_bytes} bytes become {after} bytes; at most {serving.queue_rows} rows and "
                f"{serving.queue_bytes} bytes are taken: send fewer at once"
            )
        if self.threads.stuck:
            raise ServerFault(STUCK)
        time_ns = self._stations.time_ns(call.request)
        deadline_ns = NEVER if time_ns is None else call.marks.ns[2] + time_ns
        ahead = sum(waiting for level, waiting in self._rows_at.items() if level <= call.priority)
        before_ns = int(self._row_ns * (ahead + rows) / self.threads.count)
        retry_s = max(before_ns / 1e9, LEAST_RETRY_S)
        full = (
            ("concurrency", len(self._inside) >= serving.concurrency),
            ("queue_full", self._waiting_rows + rows > serving.queue_rows),
            ("queue_full", self._waiting_bytes + n_bytes + after > serving.queue_bytes),
        )
        for reason, is_so in full:
            if is_so and self._inside:
                text = f"{len(self._inside)} requests with {self._waiting_rows} rows wait for their steps"
                raise Overloaded(f"{text}; try again in {retry_s:.2f} s", reason=reason, retry_after_s=retry_s)
        asked = Asked(
            rows=rows,
            n_bytes=after,
            priority=call.priority,
            deadline_ns=deadline_ns,
            before_ns=before_ns if ahead else 0,  # behind nobody it is tried: that tells what a row takes now
        )
        refused = self._stations.refused(asked, now_ns)
        if refused is not None:
            raise refused
        return Piped(call, rows=rows, n_bytes=n_bytes + after, deadline_ns=deadline_ns)

    # before the model

    def _queue(self, piped: Piped, feed: Feed, now_ns: int) -> None:
        """Let a request wait for a thread: by priority, then by when it is due, and until its deadline."""
        call, objective_ms, due_ns = piped.call, self._model.serving.objective_ms, piped.deadline_ns
        if objective_ms is not None:
            due_ns = min(due_ns, call.marks.ns[2] + int(objective_ms * 1e6))
        self._at_work.add(piped)
        self._limit(piped, now_ns)
        piped.turn = self.threads.put(partial(self._prepare, piped, feed), (call.priority, due_ns))

    def _limit(self, piped: Piped, now_ns: int) -> None:
        """End it at its deadline, whatever its steps do."""
        if piped.deadline_ns < NEVER:
            left_s = max(piped.deadline_ns - now_ns, 0) / 1e9
            piped.limit = self._around.loop.call_later(left_s, self._fail, piped, DeadlineExceeded(LATE))

    def _prepare(self, piped: Piped, feed: Feed) -> None:
        """In a thread: run the steps before the model, and tell the loop what came of it."""
        clock_ns = self._around.clock_ns
        piped.began_ns = piped.seen_ns = clock_ns()

        def over() -> bool:
            piped.seen_ns = clock_ns()
            return piped.call.over or piped.seen_ns > piped.deadline_ns

        outcome: dict[str, Array] | ServeError
        try:
            outcome = self._pipeline.prepare(feed, over, self._model.serving.queue_bytes)
        except ServeError as error:
            outcome = error
        except (Exception, SystemExit) as error:  # noqa: BLE001 - a step of another's making may raise anything: who waits must be told
            outcome = _fault("before", error)
        if piped.seen_ns > piped.deadline_ns:
            outcome = DeadlineExceeded(LATE)
        self._tell(self._prepared, piped, outcome)

    def _prepared(self, piped: Piped, outcome: dict[str, Array] | ServeError) -> None:
        if self._pipeline.pre:
            if piped not in self._at_work:  # it was given up as hanging
                self.threads.found()
                return
            self._at_work.discard(piped)
        now_ns = self._around.clock_ns()
        self._release(piped)
        self._learn((now_ns - piped.began_ns) / piped.rows)
        piped.seen_ns, piped.entered_ns = 0, now_ns
        if piped.call.over:
            return
        if isinstance(outcome, ServeError):
            piped.call.fail(outcome)
            return
        try:
            taken = self._inner.fit(outcome)
        except BadRequest as error:
            piped.call.fail(error)
            return
        if self._model.serving.objective_ms is not None:  # its wait until now counts too
            asked = Asked(
                rows=taken.rows,
                n_bytes=taken.n_bytes,
                priority=piped.call.priority,
                deadline_ns=piped.deadline_ns,
                waited_ns=now_ns - piped.call.marks.ns[2],
            )
            refused = self._stations.refused(asked, now_ns)
            if refused is not None:
                piped.call.fail(refused)
                return
        self._stations.enter(piped.call, taken, now_ns)

    def _learn(self, ns: float) -> None:
        """Take in what preparing a row took."""
        known = self._row_ns
        self._row_ns += ROW_WEIGHT * ((min(ns, OUTLIER * known) if known else ns) - known)

    # after the model

    def _through(self, call: Call, outcome: Outputs | ServeError) -> None:
        """The model is done with a call, or it failed on its way: the call's ``finish``."""
        self._stations.left(call)
        piped = self._inside.get(call)
        if piped is None:  # refused at once
            self._stations.answer(call, outcome)
        elif isinstance(outcome, ServeError) or not self._pipeline.post:
            self._end(piped, outcome)
        else:
            self._at_work.add(piped)
            self._limit(piped, self._around.clock_ns())
            piped.turn = self.threads.put(partial(self._finish, piped, outcome))

    def _finish(self, piped: Piped, outputs: Outputs) -> None:
        """In a thread: run the steps after the model, and tell the loop what came of it."""
        piped.seen_ns = self._around.clock_ns()
        outcome: Outputs | ServeError
        try:
            outcome = self._pipeline.finish(outputs)
        except BadRequest as error:
            outcome = error
        except (Exception, SystemExit) as error:  # noqa: BLE001 - as before the model
            outcome = _fault("after", error)
        self._tell(self._finished, piped, outcome)

    def _finished(self, piped: Piped, outcome: Outputs | ServeError) -> None:
        if piped in self._at_work:
            self._at_work.discard(piped)
        else:
            self.threads.found()
        self._end(piped, outcome)

    def _end(self, piped: Piped, outcome: Outputs | ServeError) -> None:
        if self._inside.pop(piped.call, None) is None:
            return
        if not self._inside:
            self._emptied.set()
        if piped.turn is not None and self.threads.withdraw(piped.turn):
            self._at_work.discard(piped)
            if not piped.entered_ns:
                self._release(piped)
        self._unlimit(piped)
        _true_phases(piped)
        self._stations.answer(piped.call, Cancelled("the client has left") if piped.left else outcome)

    def _release(self, piped: Piped) -> None:
        """Give back the room that it took up until it was prepared."""
        priority = piped.call.priority
        self._waiting_rows -= piped.rows
        self._waiting_bytes -= piped.n_bytes
        self._rows_at[priority] -= piped.rows
        if not self._rows_at[priority]:
            del self._rows_at[priority]
        self._unlimit(piped)

    def _unlimit(self, piped: Piped) -> None:
        if piped.limit is not None:
            piped.limit.cancel()
            piped.limit = None

    def _fail(self, piped: Piped, error: ServeError) -> None:
        if piped.call.over:  # it is in the steps after the model
            self._end(piped, error)
        else:
            piped.call.fail(error)

    def _tell(
        self, what: Callable[[Piped, Outputs | ServeError], None], piped: Piped, outcome: Outputs | ServeError
    ) -> None:
        try:
            self._around.loop.call_soon_threadsafe(what, piped, outcome)
        except RuntimeError:  # the loop has ended, and with it everyone who could be told
            logger.debug("a step of model %r ended after its server", self._model.name)

    # steps that hang

    def _arm(self) -> None:
        again_s = min(self._model.serving.run_limit_ms / 2e3, LAST_LOOK_NS / 1e9)
        self._watch = self._around.loop.call_later(again_s, self._look)

    def _look(self) -> None:
        """End requests whose step hangs, and let another thread take the place of theirs."""
        limit_ns, now_ns = int(self._model.serving.run_limit_ms * 1e6), self._around.clock_ns()
        self._watch = None
        for piped in list(self._at_work):
            if piped.seen_ns and piped.patience.left_ns(piped.seen_ns, limit_ns, now_ns) <= 0:
                self._at_work.discard(piped)
                self.threads.lost()
                if not piped.entered_ns:
                    self._release(piped)
                self._fail(piped, ServerFault(f"a step did not end within {limit_ns / 1e9:g} s"))
        if self.threads.stuck:
            for piped in list(self._at_work):
                self._fail(piped, ServerFault(STUCK))
        if self._inside or self._at_work:
            self._arm()


def _true_phases(piped: Piped) -> None:
    """Move the marks so that phases are as long as they were: steps before the model ran before its queue.

    Phases are differences of neighbouring marks, in one order for every model: ``queue`` and ``batch_wait`` keep their
    lengths and the steps' time goes to ``pre``; waiting for a thread, before the model or after it, counts as
    ``queue``.
    """
    ns, began_ns, entered_ns = piped.call.marks.ns, piped.began_ns, piped.entered_ns
    if not ns[5] or not entered_ns:
        return
    queue_ns, wait_ns = max(ns[3] - entered_ns, 0), ns[4] - max(ns[3], entered_ns)
    ns[3] = began_ns + queue_ns
    ns[4] = ns[3] + wait_ns
    if piped.seen_ns > ns[6] > 0:  # when its steps after the model were begun
        late_ns = piped.seen_ns - ns[6]
        for mark in (3, 4, 5, 6):
            ns[mark] += late_ns


def _fault(where: str, error: BaseException) -> ServerFault:
    text = " ".join(str(error).split())[:300]
    return ServerFault(f"a step {where} the model failed: {type(error).__name__}: {text}")
