"""A deployment of a model as it is: one engine, nothing searched, no claim but that it says what the model says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hasten.artifact import Artifact
from hasten.deployment import Deployment, Serving, write_deployment
from hasten.engine import Engine
from hasten.golden import GOLDEN, Golden, encode_golden
from hasten.host import this_host, versions
from hasten.isolation import Limits, Progress
from hasten.measure.worker import cpus_for, open_isolated
from hasten.plan import Inputs, Part, Plan, run_plan_isolated
from hasten.samples import Samples
from hasten.samples.preprocess import Preprocess
from hasten.search.deploy import NO_ROWS, TEXT, golden_of, has_rows, with_steps
from hasten.search.prepare import with_preprocess
from hasten.search.space import available_engines, original_plan
from hasten.settings import values_of
from hasten.steps.bundle_files import check_replaceable
from hasten.store import Store
from hasten.tensors import TOLERANCES, Signature, assert_agrees, relative_error

VERDICT = "UNPROVEN"
"""What such a deployment says of itself: nobody has measured it."""


@dataclass(frozen=True, kw_only=True)
class Deployed:
    """What was written."""

    path: Path
    deployment: Deployment
    agreement: dict[str, float]
    """How far each output lies from what the untouched model says in the reference engine, of its largest value."""
    golden_rows: int
    """Samples that were kept with their answers: a server checks the model by them before it is ready."""
    note: str | None = None
    """Why none were kept."""


def deploy(
    source: Artifact,
    engine: Part,
    samples: Samples,
    store: Store,
    folder: Path,
    *,
    name: str,
    preprocess: Preprocess | None = None,
    serving: Serving | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Deployed:
    """Build a model with one engine, check what it says, and write the bundle.

    Args:
        source: An imported model; passes may have changed it.
        engine: What it is built with and for.
        samples: What it is checked on.
        store: Where ``source`` is.
        folder: Where the bundle goes; one that is there is replaced, where it holds nothing but a bundle.
        name: What clients call it.
        preprocess: How ``samples`` were read where they are images: clients may then send such images.
        serving: How it is to be served.
        seed: Of what a build draws.
        progress: Is told what goes on.

    Raises:
        BadInput: something else is in ``folder``, or it lies in a bundle. Untrusted: an output is off; nothing is
            written. HastenError: it cannot be built or run.
    """
    check_replaceable(folder)
    if preprocess is not None:
        source = with_preprocess(source, preprocess, store)
    told = progress or (lambda text, share: None)
    loaded = Plan(engine).load_engine()
    settings = {key: value for key, value in values_of(loaded).items() if key in engine.settings}
    cpus_for(loaded.threads)
    plan, reference = Plan(Part(engine.name, settings)), original_plan(available_engines(), (1,))
    with store.scratch() as scratch:
        rows = scratch / "samples"
        samples.save(rows)
        inputs = Inputs(store=store, samples=rows, seed=seed)
        told(f"building for {engine}", None)
        built = run_plan_isolated(plan, source, inputs, limits=Limits(), progress=progress)
        batch = _batch(built.signature)
        answers, agreement = None, {}
        if has_rows(built.signature, batch):
            told("asking the untouched model", None)
            untouched = run_plan_isolated(reference, source, inputs, limits=Limits())
            expected = _answers(reference, untouched, store, rows, samples, batch=batch)
            told("checking what it says", None)
            answers = _answers(plan, built, store, rows, samples, batch=batch)
            agreement = _agreement(expected, answers, loaded)
    deployment = Deployment(
        name=name,
        artifact=built.digest,
        engine=engine.name,
        settings=settings,
        source=source.digest,
        plan=plan.json,
        verdict=VERDICT,
        host=built.host or this_host().fingerprint,
        versions=versions(),
        batch=batch,
        preprocess=None if source.preprocess is None else dict(source.preprocess),
        classes=list(samples.classes) if samples.classes else None,
        claims={"agreement": dict(agreement)},
        serving=serving or Serving(),
    )
    deployment = with_steps(deployment, source, None if answers is None else answers.outputs)
    files = {} if answers is None else {GOLDEN: encode_golden(answers)}
    path = write_deployment(deployment, built, folder, files=files)
    kept = 0 if answers is None else len(next(iter(answers.inputs.values())))
    return Deployed(
        path=path,
        deployment=deployment,
        agreement=agreement,
        golden_rows=kept,
        note=None if kept else f"no answers were checked or kept: {NO_ROWS}",
    )


def _batch(signature: Signature) -> int:
    """Give the batch that all inputs are fixed at; 1 where they are open, or have none in common."""
    lengths = {spec.shape[0] if spec.shape else None for spec in signature.inputs}
    return first if len(lengths) == 1 and isinstance(first := lengths.pop(), int) else 1


def _answers(plan: Plan, built: Artifact, store: Store, folder: Path, samples: Samples, *, batch: int) -> Golden:
    """Ask what was built for its answers to ``samples``, which were saved in ``folder``."""
    limits = Limits(cpus=cpus_for(plan.threads))
    with open_isolated(plan.engine, built, store, folder, batch=batch, limits=limits, seed=0) as session:
        return golden_of(session, samples)


def _agreement(expected: Golden, got: Golden, engine: Engine) -> dict[str, float]:
    """Give how far each output is off. Raises Untrusted where one is too far, for the precision of ``engine``."""
    lower = engine.precision if engine.precision != "float32" and engine.precision in TOLERANCES else None
    assert_agrees(expected.outputs, got.outputs, dtype=lower)
    return {
        name: relative_error(array, got.outputs[name]) if array.dtype.kind not in TEXT else 0.0
        for name, array in expected.outputs.items()
    }
