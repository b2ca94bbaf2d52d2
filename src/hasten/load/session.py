"""Load on a deployment's own session, in the generator's process: what the model does with no server around it."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter_ns

from hasten.deployment import FILE, read_deployment
from hasten.engine import Engine, Session
from hasten.errors import HastenError
from hasten.load.payloads import Payload
from hasten.load.recorder import ERROR, OK, Recorder
from hasten.load.target import Target
from hasten.plan import Part, load_part
from hasten.tensors import Feed

Item = tuple[int, Feed]


class SessionSender:
    """A queue, and a thread for each session that takes from it. Requests are run one by one, never in batches."""

    def __init__(self, target: Target, payloads: Sequence[Payload], loop: asyncio.AbstractEventLoop) -> None:
        self._path = Path(target.url)
        self._instances = target.instances
        self._feeds = [payload.data for payload in payloads if not isinstance(payload.data, bytes)]
        self._loop = loop
        self._recorder = Recorder(began_ns=0, ended=lambda index: None)
        self._queue: queue.SimpleQueue[Item | None] = queue.SimpleQueue()
        self._live: set[int] = set()
        self._threads: list[threading.Thread] = []
        self._run = 0

    async def open(self) -> None:
        """Open the sessions and run each once. Raises HastenError: the deployment cannot be opened, and why."""
        file = self._path / FILE if self._path.is_dir() else self._path
        deployment, artifact = read_deployment(file)
        engine: Engine = load_part("engine", Part(deployment.engine, deployment.settings))
        for number in range(self._instances):
            session = engine.open(artifact)
            session.run(self._feeds[0])
            thread = threading.Thread(target=self._work, args=(session,), name=f"hasten-load-{number}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def begin(self, recorder: Recorder) -> None:
        """Tell this recorder from now on."""
        self._live.clear()
        self._run += 1
        self._recorder = recorder

    def send(self, index: int, payload: int) -> None:
        """Put a request into the queue."""
        self._live.add(index)
        self._recorder.let_go(index)
        self._queue.put((index, self._feeds[payload]))

    def withdraw(self, index: int) -> None:
        """Drop a request; one that runs goes on, and nobody hears of it."""
        self._live.discard(index)

    def settle(self, recorder: Recorder) -> None:
        """All is known at once here."""

    def close(self) -> None:
        """End the threads. Closing twice is fine."""
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()
        self._threads.clear()

    def _work(self, session: Session) -> None:
        while (item := self._queue.get()) is not None:
            index, feed = item
            run = self._run
            if index not in self._live:
                continue
            began_ns, reason = perf_counter_ns(), None
            try:
                session.run(feed)
            except HastenError as error:
                reason = " ".join(str(error).split())[:200]
            self._loop.call_soon_threadsafe(self._ran, run, index, (began_ns, perf_counter_ns()), reason)
        session.close()

    def _ran(self, run: int, index: int, span_ns: tuple[int, int], reason: str | None) -> None:
        if run != self._run or index not in self._live:
            return
        self._live.discard(index)
        recorder = self._recorder
        if reason is not None:
            recorder.reasons[reason] += 1
            recorder.answer(index, ERROR, -1, 0)
            return
        began_ns, ended_ns = span_ns
        waited_ms = (began_ns - recorder.began_ns - recorder.sent[index]) / 1e6
        recorder.told[index] = b"queue;dur=%.6f, infer;dur=%.6f" % (waited_ms, (ended_ns - began_ns) / 1e6)
        recorder.first[index] = ended_ns - recorder.began_ns
        recorder.answer(index, OK, -1, 0)
