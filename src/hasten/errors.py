"""Every error that hasten raises on purpose.

HastenError
├── UsageError            UnknownName (with the nearest)  InvalidSetting  SignatureMismatch  BadInput
├── MissingDependency     carries the command that installs it
├── Unsupported           this pass or engine cannot take this model: an outcome in search, not a crash
├── BuildFailed           cause chained, step named: ChildCrashed  ChildHung  OutOfMemory
├── Untrusted             too noisy or not finite: says which number and by how much
├── StoreError            what is on disk is not what its manifest says, or cannot be written
└── ServeError            a request has no answer: BadRequest  TooLarge  NotAllowed  ModelNotFound  ModelNotReady
                          Overloaded  DeadlineExceeded  Cancelled  ServerFault  NoAnswer
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class HastenError(Exception):
    """The root. ``str(error)`` is one clear line: what, with which value, what to do."""


class UsageError(HastenError):
    """The caller asked for something that cannot be. The command line exits with 2."""


class UnknownName(UsageError):
    """A name that is in no table; the message offers the nearest one that is."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        names = sorted(known)
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names) or 'none'}"
        super().__init__(f"no {kind} is called {name!r}; {hint}")


class InvalidSetting(UsageError):
    """A setting has a value that it cannot take."""


class SignatureMismatch(UsageError):
    """Tensors do not fit a model's signature: which tensor, what was wanted, what came."""


class BadInput(UsageError):
    """A file or value that the user gave cannot be used as it is. The command line exits with 1."""


class MissingDependency(HastenError):
    """An optional part is not installed; ``command`` installs it."""

    def __init__(self, what: str, command: str) -> None:
        self.command = command
        super().__init__(f"{what} is not installed here; run: {command}")


class Unsupported(HastenError):
    """A pass or an engine cannot take this model. In a search this is an outcome."""

    def __init__(self, who: str, reason: str) -> None:
        self.who = who
        self.reason = reason
        super().__init__(f"{who}: {reason}")


class BuildFailed(HastenError):
    """A step went wrong while it ran. ``step`` names it; the cause is chained."""

    def __init__(self, step: str, reason: str) -> None:
        self.step = step
        self.reason = reason
        super().__init__(f"{step}: {reason}")


class ChildCrashed(BuildFailed):
    """The child process that did the step died."""


class ChildHung(BuildFailed):
    """The child process that did the step did not answer within its time limit, and was killed."""


class OutOfMemory(BuildFailed):
    """The child process that did the step went over its memory limit, and was killed."""


class Untrusted(HastenError):
    """A number that must not be reported: not finite, or too noisy."""


class StoreError(HastenError):
    """The store cannot be read or written, or holds something else than its manifest says."""


class ServeError(HastenError):
    """A request that gets no answer. Transports have one table of codes for these classes."""

    reason: str = "error"
    """A word for metrics and clients, the same for every error of the class unless told."""


class BadRequest(ServeError):
    """The request is malformed, or does not fit the model's signature."""

    reason = "bad_request"


class TooLarge(ServeError):
    """The request is over a size limit; nothing of that size was allocated."""

    reason = "too_large"


class NotAllowed(ServeError):
    """No key, or a wrong one."""

    reason = "not_allowed"


class ModelNotFound(ServeError):
    """The server has no such model, or not that version."""

    reason = "model_not_found"


class ModelNotReady(ServeError):
    """The model is known, but is loading, draining or has failed."""

    reason = "model_not_ready"


class Overloaded(ServeError):
    """The request would wait too long, or a queue is full; come again in ``retry_after_s``."""

    reason = "overloaded"

    def __init__(self, message: str, *, reason: str = "overloaded", retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.reason = reason
        self.retry_after_s = retry_after_s


class DeadlineExceeded(ServeError):
    """Its time was over before it was answered."""

    reason = "deadline_exceeded"


class Cancelled(ServeError):
    """The client has left, or withdrew the request."""

    reason = "cancelled"


class ServerFault(ServeError):
    """A fault on our side: a worker that died, an answer that is not finite where it must be."""

    reason = "server_fault"


class NoAnswer(ServeError):
    """A client got nothing from a server, or nothing that can be read; names the address."""

    reason = "no_answer"
