"""The noun of the contract suites: a plug-in with a model to try it on, and what all checks need."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import onnx
from onnx.reference import ReferenceEvaluator

from hasten import registry
from hasten.artifact import Artifact, hash_files
from hasten.engines.onnxruntime import OnnxRuntime
from hasten.errors import Unsupported
from hasten.graph.model import read_model
from hasten.samples import Samples
from hasten.settings import build, settings_of, values_of
from hasten.store import Store
from hasten.tensors import TOLERANCES, Array, Feed, Tolerance, relative_error
from hasten.testing.models import random_samples, stored
from hasten.transform import Context, run_pass

BATCHES = (1, 3)
"""Two lengths of the open batch axis: one that hides mistakes about it, and one that shows them."""

BY_TRAIT: Mapping[str, Tolerance] = {
    "int8": Tolerance(0.3, "8 bits and random weights: a wiring mistake gives errors around 1"),
    "float16": TOLERANCES["float16"],
    "bfloat16": TOLERANCES["bfloat16"],
    "pruned": Tolerance(3.0, "what random channels did is gone: only shape, scale and finite values can be told"),
}
"""How far the outputs of a model with a trait may lie from its source's; without one they must agree as float32."""


class ContractBroken(AssertionError):
    """A plug-in does not do what every plug-in of its kind promises."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A pass or an engine, and a model to try it on."""

    subject: Any
    source: Artifact
    samples: Samples
    store: Store
    tolerance: Tolerance | None = None
    """How far outputs may lie from the source's; None: by the traits of what was made."""

    def context(self, folder: Path) -> Context:
        """Give a context whose files go into ``folder``."""
        return Context(folder=folder, samples=self.samples, seed=0, progress=lambda text, share: None)

    def feed(self, batch: int) -> dict[str, Array]:
        """Give inputs of ``batch`` rows."""
        return self.samples.feed(slice(0, batch))

    def made(self, subject: Any = None, source: Artifact | None = None) -> Artifact | None:
        """Run ``subject`` through ``run_pass``; None where it says that it cannot take the model."""
        try:
            return run_pass(subject or self.subject, source or self.source, self.store, self.context(self.store.root))
        except Unsupported:
            return None

    def on(self, model: onnx.ModelProto) -> Case:
        """Give the same case with another model."""
        source = stored(model, self.store)
        return replace(self, source=source, samples=random_samples(source, n=16))

    def limit(self, made: Artifact) -> Tolerance:
        """Give the largest allowed error of the outputs of ``made``."""
        if self.tolerance is not None:
            return self.tolerance
        found = [BY_TRAIT[trait] for trait in made.traits if trait in BY_TRAIT]
        return max(found, key=lambda item: item.relative, default=TOLERANCES["float32"])


Check = Callable[[Case], None]


def case_of(subject: Any, model: onnx.ModelProto, folder: Path, tolerance: Tolerance | None = None) -> Case:
    """Give a case whose store is ``folder``; models that are there already are used again."""
    store = Store(folder)
    source = stored(model, store)
    return Case(subject=subject, source=source, samples=random_samples(source, n=16), store=store, tolerance=tolerance)


def require(fits: bool, what: str) -> None:
    """Raise ``ContractBroken`` with ``what`` was wrong, unless it ``fits``."""
    if not fits:
        raise ContractBroken(what)


def evaluate(artifact: Artifact, feed: Feed, store: Store) -> dict[str, Array]:
    """Run an ``onnx`` artifact with the specification's own evaluator.

    A graph with operators of other domains, which that one lacks, runs in ONNX Runtime without optimizations.
    """
    model = read_model(artifact)
    if all(item.domain in ("", "ai.onnx") for item in model.opset_import):
        names = [spec.name for spec in artifact.signature.outputs]
        return dict(zip(names, ReferenceEvaluator(model).run(names, dict(feed)), strict=True))
    plain = OnnxRuntime(optimization="none")
    context = Context(folder=store.root, samples=None, seed=0, progress=lambda text, share: None)
    session = plain.open(run_pass(plain, artifact, store, context))
    try:
        return session.run(feed)
    finally:
        session.close()


