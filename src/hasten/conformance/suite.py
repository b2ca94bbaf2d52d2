"""The whole suite: every check in its order, run over one server, and what came of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from types import ModuleType
from typing import Literal

from hasten.conformance import binary, extensions, grpc_errors, grpc_infer, rest_errors, rest_health, rest_infer
from hasten.conformance import shared_memory as shared
from hasten.conformance.check import Check, NotOffered, Skipped
from hasten.conformance.server import Server
from hasten.conformance.wire import NotMet

MODULES: tuple[ModuleType, ...] = (
    *(rest_health, rest_infer, rest_errors, binary, extensions, shared),
    *(grpc_infer, grpc_errors),
)

Outcome = Literal["met", "not met", "not offered", "skipped"]


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came of one check."""

    check: Check
    outcome: Outcome
    says: str
    """What the server did instead, or why it was not asked; empty where the check is met."""
    seconds: float


def _checks() -> Iterator[Check]:
    for module in MODULES:
        for value in vars(module).values():
            for item in value if isinstance(value, tuple) else (value,):
                if isinstance(item, Check):
                    yield item


CHECKS: tuple[Check, ...] = tuple(_checks())
"""Every check, group by group."""


def run(server: Server, checks: Sequence[Check] = CHECKS) -> list[Result]:
    """Run checks one after the other. Whatever a server does, this ends."""
    return [run_one(server, one) for one in checks]


def run_one(server: Server, one: Check) -> Result:
    """Run one check."""
    began = perf_counter()
    outcome: Outcome = "met"
    says = ""
    try:
        if one.extension is not None and not _offers(server, one.extension):
            raise NotOffered(f"the server's extensions lack {one.extension!r}")
        one.run(server)
    except NotMet as error:
        outcome, says = "not met", str(error)
        if (refusal := server.refusal) is not None and refusal in says:
            told = f"the model takes text or files, and refuses made-up ones: {refusal!r}"
            outcome, says = "skipped", f"{told}; name a model of numbers: --model NAME"
    except NotOffered as error:
        outcome, says = "not offered", str(error)
    except Skipped as error:
        outcome, says = "skipped", str(error)
    return Result(check=one, outcome=outcome, says=" ".join(says.split()), seconds=perf_counter() - began)


def _offers(server: Server, word: str) -> bool:
    return any(said == word or said.startswith((f"{word}(", f"{word}_extension")) for said in server.extensions)


def failures(results: Sequence[Result], *, strict: bool = False) -> list[Result]:
    """Give what counts against a server: required checks and those of extensions it claims; ``strict``: all."""
    return [
        result for result in results if result.outcome == "not met" and (strict or result.check.level != "recommended")
    ]


def counts(results: Sequence[Result]) -> dict[str, dict[str, int]]:
    """Count outcomes by level."""
    found: dict[str, Counter[str]] = {}
    for result in results:
        found.setdefault(result.check.level, Counter())[result.outcome] += 1
    return {level: dict(counted) for level, counted in found.items()}
