"""What a transport and a service say to each other of one request: the marks of its phases, and its end.

The life of a request: received, decoded, admitted to a queue, taken into a batch, prepared, inferred, finished,
encoded, sent. Each mark is written once, by whoever reaches it, in nanoseconds of ``time.perf_counter_ns``; the phases
are the differences of neighbouring marks, so they add up to the total by construction.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Final, Protocol

from hasten.errors import ServeError
from hasten.protocol.messages import InferRequest, InferResponse
from hasten.protocol.phases import PHASES
from hasten.serve.traces import Trace

_NAMES: Final = tuple([b"%b%b;dur=" % (b", " if at else b"", name.encode()) for at, name in enumerate(PHASES[:-1])])
_SHORT_US: Final = 4096
_MILLISECONDS: Final = tuple([b"%.3f" % (us / 1000) for us in range(_SHORT_US)])
"""Texts of 0.000 ms and so on: to look one up is ten times faster than to write it."""
_WHOLE: Final = tuple([b"%d." % ms for ms in range(1024)])
_THOUSANDTHS: Final = tuple([b"%03d" % us for us in range(1000)])
"""Both halves of a longer time."""


TO_COME: Final = (0,) * (len(PHASES) - 1)
"""The marks of a request that is about to be decoded, behind its first two."""


class Counts(Protocol):
    """The figures of a model."""

    def sent(self, marks: Marks) -> None:
        """Count the phases of an answer that has gone out, all marks set."""


class Marks:
    """The times of one request. ``ns[k]`` is when phase k began; 0: it was not reached."""

    def __init__(self, ns: list[int] | None = None) -> None:
        self.ns = [0] * (len(PHASES) + 1) if ns is None else ns
        self.rows = 0
        """Of the batch that it ran in, padding included; of the last one where it was cut; 0: it did not run."""
        self.instance = 0
        """The number of the instance that ran it, from 0."""
        self.trace: Trace | None = None
        """Where it is traced."""
        self.counts: Counts | None = None
        """What counted its answer, and shall count its phases once it is sent."""

    def phases_ns(self) -> dict[str, int]:
        """Give the length of every phase that ended; one that was skipped (its mark is missing) has length 0."""
        found, before = {}, self.ns[0]
        for name, at in zip(PHASES, self.ns[1:], strict=True):
            found[name] = max(at - before, 0) if at else 0
            before = at or before
        return found

    def timing(self) -> bytes:
        """Give what the header Server-Timing says: the phases up to the encoding, in milliseconds, and where it ran.

        Marks are rounded, not lengths, so that these add up to the rounded total.
        """
        a, b, c, d, e, f, g, h, i, _ = self.ns
        names, place = _NAMES, _place(self.rows, self.instance)
        if a <= b <= c <= d <= e <= f <= g <= h <= i:  # written out: it is done for each answer
            b, c, d, e = (b - a) // 1000, (c - a) // 1000, (d - a) // 1000, (e - a) // 1000
            f, g, h, i = (f - a) // 1000, (g - a) // 1000, (h - a) // 1000, (i - a) // 1000
            if i < _SHORT_US:
                ms = _MILLISECONDS
                p, q, r, s = ms[b], ms[c - b], ms[d - c], ms[e - d]
                t, u, v, w = ms[f - e], ms[g - f], ms[h - g], ms[i - h]
            else:
                p, q, r, s = _text(b), _text(c - b), _text(d - c), _text(e - d)
                t, u, v, w = _text(f - e), _text(g - f), _text(h - g), _text(i - h)
            n, m, k, j = names[0], names[1], names[2], names[3]
            parts = [n, p, m, q, k, r, j, s, names[4], t, names[5], u, names[6], v, names[7], w, place]
            return b"".join(parts)
        parts, before = [], 0
        for at, name in enumerate(names, 1):  # a mark that is missing, or early, counts as the one before it
            us = max((self.ns[at] - a) // 1000, before)
            parts.append(name)
            parts.append(_text(us - before))
            before = us
        parts.append(place)
        return b"".join(parts)


def _text(us: int) -> bytes:
    """Give a time in milliseconds."""
    if us < _SHORT_US:
        return _MILLISECONDS[us]
    ms = us // 1000
    return (_WHOLE[ms] if ms < len(_WHOLE) else b"%d." % ms) + _THOUSANDTHS[us % 1000]


@lru_cache(maxsize=256)
def _place(rows: int, instance: int) -> bytes:
    return b', rows;desc="%d", instance;desc="%d"' % (rows, instance)


Done = Callable[[InferResponse | ServeError], None]
"""Called once, on the event loop's thread, with the answer or the reason that there is none."""


class Ticket(Protocol):
    """A request that was handed in."""

    def cancel(self) -> None:
        """The client has left: drop it if it still waits; its ``done`` is then not called any more. Idempotent."""


class Refused:
    """The ticket of a request that was not taken in."""

    def cancel(self) -> None:
        """It has ended already."""


REFUSED: Final = Refused()


class Infers(Protocol):
    """The part of a service that a transport needs to pass a request on."""

    def submit(self, request: InferRequest, marks: Marks, done: Done) -> Ticket:
        """Take a request in, on the event loop's thread. Never blocks, never raises ``ServeError``: ``done`` gets it.

        ``marks.ns[0..2]`` are set by the transport (receive began, decode began, decoded); the service sets the rest
        up to the end of ``post`` (index 7); the transport sets the last two.
        """
