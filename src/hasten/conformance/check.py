"""A check: a function over a server, with where the protocol says so, how firmly, and a text for people.

A check returns where the server does what its text says, else it raises ``NotMet``, ``NotOffered`` or ``Skipped``.
Its docstring is what docs/conformance.md says of it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from hasten.conformance.inputs import Tensor
from hasten.conformance.server import Server
from hasten.errors import HastenError

Level = Literal["required", "recommended", "extension"]
"""What the specification states; what it leaves open, and is better so; what goes beyond it, where it is offered."""

Run = Callable[[Server], None]


class NotOffered(HastenError):
    """The server does not claim to have this."""


class Skipped(HastenError):
    """This cannot be told with this model or from here, and why."""


def some_rows(server: Server, rows: int = 1, *, fill: str = "zeros") -> tuple[Tensor, ...]:
    """Make inputs. Raises Skipped, NotMet."""
    if not server.model.inputs:
        raise Skipped("the model's metadata have no inputs, so that there is nothing to send")
    return server.rows(rows, fill=fill)


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that a server does or does not."""

    name: str
    group: str
    level: Level
    source: str
    """The section of the specification or of the extension."""
    text: str
    run: Run
    extension: str | None = None
    """The word in the server's ``extensions`` that offers it."""


def check(
    group: str, source: str, *, level: Level = "required", extension: str | None = None
) -> Callable[[Run], Check]:
    """Make a check of a function; its name is the function's, its text the docstring."""

    def made(function: Run) -> Check:
        return Check(
            name=name_of(function),
            group=group,
            level="extension" if extension else level,
            source=source,
            text=text_of(function),
            run=function,
            extension=extension,
        )

    return made


def name_of(function: Callable[..., object]) -> str:
    """Give a function's name as checks are called: ``rest_server_live`` is ``rest-server-live``."""
    return function.__name__.replace("_", "-")


def text_of(function: Callable[..., object]) -> str:
    """Give a function's docstring as one line."""
    return " ".join((inspect.getdoc(function) or "").split())
