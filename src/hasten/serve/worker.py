"""Instances: threads that take batches from a model's line and run them.

The event loop puts requests into the line, an idle instance is woken by its bell, and the results go back with
``loop.call_soon_threadsafe``. ``Session.run`` releases the interpreter's lock, so threads scale as processes do, but
each return from it waits for a switch interval where another thread is busy in Python: hence ``SWITCH_INTERVAL_S``.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable

from hasten.errors import BuildFailed, ChildCrashed, HastenError, ServerFault
from hasten.serve.batching import Batch
from hasten.serve.call import Piece
from hasten.serve.joining import join
from hasten.serve.line import Line
from hasten.serve.news import Begun, Ended, News, Opened, Ran
from hasten.serve.patience import Patience
from hasten.serve.runner import Ahead, Outputs, Runner
from hasten.serve.warm import Warm

logger = logging.getLogger(__name__)

SWITCH_INTERVAL_S = 0.0005
"""For ``sys.setswitchinterval``, once in a server's process; Python's own 5 ms make an instance eight times slower."""

LEAD_NS = 2_000_000
"""How long before the predicted end of a run the next is begun, half the run at most: joining takes less than this."""

HUNG_EXIT = 70
"""What the process exits with where a run hangs on the event loop's own thread: EX_SOFTWARE of sysexits.h."""

LONGEST_WAIT_S = 3600.0
"""A bell that is not rung is looked at this often."""


Post = Callable[["Instance", News], None]
"""Tell the event loop; called from an instance's thread."""


