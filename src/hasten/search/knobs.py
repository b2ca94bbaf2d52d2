"""The few expensive knobs of a training, by short trainings: learning rate, temperature, and the teacher's share.

Tree-structured Parzen estimators (J. Bergstra et al., "Algorithms for hyper-parameter optimization", NIPS 2011) as
Optuna has them. The same seed and the same losses give the same questions in the same order, so a search that is
interrupted asks again what its journal already answers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from hasten.errors import HastenError, MissingDependency, StoreError
from hasten.torchview.recipe import Recipe

LR = (1e-4, 5e-3)
TEMPERATURE = (1.0, 8.0)
ALPHA = (0.3, 1.0)

STARTS = 3
"""Points that are drawn before the estimator is asked, the usual settings among them."""


@dataclass(frozen=True, kw_only=True)
class Knobs:
    """What a training by a teacher is set to; by default as every trainer is."""

    lr: float = Recipe.lr
    temperature: float = Recipe.temperature
    alpha: float = Recipe.alpha


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """The knobs that lost least, with what they lost; and why others fell out."""

    knobs: Knobs
    loss: float
    fallen: tuple[str, ...]


def tune(evaluate: Callable[[Knobs], float], *, tries: int, seed: int = 0) -> Tuned:
    """Try settings, the usual ones first, and give those that lose least; of equals the earlier.

    Args:
        evaluate: Trains with some knobs for a short time, and gives what is lost then. A ``HastenError`` of it, or a
            loss that is not finite, is an outcome: those knobs are out.
        tries: Trainings, at least one.
        seed: Of the draws.

    Raises:
        MissingDependency: Optuna is not installed. StoreError: the disk fails.
    """
    try:
        import optuna
    except ImportError as error:
        raise MissingDependency("Optuna", "pip install 'hasten[train]'") from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=STARTS))
    usual = Knobs()
    study.enqueue_trial({"lr": usual.lr, "temperature": usual.temperature, "alpha": usual.alpha})
    space: dict[str, optuna.distributions.BaseDistribution] = {
        "lr": optuna.distributions.FloatDistribution(*LR, log=True),
        "temperature": optuna.distributions.FloatDistribution(*TEMPERATURE, log=True),
        "alpha": optuna.distributions.FloatDistribution(*ALPHA),
    }
    best, least, fallen = usual, math.inf, []
    for _ in range(tries):
        trial = study.ask(space)
        knobs = Knobs(**{name: float(f"{value:.2g}") for name, value in trial.params.items()})
        try:
            loss = float(evaluate(knobs))
        except StoreError:
            raise
        except HastenError as error:
            fallen.append(f"{knobs}: {error}")
            loss = math.nan
        if not math.isfinite(loss):
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            continue
        study.tell(trial, loss)
        if loss < least:
            best, least = knobs, loss
    return Tuned(knobs=best, loss=least, fallen=tuple(fallen))
