"""Deployments that are made of others: an ensemble asks several and combines, a cascade asks the next where in doubt.

Such a deployment is a TOML file alone, ``models/NAME/deployment.toml`` with ``name`` and a table ``[ensemble]`` or
``[cascade]``, beside those that it names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from hasten.errors import HastenError, InvalidSetting, StoreError
from hasten.settings import Doc, build

KINDS = ("ensemble", "cascade")
"""The tables that make a deployment one of others."""

MOST_MEMBERS = 16

RAW = ".raw"
"""Behind a model's name: the model without its steps, where its deployment has ``raw = true``."""

Share = Annotated[float, Meta(ge=0, le=1)]
Confidence = Literal["top-1", "margin"]
Weight = Annotated[float, Meta(gt=0)]


@dataclass(frozen=True)
class Member:
    """A deployment that is asked: the version that must be routed to, or None for whichever is."""

    name: str
    version: str | None = None

    def __str__(self) -> str:
        return self.name if self.version is None else f"{self.name}:{self.version}"


def read_member(text: str) -> Member:
    """Read NAME or NAME:VERSION. Raises InvalidSetting."""
    name, colon, version = text.partition(":")
    if not name or (colon and not version):
        raise InvalidSetting(f"members: {text!r}: write NAME or NAME:VERSION")
    return Member(name, version or None)


@dataclass(frozen=True, kw_only=True)
class Ensemble:
    """Ask all members, and combine their scores.

    ``mean`` averages the scores, ``weighted`` by ``weights``; ``vote`` gives for each class the share of members whose
    best it is, of equal scores the lower class.

    Raises:
        InvalidSetting: fewer than two members, or weights that do not fit.
    """

    members: Annotated[tuple[str, ...], Doc("deployments of the repository: NAME, or NAME:VERSION")]
    combine: Annotated[Literal["mean", "weighted", "vote"], Doc("how their scores become one")] = "mean"
    weights: Annotated[tuple[Weight, ...], Doc("of each member, for weighted; they are scaled to a sum of 1")] = ()
    scores: Annotated[str, Doc("the output that is combined, [rows, classes]")]
    softmax: Annotated[bool, Doc("scores are logits: make them probabilities first")] = False

    def __post_init__(self) -> None:
        _check_members(self.members)
        if len(self.weights) != (len(self.members) if self.combine == "weighted" else 0):
            raise InvalidSetting(
                f"ensemble: {len(self.weights)} weights for combine = {self.combine!r}: weighted has one each"
            )


@dataclass(frozen=True, kw_only=True)
class Cascade:
    """Ask the first member, and the next one for the rows whose confidence is below the threshold, and so on.

    As in IDK cascades (Wang et al., UAI 2018): a cheap model that says "I don't know" where it is in doubt. The
    confidence is the best probability, or its margin over the second. A threshold is chosen on data
    (``hasten.measure.cascade``), not by eye.

    Raises:
        InvalidSetting: fewer than two members, or thresholds that do not fit.
    """

    members: Annotated[tuple[str, ...], Doc("deployments of the repository, the cheapest first")]
    thresholds: Annotated[tuple[Share, ...], Doc("confidence below which the next is asked, one fewer than members")]
    confidence: Annotated[Confidence, Doc("the best probability, or its margin over the second")] = "top-1"
    scores: Annotated[str, Doc("the output with a score for each class, [rows, classes]")]
    softmax: Annotated[bool, Doc("scores are logits: the confidence is that of their softmax")] = False

    def __post_init__(self) -> None:
        _check_members(self.members)
        if len(self.thresholds) != len(self.members) - 1:
            raise InvalidSetting(f"cascade: {len(self.members)} members take {len(self.members) - 1} thresholds")


@dataclass(frozen=True)
class Composition:
    """A deployment made of others."""

    name: str
    how: Ensemble | Cascade

    @property
    def members(self) -> tuple[Member, ...]:
        """Who is asked, in order."""
        return tuple(map(read_member, self.how.members))

    @property
    def kind(self) -> str:
        """Its table's name."""
        return "ensemble" if isinstance(self.how, Ensemble) else "cascade"


def read_composition(path: Path) -> Composition | None:
    """Read the TOML file; None where it is a deployment of a model of its own.

    Raises:
        StoreError: it cannot be read, or its table is wrong.
    """
    try:
        data = path.read_bytes()
        if not any(kind.encode() in data for kind in KINDS):
            return None  # the usual case, told without reading TOML: a model is loaded while another is served
        plain = msgspec.toml.decode(data)
        found = [kind for kind in KINDS if kind in plain]
        if not found:
            return None
        if len(found) > 1 or "artifact" in plain or set(plain) - {"name", *KINDS}:
            raise StoreError(f"{path}: a deployment of others has a name and one table, [ensemble] or [cascade]")
        how = build(Ensemble, plain["ensemble"]) if found == ["ensemble"] else build(Cascade, plain["cascade"])
        made = Composition(str(plain["name"]), how)
        _ = made.members
    except (
        OSError,
        msgspec.DecodeError,
        UnicodeDecodeError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as error:
        raise StoreError(f"{path} is no deployment that can be read: {error}") from error
    except HastenError as error:
        raise error if isinstance(error, StoreError) else StoreError(f"{path}: {error}") from error
    return made


def check_no_cycle(name: str, members_of: Callable[[str], Sequence[str]]) -> None:
    """Check that a deployment is not, by way of its members, one of its own.

    Raises:
        StoreError: it is; the message has the way round.
    """

    def walk(way: tuple[str, ...]) -> None:
        for member in members_of(way[-1]):
            if member in way:
                raise StoreError(f"deployment {name!r} asks itself: {' > '.join((*way, member))}")
            walk((*way, member))

    walk((name,))


def _check_members(members: Sequence[str]) -> None:
    if not 2 <= len(members) <= MOST_MEMBERS:
        raise InvalidSetting(f"{len(members)} members: 2 to {MOST_MEMBERS} are asked")
    if len(set(members)) < len(members):
        raise InvalidSetting(f"members = {list(members)}: each is asked once")
