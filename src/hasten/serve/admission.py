"""Whether a request may come in: bounded queues, and refusal by the wait that it would have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from hasten.errors import DeadlineExceeded, Overloaded, ServeError
from hasten.serve.batching import NEVER, Batcher, E

LEAST_RETRY_S: Final = 0.05
"""A client that was refused shall not come back in the same breath."""


WITHIN: Final = 0.98
STEP: Final = 0.03
LARGEST_FACTOR: Final = 4.0
"""Of ``Margin``: the share of answers that stay below it, how far one answer moves it, and where it ends."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What may be inside at once; ``wait_ns``: the longest predicted time to an answer, or None."""

    rows: int
    n_bytes: int
    concurrency: int
    wait_ns: int | None = None


class Inside:
    """What is inside already: calls, instances that can run, and how long until the first of them is free."""

    def __init__(self, *, calls: int, instances: int, free_ns: int = 0) -> None:
        self.calls = calls
        self.instances = instances
        self.free_ns = free_ns


class Asked:
    """What a request asks for.

    ``before_ns``: how long others keep it from being prepared, and its own preparation; ``waited_ns``: how long it has
    been here.
    """

    def __init__(
        self,
        *,
        rows: int,
        n_bytes: int,
        priority: int,
        deadline_ns: int = NEVER,
        before_ns: int = 0,
        waited_ns: int = 0,
    ) -> None:
        self.rows = rows
        self.n_bytes = n_bytes
        self.priority = priority
        self.deadline_ns = deadline_ns
        self.before_ns = before_ns
        self.waited_ns = waited_ns


class Margin:
    """How many times longer than predicted answers take that were let in near the limit, followed live.

    A batch takes longer beside the event loop and other models than it did alone, so that a queue which is filled up to
    the objective by prediction is one of late answers. The factor below which a share ``WITHIN`` of them stays is
    tracked by stochastic approximation (Robbins and Monro 1951, doi:10.1214/aoms/1177729586): it rises with each answer
    above it, and falls with each below, in the proportion that leaves it where it belongs.
    """

    def __init__(self) -> None:
        self.factor = 1.0

    def concerns(self, expected_ns: int, limit_ns: int) -> bool:
        """Say whether an answer says something: far below the limit other things than the queue take most of the time.

        Near the limit is where the factor itself lets nobody past, or a factor that has grown would never fall again.
        """
        return 2 * self.factor * expected_ns >= limit_ns

    def learn(self, took_ns: int, expected_ns: int) -> None:
        """Take in how long an answer took that was expected to take ``expected_ns``, both from its admission."""
        step = STEP * (WITHIN if took_ns > self.factor * expected_ns else WITHIN - 1)
        self.factor = min(max(self.factor + step, 1.0), LARGEST_FACTOR)


def queued_ns(batcher: Batcher[E], rows: int, priority: int, instances: int) -> int:
    """Estimate the time to the answer from when an instance is free: t(n) of what goes before, and of its own rows."""
    costs = batcher.costs
    largest = costs.largest
    full, rest = divmod(batcher.rows_ahead(priority), largest)
    ahead = costs.ns(rest) if rest else 0
    if full:
        ahead += full * costs.ns(largest)
    own = costs.ns(rows) if rows <= largest else -(-rows // largest) * costs.ns(largest)
    return (ahead // instances if instances > 1 else ahead) + own


def refusal(
    batcher: Batcher[E],
    asked: Asked,
    *,
    limits: Limits,
    inside: Inside,
    now_ns: int,
    wait_ns: int,
    waited_ns: int = 0,
) -> ServeError | None:
    """Say why the request may not come in, or None.

    Its answer would take ``wait_ns`` from when it is prepared, and it has waited for ``waited_ns`` to be read.
    One that finds an idle instance and nothing that goes before it is never refused for its wait.
    """
    wait_ns, waited_ns = wait_ns + asked.before_ns, waited_ns + asked.waited_ns
    retry_s = max(wait_ns / 1e9, LEAST_RETRY_S)
    if now_ns >= asked.deadline_ns:
        return DeadlineExceeded("its time was over when it arrived; give it a longer timeout")
    if inside.calls >= limits.concurrency:
        return _full("concurrency", f"{inside.calls} requests are inside, and {limits.concurrency} may be", retry_s)
    if batcher.rows + asked.rows > max(limits.rows, asked.rows):
        return _full("queue_full", f"{batcher.rows} rows wait, and {limits.rows} may", retry_s)
    if batcher.n_bytes + asked.n_bytes > max(limits.n_bytes, asked.n_bytes):
        return _full("queue_full", f"{batcher.n_bytes} bytes wait, and {limits.n_bytes} may", retry_s)
    if not batcher.rows and not inside.free_ns and not asked.before_ns:
        return None
    if now_ns + wait_ns > asked.deadline_ns:
        return _full("deadline", f"it would take {wait_ns / 1e6:.1f} ms, which is beyond its timeout", retry_s)
    if limits.wait_ns is not None and waited_ns + wait_ns > limits.wait_ns:
        text = f"it would take {(waited_ns + wait_ns) / 1e6:.1f} ms, and the objective is {limits.wait_ns / 1e6:.1f} ms"
        return _full("predicted_wait", text, retry_s)
    return None


def _full(reason: str, text: str, retry_s: float) -> Overloaded:
    return Overloaded(f"{text}; try again in {retry_s:.2f} s", reason=reason, retry_after_s=retry_s)
