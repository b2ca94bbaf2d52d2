"""A generator in a process of its own: what ``generate`` starts there, and calls for each run."""

from __future__ import annotations

import asyncio
import gc
import signal
from typing import Any

import msgspec
import numpy as np

from hasten.isolation import Reply, report_progress
from hasten.load.clock import SPIN_S, precise_loop
from hasten.load.pace import Course, Pace
from hasten.load.payloads import Payload
from hasten.load.recorder import ints, phases_told
from hasten.load.run import STOPPED
from hasten.load.sender import Sender, make_sender
from hasten.load.target import Target
from hasten.tensors import Array


class LoadWorker:
    """Sends one generator's part of each run to one target. Its loop, its connections and payloads stay."""

    def __init__(self, target: str, *, alone: bool) -> None:
        self._target = read_target(target)
        self._loop: asyncio.AbstractEventLoop = precise_loop(spin_s=SPIN_S if alone else 0.0)
        self._payloads: list[Payload] = []
        self._sender: Sender | None = None

    def reach(self, rows: int, arrays: dict[str, Array]) -> None:
        """Take the payloads (``pack``) and reach the target. Raises NoAnswer and what else ``Sender.open`` does."""
        self._payloads = unpack(arrays, rows)
        self._sender = make_sender(self._target, self._payloads, self._loop)
        self._loop.run_until_complete(self._sender.open())
        gc.collect()
        gc.freeze()  # what is here by now stays: no collection need look at it again

    def run(self, arrays: dict[str, Array], **course: int) -> Reply:
        """Run one ``Course`` whose ``due_ns`` and ``samples`` are the arrays.

        Gives the columns of ``Requests`` that are known here, why it was cut short, and the reasons of failures.
        """
        assert self._sender is not None  # noqa: S101 - reach() comes first
        due = np.asarray(arrays["due_ns"], np.int64)
        told = Course(due_ns=due, samples=np.asarray(arrays["samples"], np.int64), **course)
        pace = Pace(told, self._sender, self._loop, _tell)
        self._loop.add_signal_handler(signal.SIGINT, pace.stop, STOPPED)
        try:
            self._loop.run_until_complete(pace.go())
        finally:
            self._loop.remove_signal_handler(signal.SIGINT)
        reasons = dict(pace.recorder.reasons)
        return Reply({"cut_short": pace.cut_short, "reasons": reasons}, self._columns(pace))

    def _columns(self, pace: Pace) -> dict[str, Array]:
        recorder, n = pace.recorder, len(pace.scheduled)
        sample = np.full(n, -1, np.int64)
        sample[: len(pace.sample)] = ints(pace.sample, len(pace.sample))
        rows = np.array([payload.rows for payload in self._payloads], np.int64)
        n_bytes = np.array([payload.n_bytes for payload in self._payloads], np.int64)
        phases, batch_rows, instance = phases_told(recorder.told[:n])
        scheduled, sent = ints(pace.scheduled, n), ints(recorder.sent, n)
        return {
            "scheduled_ns": scheduled,
            "sent_ns": sent,
            "first_ns": ints(recorder.first, n),
            "done_ns": ints(recorder.done, n),
            "outcome": ints(recorder.outcome, n),
            "status": ints(recorder.status, n),
            "rows": np.where(sample >= 0, rows[sample], rows[0]),
            "sample": sample,
            "sent_bytes": np.where(sample >= 0, n_bytes[sample], 0),
            "received_bytes": ints(recorder.received, n),
            "phases_ns": phases,
            "batch_rows": batch_rows,
            "instance": instance,
        }


def pack(payloads: tuple[Payload, ...]) -> dict[str, Array]:
    """Give payloads as arrays, for the way into a child process."""
    found: dict[str, Array] = {}
    for at, payload in enumerate(payloads):
        if isinstance(payload.data, bytes):
            found[f"{at}"] = np.frombuffer(payload.data, np.uint8)
        else:
            found |= {f"{at}/{name}": array for name, array in payload.data.items()}
    return found


def unpack(arrays: dict[str, Array], rows: int) -> list[Payload]:
    """Undo ``pack``; every payload has ``rows`` rows."""
    feeds: dict[int, Any] = {}
    for key, array in arrays.items():
        at, slash, name = key.partition("/")
        if slash:
            feeds.setdefault(int(at), {})[name] = array
        else:
            feeds[int(at)] = array.tobytes()
    return [Payload(feeds[at], rows) for at in sorted(feeds)]


def write_target(target: Target) -> str:
    """Write a target for the way into a child process, key and all: the pipe is private."""
    return msgspec.json.encode(target, enc_hook=str).decode()


def read_target(text: str) -> Target:
    """Undo ``write_target``."""
    return msgspec.json.decode(text, type=Target, dec_hook=lambda kind, value: kind(value))


def _tell(answered: int, missed: int, share: float) -> None:
    report_progress(f"{answered} {missed}", share)
