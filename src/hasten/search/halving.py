"""Successive halving: a little training for many candidates, more for the better half, until one is left.

K. Jamieson, A. Talwalkar, "Non-stochastic best arm identification and hyperparameter optimization", AISTATS 2016
(arXiv:1502.07943). Every rung costs about the same; what a candidate got at a lower rung is not deducted, because a
training of four epochs is not the continuation of one of two: its learning rate falls otherwise.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from hasten.errors import HastenError, InvalidSetting, StoreError

T = TypeVar("T")

Evaluate = Callable[[str, float], float]
"""(candidate, epochs) -> its score after training it for so long from the start; higher is better."""


class Memory(Protocol):
    """Where finished work is kept: a ``Journal``."""

    def record(self, name: str, value: object) -> None:
        """Keep a value under a name."""

    def recall(self, name: str, kind: type[T]) -> T | None:
        """Give what was kept, or None."""


@dataclass(frozen=True, kw_only=True)
class Try:
    """What came of training one candidate for so long: a score, or the reason that there is none."""

    candidate: str
    epochs: float
    score: float | None
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class Rung:
    """How many candidates are trained for how long."""

    candidates: int
    epochs: float


@dataclass(frozen=True, kw_only=True)
class Halving:
    """What successive halving found."""

    ranking: tuple[str, ...]
    """Candidates that scored, best first: those of higher rungs before those of lower ones."""
    tries: tuple[Try, ...]
    """Everything that was trained, in order."""
    epochs: float
    """Spent, also on what failed."""
    unfinished: bool
    """The time was over before the last rung was done."""

    @property
    def best(self) -> str | None:
        """The winner, or None where nothing scored."""
        return self.ranking[0] if self.ranking else None


def rungs(candidates: int, *, budget_epochs: float, least_epochs: float = 1.0, eta: int = 2) -> tuple[Rung, ...]:
    """Plan the rungs: each trains the best 1/``eta`` of the one before for ``eta`` times as long, within the budget.

    Where the budget is too small to train all for ``least_epochs``, the first rung takes only so many as it allows.

    Args:
        candidates: How many there are.
        budget_epochs: Epochs of all trainings together.
        least_epochs: Of a training that says anything.
        eta: How many are dropped for each that stays, and one.

    Raises:
        InvalidSetting: there is no candidate, or the budget does not train even one.
    """
    if candidates < 1 or eta < 2 or not 0 < least_epochs <= budget_epochs:
        raise InvalidSetting(
            f"{candidates} candidates cannot be halved (eta = {eta}) within {budget_epochs:g} epochs of "
            f"{least_epochs:g} at least; give one candidate, eta = 2 and as many epochs as one training takes"
        )
    for entrants in range(candidates, 0, -1):
        counts = [entrants]
        while counts[-1] > 1:
            counts.append(max(1, counts[-1] // eta))
        shares = [count * eta**rung for rung, count in enumerate(counts)]
        first = budget_epochs / sum(shares)
        if first >= least_epochs:
            return tuple(Rung(candidates=count, epochs=first * eta**rung) for rung, count in enumerate(counts))
    return (Rung(candidates=1, epochs=budget_epochs),)


def successive_halving(
    candidates: Sequence[str],
    evaluate: Evaluate,
    *,
    budget_epochs: float,
    least_epochs: float = 1.0,
    eta: int = 2,
    memory: Memory | None = None,
    deadline: Callable[[], bool] = lambda: False,
) -> Halving:
    """Train candidates for longer and longer, keeping the better ones.

    A candidate whose training fails, or scores no finite number, drops out; the others go on. What ``memory`` holds
    is not trained again: an interrupted call goes on where it was.

    Args:
        candidates: Names, the most promising first: of equal scores the earlier wins, and where the budget does not
            suffice for all, the last ones are left out.
        evaluate: Trains one.
        budget_epochs: Epochs of all trainings together; never exceeded.
        least_epochs: Of a training that says anything.
        eta: One in so many goes on to the next rung.
        memory: Keeps each finished training.
        deadline: Asked before each training; True ends the halving with what is known.

    Raises:
        InvalidSetting: as ``rungs``, or two candidates have one name. StoreError: the disk fails.
    """
    if len(set(candidates)) < len(candidates):
        raise InvalidSetting(f"candidates of a halving need names of their own; got {sorted(candidates)}")
    plan = rungs(len(candidates), budget_epochs=budget_epochs, least_epochs=least_epochs, eta=eta)
    key = _key(candidates, plan)
    alive = list(candidates)
    levels: list[list[str]] = []
    tries: list[Try] = []
    unfinished = False
    for rung in plan:
        scores: dict[str, float] = {}
        for name in alive[: rung.candidates]:
            found = memory.recall(f"{key} {name} {rung.epochs:g}", Try) if memory else None
            if found is None and deadline():
                unfinished = True
                break
            if found is None:
                found = _attempt(name, rung.epochs, evaluate)
                if memory:
                    memory.record(f"{key} {name} {rung.epochs:g}", found)
            tries.append(found)
            if found.score is not None:
                scores[name] = found.score
        alive = sorted(scores, key=lambda name: -scores[name])
        levels.append(alive)
        if unfinished or not alive:
            break
    return Halving(
        ranking=_ranked(levels, failed={item.candidate for item in tries if item.score is None}),
        tries=tuple(tries),
        epochs=math.fsum(item.epochs for item in tries),
        unfinished=unfinished,
    )


def _attempt(name: str, epochs: float, evaluate: Evaluate) -> Try:
    try:
        score = float(evaluate(name, epochs))
    except StoreError:
        raise
    except HastenError as error:
        return Try(candidate=name, epochs=epochs, score=None, reason=f"{type(error).__name__}: {error}")
    if not math.isfinite(score):
        return Try(candidate=name, epochs=epochs, score=None, reason=f"its score is {score}")
    return Try(candidate=name, epochs=epochs, score=score)


def _ranked(levels: Sequence[Sequence[str]], *, failed: set[str]) -> tuple[str, ...]:
    """List the candidates of the highest rung first. One that failed later is no winner: it comes last."""
    order = list(dict.fromkeys(name for level in reversed(levels) for name in level))
    return tuple(sorted(order, key=lambda name: name in failed))


def _key(candidates: Sequence[str], plan: Sequence[Rung]) -> str:
    """Name the records of one halving: another list of candidates, or other rungs, are another one."""
    told = "\0".join([*candidates, *(f"{rung.candidates}:{rung.epochs:g}" for rung in plan)])
    return f"halving {hashlib.sha256(told.encode()).hexdigest()[:12]}"
