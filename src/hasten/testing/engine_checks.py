"""What every engine promises."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import get_args

import numpy as np

from hasten.artifact import Artifact
from hasten.engine import Engine, Session
from hasten.errors import HastenError, SignatureMismatch, StoreError, Unsupported
from hasten.host import this_host
from hasten.settings import settings_of
from hasten.tensors import DTYPES, TOLERANCES, Feed
from hasten.testing.case import (
    BATCHES,
    COMMON_CHECKS,
    Case,
    Check,
    ContractBroken,
    evaluate,
    require,
    require_agreement,
)
from hasten.testing.models import strange

RUNS = 3
"""Profiled runs: the checks look at what is told, not at how long it took."""


def is_an_engine(case: Case) -> None:
    """It has the members of ``Engine``, with ``threads`` a positive int and ``precision`` a Literal with float32."""
    require(isinstance(case.subject, Engine), f"{type(case.subject).__name__} lacks a member of hasten.engine.Engine")
    settings = {setting.name: setting for setting in settings_of(type(case.subject))}
    require({"threads", "precision"} <= settings.keys(), f"its settings are {sorted(settings)}")
    require(isinstance(case.subject.threads, int) and case.subject.threads >= 1, "threads is no positive int")
    require("float32" in _precisions(case), "its precision does not know float32")


def outputs_agree_with_the_specification(case: Case) -> None:
    """On each batch length, the outputs are those of ONNX's own evaluator."""
    with _opened(case, case.subject) as session:
        for batch in BATCHES:
            if session:
                require_outputs(case, session, case.feed(batch), f"with batch {batch}")


def each_precision_is_taken_or_refused(case: Case) -> None:
    """Another precision gives outputs within its tolerance, or ``Unsupported``."""
    for precision in _precisions(case):
        with _opened(case, replace(case.subject, precision=precision)) as session:
            if session is None:
                continue
            got = session.run(case.feed(3))
            reference = evaluate(case.source, case.feed(3), case.store)
            require_agreement(reference, got, case.tolerance or TOLERANCES[precision], f"with precision {precision}")


def more_threads_change_no_result(case: Case) -> None:
    """On two threads it gives the same outputs, where there are two cores."""
    if this_host().usable_cores < 2:
        return
    with _opened(case, replace(case.subject, threads=2)) as session:
        if session:
            require_outputs(case, session, case.feed(3), "on two threads")


def a_fixed_batch_is_kept(case: Case) -> None:
    """With a setting ``batch``, the signature says so, that many rows run, and others are refused."""
    if "batch" not in {setting.name for setting in settings_of(type(case.subject))}:
        return
    with _opened(case, replace(case.subject, batch=3)) as session:
        if session:
            require(all(spec.shape[0] == 3 for spec in session.signature.inputs), "its signature has no batch of 3")
            require_outputs(case, session, case.feed(3), "with a fixed batch of 3")
            _refuses(session, case.feed(1), "one row for a fixed batch of 3")


def results_are_the_callers_to_keep(case: Case) -> None:
    """A second run changes neither what the first gave nor its feed; the same feed gives the same again."""
    with _opened(case, case.subject) as session:
        if not session:
            return
        feed, other = case.feed(3), {name: np.roll(array, 1) for name, array in case.feed(3).items()}
        kept = {name: array.copy() for name, array in feed.items()}
        first = session.run(feed)
        copies = {name: array.copy() for name, array in first.items()}
        session.run(other)
        require(_equal(first, copies), "a later run overwrote an earlier result")
        require(_equal(feed, kept), "a run changed its feed")
        require(_equal(session.run(feed), copies), "the same feed gave another result")


def a_wrong_feed_is_a_signature_mismatch(case: Case) -> None:
    """A missing or unknown input, another dtype, rank or length: each is named, after a good run too."""
    with _opened(case, case.subject) as session:
        if not session:
            return
        good = case.feed(3)
        session.run(good)
        name, array = next(iter(good.items()))
        _refuses(session, {}, "an empty feed")
        _refuses(session, {**good, "nobody": array}, "an unknown input")
        _refuses(session, {**good, name: array.astype(np.float64)}, "another dtype")
        _refuses(session, {**good, name: array[None]}, "another rank")
        _refuses(session, {**good, name: np.concatenate([array, array], axis=-1)}, "another length")
        session.run(good)


