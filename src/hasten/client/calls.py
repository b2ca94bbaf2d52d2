"""What each call sends, and how its answer is read: request bytes in, value or error out. No socket is known here.

A ``Call`` is the same value for both protocols, so that what carries it is written without knowing which call it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from hasten.artifact import Json
from hasten.client.values import InferResult, ModelState
from hasten.errors import NoAnswer
from hasten.protocol.messages import InferRequest, InferResponse, ModelMetadata

T = TypeVar("T")
Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back. ``status``: of HTTP, or of gRPC by number; ``headers``, in lower case, or trailing metadata."""

    status: int
    headers: Mapping[str, str]
    body: Buffer


@dataclass(frozen=True, kw_only=True, slots=True)
class Call(Generic[T]):
    """One call: ``target`` is a path, or the name of a method of the inference service."""

    target: str
    read: Callable[[Reply], T]
    """Gives the value. Raises ServeError: what the server said, or that it cannot be read."""
    verb: str = "POST"
    body: tuple[Buffer, ...] = ()
    headers: Mapping[str, str] = field(default_factory=dict)


class Calls(Protocol):
    """The calls in one protocol."""

    def infer(self, request: InferRequest) -> Call[InferResult]:
        """Ask for an inference. Raises BadRequest: the protocol cannot hold an input."""

    def ready(self, model: str | None, version: str | None) -> Call[bool]:
        """Ask whether a model, or the whole server, is ready."""

    def metadata(self, model: str, version: str | None) -> Call[ModelMetadata]:
        """Ask what a model takes and gives."""

    def statistics(self, model: str, version: str | None) -> Call[dict[str, Json]]:
        """Ask what a model has done."""

    def index(self) -> Call[tuple[ModelState, ...]]:
        """Ask which models there are."""

    def load(self, model: str) -> Call[None]:
        """Ask to load a model's newest version."""

    def unload(self, model: str) -> Call[None]:
        """Ask to take a model out of service."""


def one_model(found: Any, url: str) -> dict[str, Json]:
    """Give the only entry of ``model_stats``. Raises NoAnswer."""
    match found:
        case {"model_stats": [dict() as stats, *_]}:
            return stats
    raise NoAnswer(f"{url} answered statistics without an entry of the model")


def result_of(response: InferResponse, timing: str | None) -> InferResult:
    """Make a result of a response, and of what Server-Timing said of it."""
    told = numbers_of(timing)
    return InferResult(
        model=response.model,
        version=response.version,
        outputs={tensor.name: tensor.data for tensor in response.outputs},
        id=response.id,
        parameters=response.parameters,
        phases_ns=phases_of(timing),
        batch_rows=told.get("rows"),
        instance=told.get("instance"),
    )


def phases_of(timing: str | None) -> dict[str, int]:
    """Read Server-Timing, ``name;dur=MILLISECONDS`` by commas, as nanoseconds; the rest is left out."""
    found: dict[str, int] = {}
    for name, key, value in _said_of(timing):
        if key == "dur" and value.replace(".", "", 1).isdecimal() and len(value) < 32:
            found[name] = round(float(value) * 1e6)
    return found


def numbers_of(timing: str | None) -> dict[str, int]:
    """Read the whole numbers of Server-Timing, ``name;desc="NUMBER"``: hasten's are ``rows`` and ``instance``."""
    found: dict[str, int] = {}
    for name, key, value in _said_of(timing):
        number = value.strip('"')
        if key == "desc" and number.isascii() and number.isdecimal() and len(number) < 19:
            found[name] = int(number)
    return found


def _said_of(timing: str | None) -> Iterator[tuple[str, str, str]]:
    """Give (metric, parameter, value) of Server-Timing, for metrics that have a name."""
    for piece in (timing or "").split(","):
        name, _, rest = piece.strip().partition(";")
        for word in rest.split(";") if name else ():
            key, _, value = word.strip().partition("=")
            yield name, key, value


def seconds_of(text: str | None) -> float | None:
    """Read Retry-After where it is a number of seconds; None where it is absent, or a date."""
    return float(text) if text is not None and text.isdecimal() and len(text) < 10 else None
