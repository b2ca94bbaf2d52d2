"""The instances of one model, seen from the event loop: requests in, results out, and a watch over both."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from hasten.errors import BuildFailed, DeadlineExceeded, HastenError, ModelNotReady, ServeError, ServerFault
from hasten.serve.admission import Asked, Limits
from hasten.serve.batching import NEVER
from hasten.serve.call import Call, Piece
from hasten.serve.gate import Gate
from hasten.serve.joining import split
from hasten.serve.line import Line
from hasten.serve.news import Dropped, Ended, News, Opened, Ran
from hasten.serve.runner import Outputs, Runner
from hasten.serve.surroundings import Surroundings
from hasten.serve.ticket import Marks
from hasten.serve.warm import Warm
from hasten.serve.worker import Instance

logger = logging.getLogger(__name__)

INLINE_NS = 100_000
"""A model whose longest run took no more at its warm-up is run on the event loop's thread. To hand a run over and be
told of its end costs 30 to 400 us (docs/decisions/0007); longer runs gain more from going on beside the loop."""

MOST_HELD: Final = 32
"""Answers that are written together at the most: the first of them waits for the last."""

COLD: Final = 2
"""Times ``INLINE_NS`` that a run may take that found the caches cold, beside requests: among them they will be warm."""

MUCH_LONGER: Final = 4
"""Times ``INLINE_NS`` that runs may take on average before they are handed over from then on."""
START_S = 120.0
"""A request waits no longer than this for the first worker that is started anew."""

THREAD_S = 0.001
"""What a thread takes, at most but for a busy machine, from its last word to its end."""

FIRST_RETRY_S = 0.1
LAST_RETRY_S = 10.0
"""A worker that cannot be replaced is tried again after these times, each twice the one before."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a pool runs and how.

    ``batched``: rows are axis 0 of every input and output; else a request is one run, as it is.
    ``prepare`` warms and checks a runner in its instance's thread.
    """

    name: str
    open_runner: Callable[[], Runner]
    prepare: Callable[[Runner], Warm]
    instances: int
    limits: Limits
    run_limit_ns: int
    limit_ns: int | None = None
    """After so long an answer is of no use: the deployment's objective, or its timeout where that is shorter."""
    batched: bool = True
    inline: bool = False
    """Runs that are short enough may be done on the event loop's thread."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """Who is told what happens: a run's times, and a worker's replacement."""

    ran: Callable[[Ran], None]
    restarted: Callable[[], None]


class Pool:
    """Runs calls on instances. Everything but ``_post`` on the event loop's thread."""

    def __init__(self, work: Work, line: Line[Instance], *, seen: Seen, around: Surroundings) -> None:
        self.work = work
        self.line = line
        self.calls = 0
        """Calls that have not ended."""
        self._seen = seen
        self._run_limit_ns = work.run_limit_ns
        self._loop, self._cork = around.loop, around.cork
        if work.limits.wait_ns is not None:
            around.turns.watch(around.loop)
        self._opening: dict[Instance, asyncio.Future[Warm] | None] = {}
        self._ready: set[Instance] = set()
        self._alone: set[Instance] = set()
        """Instances that hang: told to end, and no more ours."""
        self._retry_s = FIRST_RETRY_S
        self._closing = False
        self._ended: list[Instance] = []
        """Instances that have told of their end since ``close``: their threads are about to."""
        self._over = asyncio.Event()
        self._emptied = asyncio.Event()
        self._emptied.set()
        self._watch: asyncio.TimerHandle | None = None
        self._watch_ns = NEVER
        self._runs_here = False
        self._turn_due = False
        self._bursts = around.bursts
        self._behind = False
        """More waits than one batch."""
        self.gate = Gate(line, limits=work.limits, turns=around.turns)
        """Whether requests may come in."""

    @property
    def ready(self) -> int:
        """Instances that take batches."""
        return len(self._ready)

    async def start(self) -> list[Warm]:
        """Open and prepare the instances one after the other; give what ``prepare`` gave for each.

        Where runs are done on the event loop's thread one instance is all that is used: the others are opened once
        runs are handed over.

        Raises:
            HastenError: why the first that failed did; the others are told to end.
        """
        self._bursts.knows(self, self.work.limit_ns)
        found = []
        for _ in range(self.work.instances):
            opened: asyncio.Future[Warm] = self._loop.create_future()
            self._start_one(opened)
            try:
                found.append(await opened)
            except HastenError:
                self.close()
                raise
            if self._runs_here:
                break
        return found

    def admit(self, call: Call, n_bytes: int, deadline_ns: int, now_ns: int) -> ServeError | None:
        """Say why a call, whose rows are counted and not divided yet, may not come in, or None."""
        if not self._ready and not self._opening:
            return ModelNotReady(f"no worker of model {self.work.name!r} is ready; one is tried again")
        return self.gate.admit(self, call, n_bytes, deadline_ns, now_ns)

    def refused(self, asked: Asked, now_ns: int, *, keeps: bool = True) -> ServeError | None:
        """Say why what is asked for may not come in, or None; see ``Gate.refused``."""
        return self.gate.refused(self, asked, now_ns, keeps=keeps)

    def submit(self, call: Call, now_ns: int) -> None:
        """Let a call that was admitted wait for its run."""
        if not self.calls:
            self._emptied.clear()
        self.calls += 1
        call.withdraw = self._withdraw
        pieces = call.pieces
        if self._runs_here:
            self.line.put(pieces, now_ns, ring=False)
            if not self._turn_due:  # once everything that this turn of the loop reads has come
                self._turn_due = True
                self._loop.call_soon(self._turn)
        else:
            self.line.put(pieces, now_ns)
            if not self._behind and self.line.batcher.rows > self.line.batcher.costs.largest:
                self._behind = True
                self._bursts.begin()
        look_ns = now_ns + self._run_limit_ns
        if pieces[0].deadline_ns < look_ns:
            look_ns = pieces[0].deadline_ns
        if look_ns < self._watch_ns:
            self._arm(look_ns, now_ns)

    def ended(self, call: Call) -> None:
        """A call has ended, one way or another."""
        if call.withdraw is None:
            return
        call.withdraw = None
        self.calls = calls = self.calls - 1
        if not calls:
            self._emptied.set()

    async def emptied(self) -> None:
        """Wait until no call is inside."""
        await self._emptied.wait()

    async def over(self) -> None:
        """Wait, after ``close``, until every instance has ended, save those that hang."""
        await self._over.wait()
        while not all(instance.over for instance in self._ended):
            await asyncio.sleep(THREAD_S)  # no event tells of it, and another thread that waits would hold on to them
        self._ended.clear()

    def close(self) -> None:
        """Fail what is inside, let the instances end after the run they are in."""
        self._closing = True
        self._catch_up()
        self._bursts.forgets(self)
        self._check_over()
        self.line.close()
        if self._watch is not None:
            self._watch.cancel()
        with self.line.lock:
            left = self.line.batcher.empty()
        for piece in left:
            piece.call.fail(ModelNotReady(f"model {self.work.name!r} was unloaded while this request waited"))
        for instance in list(self._ready):
            for piece in _pieces_of(instance):
                piece.call.fail(ModelNotReady(f"model {self.work.name!r} was unloaded before this request was done"))

    def look(self, now_ns: int) -> None:
        """End calls whose time is over, replace instances that hang, and see when to look again."""
        if not self._ready:
            before_ns = now_ns - int(START_S * 1e9)
            self._fail_waiting(f"no worker of model {self.work.name!r} was ready within {START_S:g} s", before_ns)
        with self.line.lock:
            late = self.line.batcher.expire(now_ns)
        again_ns = NEVER
        for instance in list(self._ready):
            running = instance.running
            if running is None:
                if not instance.alive():
                    self._lose(instance)
                continue
            late += [piece for piece in _pieces_of(instance) if piece.deadline_ns <= now_ns]
            left_ns = instance.left_ns(now_ns)
            if left_ns <= 0:
                self._abandon(instance)
            else:
                again_ns = min(again_ns, now_ns + left_ns, *_deadlines(instance, now_ns))
        if late:
            self._eased()
        for piece in late:
            piece.call.fail(DeadlineExceeded("its time was over before it was answered; give it a longer timeout"))
        if self.calls:
            with self.line.lock:
                again_ns = min(again_ns, self.line.batcher.next_deadline_ns(), now_ns + self.work.run_limit_ns)
            self._arm(again_ns, now_ns)

    def _arm(self, when_ns: int, now_ns: int) -> None:
        if when_ns >= self._watch_ns or self._closing:
            return
        if self._watch is not None:
            self._watch.cancel()
        self._watch_ns = when_ns
        self._watch = self._loop.call_later(max(when_ns - now_ns, 0) / 1e9, self._wake)

    def _wake(self) -> None:
        self._watch, self._watch_ns = None, NEVER
        self.look(self.line.clock_ns())

    def free_ns(self, now_ns: int) -> int:
        """Say how long until an instance is free; while one is replaced, a whole run."""
        if self.line.idle():
            return 0
        costs, free_ns = self.line.batcher.costs, NEVER
        for instance in self._ready:
            running, following = instance.running, instance.following
            if running is None and following is None:
                continue
            left_ns = instance.began_ns - now_ns
            if running is not None:
                left_ns += costs.ns(running.size)
            if following is not None:
                left_ns += costs.ns(following.size)
            free_ns = min(free_ns, max(left_ns, 1))
        if free_ns == NEVER:
            return costs.ns(costs.largest) if not self._ready else 0
        return free_ns

    def _withdraw(self, call: Call) -> None:
        with self.line.lock:
            for piece in call.pieces:
                self.line.batcher.remove(piece)
        self._eased()

    def _start_one(self, opened: asyncio.Future[Warm] | None = None) -> None:
        work = self.work
        taken = {other.number for other in (*self._opening, *self._ready)}
        number = next(number for number in itertools.count() if number not in taken)
        instance = Instance(
            number,
            self.line,
            name=f"hasten {work.name}",
            open_runner=work.open_runner,
            prepare=work.prepare,
            post=self._post,
            run_limit_ns=work.run_limit_ns,
        )
        self._opening[instance] = opened
        with self._bursts.paused():
            try:
                instance.start()
            except (
                RuntimeError,
                MemoryError,
            ) as error:  # the system gives no thread now: it is tried again, as others are
                failed = Ended(BuildFailed("opening", f"no thread can be started: {error}"))
                self._loop.call_soon(self._hear, instance, failed)

    def _post(self, instance: Instance, news: News) -> None:
        try:
            self._loop.call_soon_threadsafe(self._hear, instance, news)
        except RuntimeError:
            if not self._loop.is_closed():
                raise
            # The server has ended, and with it everyone who could be told.

    def _turn(self) -> None:
        """Run what waits on this thread, as many batches as there are now; longer runs go to the instances."""
        self._turn_due = False
        self._cork.active = True
        try:
            self._take_turn()
        finally:
            self._cork.release()

    def _take_turn(self) -> None:
        line = self.line
        left = line.batcher.rows
        while left > 0:
            instance, taken = line.borrow() if self._runs_here else (None, None)
            if instance is None or taken is None:
                line.ring()  # an instance that comes free looks by itself
                return
            if taken.dropped:
                self._hear(instance, Dropped(tuple(taken.dropped)))
            batch = taken.batch
            if batch is None:
                return
            ran = instance.run_here(batch, batch.closed_ns)
            line.give_back(instance)
            left -= batch.rows
            self._answer(instance, ran)
            if self._cork.size >= MOST_HELD:
                self._cork.release()
                self._cork.active = True

    def _hear(self, instance: Instance, news: News) -> None:
        match news:
            case Ran():
                self._ran(instance, news)
            case Dropped():
                self._eased()
                for piece in news.pieces:
                    piece.call.fail(
                        DeadlineExceeded("its time would be over before it could be answered; it was not run")
                    )
            case Opened():
                self._opened(instance, news)
            case Ended():
                self._instance_ended(instance, news)

    def _ran(self, instance: Instance, ran: Ran) -> None:
        self._cork.active = True
        try:
            self._answer(instance, ran)
        finally:
            self._cork.release()

    def _eased(self) -> None:
        """Something has ended, or has left the queue: who was refused may come in, and what was behind may not be."""
        self.gate.open()
        if self._behind and self.line.batcher.rows <= self.line.batcher.costs.largest:
            self._catch_up()

    def _catch_up(self) -> None:
        if self._behind:
            self._behind = False
            self._bursts.end()

    def _answer(self, instance: Instance, ran: Ran) -> None:
        # A run that hung has ended: its calls have, long ago, and what it took is no time of t(n).
        ours = instance not in self._alone
        outcome, entries = ran.outcome, ran.batch.entries
        parts = outcome if isinstance(outcome, ServerFault) else self._parts(outcome, ran)
        if isinstance(parts, ServerFault):
            for piece in entries:
                piece.call.fail(parts)
        else:
            if ours:
                self._learn(ran)
            batch, number = ran.batch, instance.number
            size, closed_ns = batch.size, batch.closed_ns
            times_ns = (min(ran.idle_ns, closed_ns), closed_ns, ran.joined_ns, ran.ended_ns)
            for piece, part in zip(entries, parts, strict=True):
                call = piece.call
                if call.over:
                    continue
                marks = call.marks
                marks.rows, marks.instance = size, number
                _mark(marks, times_ns)
                try:
                    call.part(piece.index, part)
                    if call.expected_ns:
                        self.gate.answered(call)
                except Exception as error:  # a defect in telling one must not leave its batch-mates waiting
                    logger.exception("an answer of model %r could not be told", self.work.name)
                    why = f"its answer could not be put together: {type(error).__name__}: {error}"
                    call.fail(ServerFault(why))
        if ours:
            self._seen.ran(ran)
        self._eased()

    def _parts(self, outputs: Outputs, ran: Ran) -> Sequence[Outputs] | ServerFault:
        """Give each piece its outputs, or why that cannot be."""
        batch = ran.batch
        if not self.work.batched or (len(batch.entries) == 1 and batch.rows == batch.size):
            return [outputs]
        try:
            return split(outputs, batch)
        except ServerFault as fault:
            return fault

    def _learn(self, ran: Ran) -> None:
        """Take in what a run took; where runs have become too long for this thread, they are handed over."""
        size, took_ns, costs = ran.batch.size, ran.ended_ns - ran.joined_ns, self.line.batcher.costs
        costs.update(size, took_ns)
        too_long_ns = INLINE_NS * MUCH_LONGER
        if self._runs_here and took_ns > too_long_ns and costs.ns(size) > too_long_ns:
            self._runs_here = False
            while len(self._ready) + len(self._opening) < self.work.instances and not self._closing:
                self._start_one()

    def _opened(self, instance: Instance, news: Opened) -> None:
        waiter = self._opening.pop(instance)
        self._ready.add(instance)
        self._bursts.runs(instance.thread, news.found.least_ns)
        if waiter is not None:
            longest_ns = INLINE_NS * (COLD if news.found.beside else 1)
            self._runs_here = self.work.inline and instance.lends and news.found.least_ns <= longest_ns
        self._retry_s = FIRST_RETRY_S
        if waiter is not None and not waiter.done():
            waiter.set_result(news.found)

    def _instance_ended(self, instance: Instance, news: Ended) -> None:
        if instance in self._alone:
            self._alone.discard(instance)
            return
        self._bursts.rests(instance.thread)
        waiter = self._opening.pop(instance, None)
        self._ready.discard(instance)
        if self._closing:
            self._ended.append(instance)
        self._check_over()
        if waiter is not None and not waiter.done():
            waiter.set_exception(news.error or ModelNotReady(f"model {self.work.name!r} was unloaded"))
        if waiter is not None or self._closing:
            return
        if news.error is None:
            self._replace()
        else:
            logger.warning("a worker of model %r cannot be replaced: %s", self.work.name, news.error)
            self._loop.call_later(self._retry_s, self._replace)
            self._retry_s = min(2 * self._retry_s, LAST_RETRY_S)
            if not self._ready and not self._opening:
                self._fail_waiting(f"no worker of model {self.work.name!r} can be started: {news.error}", NEVER)

    def _abandon(self, instance: Instance) -> None:
        """Fail what a hanging instance runs, and put another in its place."""
        running = instance.running  # before its child is killed: then its thread puts back what follows
        self._lose(instance)
        seconds = self.work.run_limit_ns / 1e9
        for piece in () if running is None else running.entries:
            piece.call.fail(ServerFault(f"the worker did not answer within {seconds:g} s and was replaced"))

    def _fail_waiting(self, why: str, before_ns: int) -> None:
        """Fail what has waited since before a time: nobody hangs on workers that do not come back."""
        with self.line.lock:
            left = self.line.batcher.arrived_before(before_ns)
        if left:
            self._eased()
        for piece in left:
            piece.call.fail(ModelNotReady(why))

    def _lose(self, instance: Instance) -> None:
        self._ready.discard(instance)
        self._alone.add(instance)
        self._bursts.rests(instance.thread)
        self.line.leave(instance)
        instance.kill()
        self._replace()

    def _check_over(self) -> None:
        if self._closing and not self._ready and not self._opening:
            self._over.set()

    def _replace(self) -> None:
        if not self._closing:
            logger.warning("a worker of model %r has ended and is replaced", self.work.name)
            self._seen.restarted()
            self._start_one()


def _pieces_of(instance: Instance) -> list[Piece]:
    return [piece for batch in instance.batches for piece in batch.entries]


def _deadlines(instance: Instance, now_ns: int) -> list[int]:
    return [piece.deadline_ns for piece in _pieces_of(instance) if piece.deadline_ns > now_ns]


def _mark(marks: Marks, times_ns: tuple[int, int, int, int]) -> None:
    """Write the marks of queue to infer: begun with the request's first piece, ended with its last.

    ``times_ns``: the instance was idle, the batch was closed and joined, the run ended.
    """
    ns = marks.ns
    idle_ns, closed_ns, joined_ns, ended_ns = times_ns
    if ns[5]:
        ns[6] = max(ns[6], ended_ns)
        return
    decoded_ns = ns[2]
    if decoded_ns > idle_ns:
        idle_ns = decoded_ns if decoded_ns < closed_ns else closed_ns
        if decoded_ns > closed_ns:
            closed_ns = decoded_ns
    ns[3:7] = (idle_ns, closed_ns, joined_ns, ended_ns)
