"""Every error that hasten raises on purpose.

HastenError
├── UsageError            UnknownName (with the nearest)  InvalidSetting  SignatureMismatch  BadInput
├── MissingDependency     carries the command that installs it
├── Unsupported           this pass or engine cannot take this model: an outcome in search, not a crash
├── BuildFailed           cause chained, step named: ChildCrashed  ChildHung  OutOfMemory
├── Untrusted             too noisy or not finite: says which number and by how much
└── StoreError            what is on disk is not what its manifest says, or cannot be written
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
