"""Whether a request may come in: bounded queues, and refusal by the wait that it would have."""

from __future__ import annotations

from dataclasses import dataclass

from hasten.errors import DeadlineExceeded, Overloaded, ServeError
from hasten.serve.batching import NEVER, Batcher, E

LEAST_RETRY_S = 0.05
"""A client that was refused shall not come back in the same breath."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What may be inside at once; ``wait_ns``: the longest predicted time to an answer, or None."""

    rows: int
    n_bytes: int
    concurrency: int
    wait_ns: int | None = None


@dataclass(frozen=True, kw_only=True)
class Inside:
    """What is inside already: calls, instances that can run, and how long until the first of them is free."""

    calls: int
    instances: int
    free_ns: int = 0


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a request asks for."""

    rows: int
    n_bytes: int
    priority: int
    deadline_ns: int = NEVER


def predicted_ns(batcher: Batcher[E], asked: Asked, inside: Inside) -> int:
    """Estimate the time from now to the answer: t(n) of what goes before it, over the instances, and its own run."""
    largest = batcher.costs.largest
    full, rest = divmod(batcher.rows_ahead(asked.priority), largest)
    ahead = full * batcher.costs.ns(largest) + (batcher.costs.ns(rest) if rest else 0)
    own = -(-asked.rows // largest) * batcher.costs.ns(min(asked.rows, largest))
    return inside.free_ns + ahead // max(inside.instances, 1) + own


def refusal(batcher: Batcher[E], asked: Asked, *, limits: Limits, inside: Inside, now_ns: int) -> ServeError | None:
    """Say why the request may not come in, or None.

    One that finds an idle instance and an empty queue is never refused for its wait.
    """
    wait_ns = predicted_ns(batcher, asked, inside)
    retry_s = max(wait_ns / 1e9, LEAST_RETRY_S)
    if now_ns >= asked.deadline_ns:
        return DeadlineExceeded("its time was over when it arrived; give it a longer timeout")
    if inside.calls >= limits.concurrency:
        return _full("concurrency", f"{inside.calls} requests are inside, and {limits.concurrency} may be", retry_s)
    if batcher.rows + asked.rows > max(limits.rows, asked.rows):
        return _full("queue_full", f"{batcher.rows} rows wait, and {limits.rows} may", retry_s)
    if batcher.n_bytes + asked.n_bytes > max(limits.n_bytes, asked.n_bytes):
        return _full("queue_full", f"{batcher.n_bytes} bytes wait, and {limits.n_bytes} may", retry_s)
    if not batcher.rows and not inside.free_ns:
        return None
    if now_ns + wait_ns > asked.deadline_ns:
        return _full("deadline", f"it would take {wait_ns / 1e6:.1f} ms, which is beyond its timeout", retry_s)
    if limits.wait_ns is not None and wait_ns > limits.wait_ns:
        text = f"it would take {wait_ns / 1e6:.1f} ms, and the objective is {limits.wait_ns / 1e6:.1f} ms"
        return _full("predicted_wait", text, retry_s)
    return None


def _full(reason: str, text: str, retry_s: float) -> Overloaded:
    return Overloaded(f"{text}; try again in {retry_s:.2f} s", reason=reason, retry_after_s=retry_s)
