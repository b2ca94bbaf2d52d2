"""What every pass promises."""

from __future__ import annotations

from collections.abc import Mapping

import onnx

from hasten.errors import Unsupported
from hasten.settings import build
from hasten.testing.case import BATCHES, COMMON_CHECKS, Case, Check, evaluate, require, require_agreement
from hasten.testing.models import strange
from hasten.transform import Pass, step_key


def is_a_pass(case: Case) -> None:
    """It has the members of ``Pass``."""
    require(isinstance(case.subject, Pass), f"{type(case.subject).__name__} lacks a member of hasten.transform.Pass")


def result_is_valid(case: Case) -> None:
    """What it makes passes ONNX's checker."""
    if (made := case.made()) is not None:
        require(made.format == "onnx", f"it made {made.format!r}, not onnx")
        onnx.checker.check_model(str(made.entry), full_check=True)


def signature_is_kept(case: Case) -> None:
    """Inputs and outputs keep their names, dtypes and dimensions, with symbolic ones symbolic."""
    if (made := case.made()) is not None:
        require(made.signature == case.source.signature, f"signature {made.signature} was {case.source.signature}")


def outputs_agree_with_the_source(case: Case) -> None:
    """On each batch length, within the tolerance of what it made."""
    made = case.made()
    if made is None or made.content == case.source.content:
        return
    for batch in BATCHES:
        feed = case.feed(batch)
        reference, got = (evaluate(artifact, feed, case.store) for artifact in (case.source, made))
        require_agreement(reference, got, case.limit(made), f"with batch {batch}")


def has_nothing_to_do_on_its_own_result(case: Case) -> None:
    """Applied to what it made, it refuses or leaves every byte as it is."""
    if (made := case.made()) is not None and (again := case.made(source=made)) is not None:
        require(again.content == made.content, "applied to its own result, it changes it again")


def meets_a_strange_operator_with_unsupported_at_most(case: Case) -> None:
    """A model with an operator that nobody knows is handled, or refused with ``Unsupported``."""
    case = case.on(strange())
    if case.subject.why_not(case.source) is not None:
        return
    with case.store.scratch() as folder:
        try:
            case.subject.apply(case.source, case.context(folder))
        except Unsupported as error:
            require(" " in error.reason, f"its reason is no sentence: {error.reason!r}")


def is_cached_with_its_lineage(case: Case) -> None:
    """``run_pass`` finds what was made, and it has one more step: name, settings, source."""
    if (made := case.made()) is None:
        return
    cached = case.store.cached(step_key(case.subject, case.source, case.context(case.store.root)))
    require(cached is not None and cached.digest == made.digest, "the cache does not hold what was made")
    if made.content == case.source.content:
        require(made.digest == case.source.digest, "it changed nothing, and yet the artifact is another")
        return
    require(made.lineage[:-1] == case.source.lineage, "the lineage of the source is not kept")
    last = made.lineage[-1]
    settings = build(type(case.subject), last.settings)
    require(
        (last.name, settings, last.source) == (case.subject.name, case.subject, case.source.digest),
        f"the last step of the lineage is {last}",
    )


PASS_CHECKS: Mapping[str, Check] = {
    **COMMON_CHECKS,
    **{
        check.__name__: check
        for check in (
            is_a_pass,
            result_is_valid,
            signature_is_kept,
            outputs_agree_with_the_source,
            has_nothing_to_do_on_its_own_result,
            meets_a_strange_operator_with_unsupported_at_most,
            is_cached_with_its_lineage,
        )
    },
}
