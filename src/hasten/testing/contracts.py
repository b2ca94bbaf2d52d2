"""The contract suites that the author of a pass or an engine runs over it.

In a test file of the plug-in::

    def test_it_keeps_the_contract_of_a_pass(tmp_path):
        check_pass(MyPass, tmp_path=tmp_path)

``PASS_CHECKS`` and ``ENGINE_CHECKS`` hold the single checks by name, for a parametrized test over ``case_of``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import onnx

from hasten.engine import Engine
from hasten.errors import HastenError
from hasten.tensors import Tolerance
from hasten.testing.case import Case, Check, ContractBroken, case_of
from hasten.testing.engine_checks import ENGINE_CHECKS
from hasten.testing.models import MODELS
from hasten.testing.pass_checks import PASS_CHECKS
from hasten.transform import Pass

__all__ = ["ENGINE_CHECKS", "PASS_CHECKS", "Case", "ContractBroken", "case_of", "check_engine", "check_pass"]

Models = Mapping[str, Callable[[], onnx.ModelProto]]


def check_pass(
    make: Callable[[], Pass], *, tmp_path: Path, models: Models = MODELS, tolerance: Tolerance | None = None
) -> None:
    """Check a pass on each model.

    Args:
        make: Makes the pass, with the settings to check.
        tmp_path: Where its files may go.
        models: ONNX models by name.
        tolerance: How far the outputs of what it makes may lie from the source's. None: by its traits.

    Raises:
        ContractBroken: names the check, the model, and what was wrong.
    """
    _check_all(PASS_CHECKS, make, models, tmp_path, tolerance)


def check_engine(
    make: Callable[[], Engine], *, tmp_path: Path, models: Models = MODELS, tolerance: Tolerance | None = None
) -> None:
    """Check an engine on each model. Arguments and errors are those of ``check_pass``."""
    _check_all(ENGINE_CHECKS, make, models, tmp_path, tolerance)


def _check_all(
    checks: Mapping[str, Check],
    make: Callable[[], Pass],
    models: Models,
    tmp_path: Path,
    tolerance: Tolerance | None,
) -> None:
    for model_name, model in models.items():
        case = case_of(make(), model(), tmp_path / model_name, tolerance)
        for check_name, check in checks.items():
            try:
                check(case)
            except (ContractBroken, HastenError) as error:
                where = f"{case.subject.name}: {check_name.replace('_', ' ')} (model {model_name!r})"
                raise ContractBroken(f"{where}: {error}") from error