def require_agreement(reference: Feed, got: Feed, limit: Tolerance, when: str) -> None:
    """Check each output; ``when`` ends the message."""
    require(reference.keys() == got.keys(), f"it gives {sorted(got)}, its source {sorted(reference)} {when}")
    for name, array in reference.items():
        require(array.dtype == got[name].dtype, f"output {name!r} is {got[name].dtype}, not {array.dtype} {when}")
        error = relative_error(array, got[name])
        require(
            error <= limit.relative,
            f"output {name!r} is off by {error:.2g} of its largest value {when}; allowed: {limit.relative:.2g}",
        )


def settings_are_declared_once(case: Case) -> None:
    """It is a frozen dataclass with a name; each setting has a Doc, survives JSON, and can take its choices."""
    cls = type(case.subject)
    parameters = getattr(cls, "__dataclass_params__", None)
    require(parameters is not None and parameters.frozen, f"{cls.__name__} is no frozen dataclass")
    name = getattr(cls, "name", None)
    require(
        isinstance(name, str) and name == str(name).lower(), f"{cls.__name__}.name is {name!r}, not a lower-case word"
    )
    for kind in ("pass", "engine"):
        if name in registry.entries(kind):
            require(registry.load(kind, name) is cls, f"the {kind} {name!r} of the registry is another class")
    for setting in settings_of(cls):
        require(bool(setting.doc), f"setting {setting.name!r} has no Doc")
        for choice in setting.choices:
            build(cls, {**values_of(case.subject), setting.name: choice})
    values = msgspec.json.decode(msgspec.json.encode(values_of(case.subject)))
    require(build(cls, values) == case.subject, f"its settings do not survive JSON: {values}")


def refuses_another_format_in_a_sentence(case: Case) -> None:
    """``why_not`` gives None or a sentence, and a sentence for files that are no ONNX."""
    taken = case.subject.why_not(case.source)
    require(taken is None or (isinstance(taken, str) and " " in taken), f"why_not gave {taken!r}, no sentence")
    foreign = case.subject.why_not(replace(case.source, format="nonsense"))
    require(isinstance(foreign, str) and " " in foreign, f"why_not takes the format 'nonsense': it gave {foreign!r}")


def writes_into_its_folder_alone(case: Case) -> None:
    """``apply`` changes no file but those below ``ctx.folder``, and describes each of these."""
    if case.made() is None:
        return
    before = _written(case.store.root)
    with case.store.scratch() as folder:
        artifact = case.subject.apply(case.source, case.context(folder))
        if artifact.content != case.source.content:
            require(artifact.folder == folder, f"the artifact is in {artifact.folder}, not in ctx.folder")
            require(dict(artifact.files) == hash_files(folder), "the artifact does not name exactly the files it wrote")
            require(artifact.entry_name in artifact.files, f"its entry {artifact.entry_name!r} was not written")
    require(_written(case.store.root) == before, "it changed files outside ctx.folder")


def _written(root: Path) -> dict[Path, int]:
    """Give the time of the last change of each file: writing the same bytes again counts as a change."""
    return {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}


def makes_the_same_bytes_twice(case: Case) -> None:
    """``apply`` on the same source with the same settings gives one digest."""
    if case.made() is None:
        return
    digests = []
    for _ in range(2):
        with case.store.scratch() as folder:
            digests.append(case.subject.apply(case.source, case.context(folder)).digest)
    require(digests[0] == digests[1], "two runs made different artifacts")


COMMON_CHECKS: Mapping[str, Check] = {
    check.__name__: check
    for check in (
        settings_are_declared_once,
        refuses_another_format_in_a_sentence,
        writes_into_its_folder_alone,
        makes_the_same_bytes_twice,
    )
}