def closing_twice_is_fine(case: Case) -> None:
    """``close`` may be called again; a run after it is a ``HastenError``."""
    with _opened(case, case.subject) as session:
        if not session:
            return
        session.close()
        session.close()
        try:
            session.run(case.feed(1))
        except HastenError:
            return
        raise ContractBroken("a closed session runs")


def operators_are_concrete(case: Case) -> None:
    """What really runs is told: names, shapes in numbers, dtypes, weights among the inputs, times above zero."""
    made = case.made()
    if made is None:
        return
    operators = case.subject.operators(made, case.feed(3), runs=RUNS)
    require(bool(operators), "it tells of no operator")
    names = [operator.name for operator in operators]
    require(len(set(names)) == len(names), f"two operators have one name: {sorted(names)}")
    for operator in operators:
        specs = (*operator.inputs, *operator.outputs)
        require(bool(operator.outputs), f"{operator.name!r} has no outputs")
        require(all(isinstance(d, int) for s in specs for d in s.shape), f"{operator.name!r} has an open dimension")
        unknown = {operator.dtype, *(spec.dtype for spec in specs)} - DTYPES.keys()
        require(not unknown, f"{operator.name!r} has dtypes that nobody knows: {sorted(unknown)}")
        strays = set(operator.weights) - {spec.name for spec in operator.inputs}
        require(not strays, f"{operator.name!r} has weights that are no inputs: {sorted(strays)}")
        require(operator.time_ns is None or operator.time_ns > 0, f"{operator.name!r} took {operator.time_ns} ns")


def missing_files_are_a_store_error(case: Case) -> None:
    """Files that are gone, or of another format, are a ``StoreError`` when they are opened."""
    made = case.made()
    if made is None:
        return
    with case.store.scratch() as folder:
        shutil.copytree(made.folder, folder / "copy")
        copy = replace(made, folder=folder / "copy")
        copy.entry.unlink()
        _does_not_open(case, copy, "a model whose file is gone")
    _does_not_open(case, case.source, "a model that was not built")


def a_strange_operator_is_unsupported(case: Case) -> None:
    """A model with an operator that nobody knows is refused with a sentence that names it."""
    case = case.on(strange())
    if case.subject.why_not(case.source) is not None:
        return
    with case.store.scratch() as folder:
        try:
            case.subject.apply(case.source, case.context(folder))
        except Unsupported as error:
            require("Strange" in error.reason, f"its reason does not name the operator: {error.reason!r}")
            return
    raise ContractBroken("it built a model with an operator that nobody knows")


def require_outputs(case: Case, session: Session, feed: Feed, when: str) -> None:
    """Check the outputs of a run against ONNX's own evaluator."""
    reference = evaluate(case.source, feed, case.store)
    require_agreement(reference, session.run(feed), case.limit(case.source), when)


@contextlib.contextmanager
def _opened(case: Case, engine: Engine) -> Iterator[Session | None]:
    """Build and open; None where the engine cannot take the model."""
    made = case.made(engine)
    session = engine.open(made) if made else None
    try:
        yield session
    finally:
        if session:
            session.close()


def _precisions(case: Case) -> tuple[str, ...]:
    setting = next(item for item in settings_of(type(case.subject)) if item.name == "precision")
    return get_args(get_args(setting.type)[0]) or get_args(setting.type)


def _refuses(session: Session, feed: Feed, what: str) -> None:
    try:
        session.run(feed)
    except SignatureMismatch:
        return
    raise ContractBroken(f"it runs on {what}")


def _does_not_open(case: Case, built: Artifact, what: str) -> None:
    try:
        case.subject.open(built)
    except StoreError:
        return
    raise ContractBroken(f"it opens {what}")


def _equal(a: Feed, b: Feed) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


ENGINE_CHECKS: Mapping[str, Check] = {
    **COMMON_CHECKS,
    **{
        check.__name__: check
        for check in (
            is_an_engine,
            outputs_agree_with_the_specification,
            each_precision_is_taken_or_refused,
            more_threads_change_no_result,
            a_fixed_batch_is_kept,
            results_are_the_callers_to_keep,
            a_wrong_feed_is_a_signature_mismatch,
            closing_twice_is_fine,
            operators_are_concrete,
            missing_files_are_a_store_error,
            a_strange_operator_is_unsupported,
        )
    },
}
