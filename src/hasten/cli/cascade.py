"""``hasten cascade``: two deployments become one, the cheap one asked first, its threshold chosen on data."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
from cyclopts import Parameter
from rich.text import Text

from hasten.cli import units
from hasten.cli.answer import COMMON, Answer, Common, python_answer
from hasten.cli.models import DATA, DataOptions
from hasten.composition import Confidence
from hasten.deployment import FILE, read_deployment
from hasten.errors import BadInput, ModelNotReady
from hasten.measure.cascade import ChosenThreshold, choose_threshold
from hasten.samples import Samples
from hasten.serve.model import Model
from hasten.serve.repository import open_repository
from hasten.serve.service import Service
from hasten.steps.confidence import are_shares
from hasten.steps.from_preprocess import steps_of_samples
from hasten.store import write_atomically
from hasten.tensors import Array


def cascade(
    first: Path,
    last: Path,
    /,
    *,
    data: str,
    output: Annotated[Path, Parameter(name=("--output", "-o"))],
    scores: str | None = None,
    max_drop: Annotated[float, units.read_by(units.share)] = 0.01,
    confidence: Confidence = "top-1",
    samples: DataOptions = DATA,
    common: Common = COMMON,
) -> Answer:
    r"""Make a cascade of two deployments: the second is asked only where the first is in doubt.

    The threshold is the lowest at which the data prove that no more accuracy is lost than allowed.

    .. code-block:: console

        hasten cascade models/small models/large --data val.parquet \
            --max-drop 1% -o models/both/deployment.toml

    Args:
        first: The cheap deployment, in the folder of models that will be served.
        last: The one that is right more often.
        data: Samples with labels that no model was trained on.
        output: The deployment.toml to write, in the same folder of models.
        scores: The output with a score for each class; by default the only one that both give.
        max_drop: Accuracy that may be lost against the second.
        confidence: The best probability, or its margin over the second.
        samples: How samples are read.
        common: The options of every verb.
    """
    if common.show_python:
        return python_answer(
            "from hasten.measure.cascade import choose_threshold",
            "",
            f"choose_threshold(first, last, labels, max_drop={max_drop}, kind={confidence!r}, logits=True)",
        )
    names = [member_name(path, output) for path in (first, last)]
    said = [asyncio.run(answers(path, data, samples)) for path in (first, last)]
    labels = said[0][1].labels
    if labels is None:
        raise BadInput(f"{data} has no labels; a threshold is chosen by what is right")
    name = scores or only_scores(said[0][0], said[1][0])
    ours, theirs = (each[0][name] for each in said)
    logits = not all(are_shares(each) for each in (ours, theirs))
    chosen = choose_threshold(ours, theirs, labels, max_drop=max_drop, kind=confidence, logits=logits)
    table = {"members": names, "thresholds": [chosen.threshold], "confidence": confidence, "scores": name}
    document = {"name": output.parent.name, "cascade": {**table, "softmax": logits}}
    write_atomically(output, msgspec.toml.encode(document))
    return Answer(document={"output": str(output), **asdict(chosen)}, shown=(Text(_summary(chosen, names, output)),))


def member_name(path: Path, output: Path) -> str:
    """Give the name under which a deployment is served beside the one to be written.

    Raises:
        BadInput: it is not; or what is to be written would take its place.
    """
    home, folder = output.resolve().parent.parent, (path if path.is_dir() else path.parent).resolve()
    if output.name != FILE or not folder.is_relative_to(home) or folder == home:
        raise BadInput(f"{path} and {output} must be MODELS/NAME and MODELS/OTHER/{FILE} in one folder of models")
    name = folder.relative_to(home).parts[0]
    if output.resolve().parent.name == name:
        raise BadInput(f"{output} lies in the folder of {path}, which it asks; write it to {home / 'OTHER' / FILE}")
    return name


async def answers(path: Path, data: str, options: DataOptions) -> tuple[dict[str, Array], Samples]:
    """Give what a deployment says of the samples, after its own last steps. Raises as ``hasten predict`` does."""
    file = path / FILE if path.is_dir() else path
    what, artifact = read_deployment(file)
    if what.pre and list(what.pre) != steps_of_samples(artifact):
        raise BadInput(
            f"{file} has steps before its model that samples are not read with: a threshold would be proven for other "
            "inputs than are served; take out [[pre]], or set the threshold by hand"
        )
    read = options.read(data, artifact)
    service = Service(open_repository(file))
    try:
        await service.start()
        model = service.models()[0] if service.models() else None
        if not isinstance(model, Model):
            raise ModelNotReady(f"{file} cannot be run: {service.index()[0]['reason']}")
        parts = [await model.answers(feed) for feed in read.batches(model.sizes[-1])]
        whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        pipeline = model.read.pipeline
        return (whole if pipeline is None else pipeline.finish(whole)), read
    finally:
        await service.stop(0.0)


def only_scores(first: dict[str, Array], last: dict[str, Array]) -> str:
    """Give the only output that can be scores in both. Raises BadInput: there is none, or several."""
    found = [
        name
        for name, array in first.items()
        if name in last and array.ndim == 2 and array.dtype.kind == "f" and last[name].shape == array.shape
    ]
    wide = [name for name in found if first[name].shape[1] == max(first[other].shape[1] for other in found)]
    if len(wide) != 1:
        raise BadInput(f"it is open which output has the scores: {', '.join(found) or 'none fits'}; say --scores NAME")
    return wide[0]


def _summary(chosen: ChosenThreshold, names: list[str], output: Path) -> str:
    return (
        f"Below a confidence of {chosen.threshold:.4g}, {chosen.asked:.1%} of {chosen.rows} rows are asked of "
        f"{names[1]!r}; accuracy drops by {chosen.drop:.2%}, at most {chosen.drop_high:.2%}. Written to {output}."
    )
