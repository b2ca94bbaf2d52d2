"""What every verb takes and what it gives back: it prints nothing itself, so that each can answer in JSON as well."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import msgspec
from cyclopts import Group, Parameter
from rich.console import RenderableType

from hasten.artifact import Artifact, Json

GOAL_NOT_MET = 3
"""The exit code of work that is done, where the goal was not reached."""


@Parameter(name="*", group=Group("Every verb", sort_key=9))
@dataclass(frozen=True, kw_only=True)
class Common:
    """The options of every verb."""

    home: Path = Path(".hasten")
    """Folder of the store and of all runs."""
    json: bool = False
    """Print one JSON document; everything else goes to standard error."""
    show_python: bool = False
    """Print the Python lines that do the same, and do nothing."""
    debug: bool = False
    """Show where an error comes from."""


COMMON = Common()
"""The defaults."""


@dataclass(frozen=True)
class Verbatim:
    """A text that is printed as it is: not wrapped, not coloured, so that it can be piped into a file."""

    text: str


Shown: TypeAlias = RenderableType | Verbatim
"""What a verb shows in the terminal."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a verb found: as a document for ``--json``, and as something to show."""

    document: Json
    shown: Sequence[Shown] = ()
    code: int = 0


def python_answer(*lines: str) -> Answer:
    """Answer ``--show-python``."""
    text = "\n".join(lines)
    return Answer(document={"python": text}, shown=(Verbatim(text),))


def describe(artifact: Artifact) -> dict[str, Json]:
    """Give an artifact as a document."""
    return {
        "digest": artifact.digest,
        "format": artifact.format,
        "entry": str(artifact.entry),
        "bytes": artifact.size_bytes,
        "traits": sorted(artifact.traits),
        "host": artifact.host,
        "signature": msgspec.to_builtins(artifact.signature),
        "preprocess": artifact.preprocess,
        "lineage": msgspec.to_builtins(artifact.lineage),
    }
