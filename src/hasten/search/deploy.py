"""What a bundle gets beside the model: golden answers to check it by, and steps so that it takes what people have."""

from __future__ import annotations

from dataclasses import replace

from hasten.artifact import Artifact, Json
from hasten.deployment import Deployment
from hasten.errors import HastenError, StoreError
from hasten.golden import LARGEST_BYTES, Golden
from hasten.measure.worker import IsolatedSession
from hasten.samples import Samples
from hasten.search.bench import Bench
from hasten.search.result import Trial
from hasten.steps.confidence import are_shares
from hasten.steps.from_preprocess import steps_of_samples
from hasten.tensors import TOLERANCES, Feed, Signature, relative_error

GOLDEN_ROWS = 16
"""Rows of the certify split that are kept with their answers."""

GOLDEN_BYTES = LARGEST_BYTES // 8
"""Rows are fewer where they would take more: the file is read at every start."""

TIMES_APART = 4.0
"""A served batch is another one again than the two that were compared here: it may lie so many times as far off."""

SHOWN_CLASSES = 5

TEXT = "OSU"
"""Kinds of NumPy dtypes that no distance is measured in."""

NO_ROWS = "its tensors have no axis of samples in common"


def golden_answers(bench: Bench, trial: Trial, built: Artifact) -> Golden | None:
    """Ask the very files that are deployed for their answers to some certified samples; None where that fails."""
    if not has_rows(built.signature, bench.task.goal.batch):
        bench.note(f"no golden answers were kept with the deployment: {NO_ROWS}")
        return None
    samples = bench.task.load("certify")
    try:
        with bench.session(trial.plan, built, name=trial.key, split="certify") as session:
            return golden_of(session, samples)
    except StoreError:
        raise
    except HastenError as error:
        bench.note(f"no golden answers were kept with the deployment: {error}")
        return None


def has_rows(signature: Signature, batch: int) -> bool:
    """Say whether all tensors have a row for each sample: axis 0 is open, or one long, or the batch."""
    firsts = {spec.shape[0] if spec.shape else None for spec in (*signature.inputs, *signature.outputs)}
    return len(firsts) == 1 and (isinstance(first := firsts.pop(), str) or first in (1, batch))


def golden_of(session: IsolatedSession, samples: Samples) -> Golden:
    """Ask a session for its answers to the first of its samples, each alone and all together.

    Where these lie further apart than the dtype allows, as with integers whose scale is that of the batch, the golden
    answers say so.

    Raises:
        HastenError: it does not answer.
    """
    row_bytes = sum(array[:1].nbytes for array in samples.inputs.values())
    rows = max(1, min(GOLDEN_ROWS, len(samples), GOLDEN_BYTES // max(row_bytes, 1)))
    alone, together = session.outputs(0, rows, 1), session.outputs(0, rows, rows)
    within: dict[str, float] = {}
    for name, array in alone.items():
        if array.dtype.kind in TEXT:
            continue
        apart = relative_error(array, together[name])
        usual = TOLERANCES[array.dtype.name].relative if array.dtype.name in TOLERANCES else 0.0
        if TIMES_APART * apart > usual:
            within[name] = TIMES_APART * apart
    return Golden(samples.feed(slice(0, rows)), alone, within)


def with_steps(deployment: Deployment, source: Artifact, outputs: Feed | None) -> Deployment:
    """Add the steps that samples of images were read with, and names where the classes are known.

    The model itself stays to be had under NAME.raw. Nothing changes where samples were no images.
    """
    pre = steps_of_samples(source)
    if not pre:
        return deployment
    post = [] if outputs is None else _names(deployment, source.signature, outputs)
    return replace(deployment, pre=tuple(pre), post=tuple(post), raw=True)


def _names(deployment: Deployment, signature: Signature, outputs: Feed) -> list[dict[str, Json]]:
    """Write the steps from the scores of classes to their names, the first of ``outputs`` being scores."""
    name = signature.outputs[0].name
    scores, classes = outputs.get(name), deployment.classes
    if not classes or scores is None or scores.shape[1:] != (len(classes),) or scores.dtype.kind != "f":
        return []
    if {"label", "score"} & {spec.name for spec in signature.outputs}:
        return []
    best: dict[str, Json] = {"step": "top-k", "input": name, "k": min(SHOWN_CLASSES, len(classes)), "keep": True}
    return [best] if are_shares(scores) else [{"step": "softmax", "input": name}, best]