class Instance:
    """One thread with one opened model. ``start`` it once.

    Args:
        number: Its number among the model's instances, from 0.
        line: Where it takes its batches.
        name: The thread's name.
        open_runner: Opens the model, in the instance's own thread.
        prepare: Warms and checks the model before the first batch; what it gives is told with ``Opened``.
        post: Tells the event loop.
        run_limit_ns: How long a run may take before it is said to hang.
    """

    def __init__(
        self,
        number: int,
        line: Line[Instance],
        *,
        name: str,
        open_runner: Callable[[], Runner],
        prepare: Callable[[Runner], Warm],
        post: Post,
        run_limit_ns: int = int(LONGEST_WAIT_S * 1e9),
    ) -> None:
        self.number = number
        self.line = line
        self.bell = threading.Lock()
        self.running: Batch[Piece] | None = None
        self.following: Batch[Piece] | None = None
        """What will run next, and was given to the runner already."""
        self.began_ns = 0
        self.leaves = False
        self.lent = False
        """Another thread runs its model."""
        self.look_s = min(run_limit_ns / 1e9, LONGEST_WAIT_S)
        """How often its thread looks, while it waits, after a run that another thread does with its model."""
        self._run_limit_ns = run_limit_ns
        self._patience = Patience()
        self._name = name
        self._open = open_runner
        self._prepare = prepare
        self._post = post
        self._runner: Runner | None = None
        self._own_thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread. It is a daemon: a run that hangs forever must not keep the process from ending."""
        self.bell.acquire()
        self._own_thread = threading.Thread(target=self._main, name=self._name, daemon=True)
        self._own_thread.start()

    @property
    def over(self) -> bool:
        """Its thread, which tells of its end a little before, holds on to nothing any more."""
        return self._own_thread is None or not self._own_thread.is_alive()

    @property
    def thread(self) -> int:
        """The system's number of the thread that runs its model, another process's where it runs there; 0: none yet."""
        own = 0 if self._own_thread is None else self._own_thread.native_id or 0
        return own if self._runner is None else self._runner.thread or own

    def tell(self, news: News) -> None:
        """Tell the event loop."""
        self._post(self, news)

    def kill(self) -> None:
        """End a run that hangs, where that is possible. From any thread."""
        if self._runner is not None:
            self._runner.kill()

    @property
    def lends(self) -> bool:
        """Its model may be run by another thread while its own waits."""
        return self._runner is not None and self._runner.lends

    def run_here(self, batch: Batch[Piece], idle_ns: int) -> Ran:
        """Run a batch in the calling thread; the instance was ``borrow``ed, and ``lends``."""
        if self._runner is None:
            raise BuildFailed("run", f"{self._name} is not open")
        return self._run(self._runner, batch, idle_ns)

    def left_ns(self, now_ns: int) -> int:
        """Give how long until the run under way is to be looked at, in nanoseconds; 0 or less: it hangs."""
        return self._patience.left_ns(self.began_ns, self._run_limit_ns, now_ns)

    def look_after(self, now_ns: int) -> float:
        """End the process where a run that the event loop does itself hangs: nobody else can end it, or answer.

        Gives the seconds after which to look again.
        """
        left_ns = self.left_ns(now_ns)
        if left_ns > 0:
            return left_ns / 1e9
        logger.critical(
            "a run of %s on the event loop's thread did not end within %g s, and the server with it; "
            "set isolation = 'process' in its deployment",
            self._name,
            self._run_limit_ns / 1e9,
        )
        logging.shutdown()
        os._exit(HUNG_EXIT)

    @property
    def batches(self) -> tuple[Batch[Piece], ...]:
        """What it runs and what follows. At the turn from one to the other a batch may be there twice."""
        return tuple(batch for batch in (self.running, self.following) if batch is not None)

    def alive(self) -> bool:
        """Say whether its runner can be used."""
        return self._runner is not None and self._runner.alive()

    def _main(self) -> None:
        try:
            self._runner = runner = self._open()
            found = self._prepare(runner)
        except HastenError as error:
            self._give_up(error)
            return
        except Exception as error:  # noqa: BLE001 - a plug-in's session may raise anything: who waits must be told
            self._give_up(BuildFailed("opening", _one_line(error)))
            return
        self.tell(Opened(found))
        while self._turn(runner):
            continue
        runner.close()
        self.tell(Ended(None))

    def _turn(self, runner: Runner) -> bool:
        """Wait for a batch and run it; False where the instance ends. An idle instance holds on to no request."""
        idle_ns = self.line.clock_ns()
        batch = self.line.take(self)
        if batch is None:
            return False
        if not runner.alive():
            self.line.back(self, batch)
            return False
        if runner.ahead is not None:
            return self._run_on(runner.ahead, self._begin(runner.ahead, batch, idle_ns))
        ran = self._run(runner, batch, idle_ns)
        self.running = None
        self.tell(ran)
        return not ran.lost

    def _run_on(self, runner: Ahead, begun: Begun) -> bool:
        """Finish a batch, and those that follow it: each is begun while the one before runs, where a whole one waits.

        False where the runner is lost. The batch that followed waits again then: a child answers a run before it begins
        the next, so that it was not begun.
        """
        while True:
            following = self._follow(runner, begun)
            ran = self._finish(runner, begun)
            if following is None:
                self.running = None
                self.tell(ran)
                return not ran.lost
            if ran.lost:
                self.tell(ran)
                self.line.back(self, following.batch)
                return False
            self.began_ns = ran.ended_ns  # before ``running``, as in ``take``
            self.running, self.following = following.batch, None
            self.tell(ran)
            begun = following.behind(ran.ended_ns)

    def _follow(self, runner: Ahead, begun: Begun) -> Begun | None:
        """Begin the next batch shortly before a run's end as predicted: until then it may still grow."""
        clock_ns = self.line.clock_ns
        expected_ns = self.line.batcher.costs.ns(begun.batch.size)
        left_ns = begun.joined_ns + expected_ns - min(LEAD_NS, expected_ns // 2) - clock_ns()
        if begun.fault is not None or runner.answers_within(max(left_ns, 0) / 1e9):
            return None
        batch = self.line.take_whole(self)
        return None if batch is None else self._begin(runner, batch, batch.closed_ns)

    def _begin(self, runner: Ahead, batch: Batch[Piece], idle_ns: int) -> Begun:
        joined_ns = batch.closed_ns
        try:
            feed = join(batch, runner.buffer, copy=True)
            joined_ns = self.line.clock_ns()
            runner.begin(feed)
        except ChildCrashed as error:
            return Begun(batch, idle_ns, joined_ns, fault=_gone(error), lost=True)
        except Exception as error:  # noqa: BLE001 - as in ``_run``
            return Begun(batch, idle_ns, joined_ns, fault=_failed(batch, error))
        return Begun(batch, idle_ns, joined_ns)

    def _finish(self, runner: Ahead, begun: Begun) -> Ran:
        outcome: Outputs | ServerFault | None = begun.fault
        lost = begun.lost
        try:
            if outcome is None:
                outcome = runner.finish()
        except ChildCrashed as error:
            outcome, lost = _gone(error), True
        except Exception as error:  # noqa: BLE001 - as in ``_run``
            outcome = _failed(begun.batch, error)
        return Ran(begun.batch, outcome, begun.idle_ns, begun.joined_ns, self.line.clock_ns(), lost)

    def _give_up(self, error: HastenError) -> None:
        if self._runner is not None:
            self._runner.close()
        self.tell(Ended(error))

    def _run(self, runner: Runner, batch: Batch[Piece], idle_ns: int) -> Ran:
        clock_ns = self.line.clock_ns
        joined_ns = batch.closed_ns
        outcome: Outputs | ServerFault
        lost = False
        try:
            feed = join(batch, runner.buffer, copy=runner.copies)
            joined_ns = clock_ns()
            outcome = runner.run(feed)
        except ChildCrashed as error:
            outcome, lost = _gone(error), True
        except Exception as error:  # noqa: BLE001 - whatever a plug-in's session raises fails its batch, not the instance
            outcome = _failed(batch, error)
        return Ran(batch, outcome, idle_ns, joined_ns, clock_ns(), lost)


def _gone(error: ChildCrashed) -> ServerFault:
    return ServerFault(f"the worker that ran this request is gone: {error}")


def _failed(batch: Batch[Piece], error: Exception) -> ServerFault:
    return ServerFault(f"the model failed on this batch of {batch.rows} rows: {_one_line(error)}")


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())[:500]
    return text if isinstance(error, HastenError) else f"{type(error).__name__}: {text}"
