"""The steps that do to an image what samples were read with: the same pixels in training, proof and serving."""

from __future__ import annotations

from typing import Any

from hasten.artifact import Artifact, Json
from hasten.samples.preprocess import Preprocess
from hasten.tensors import Signature

IMAGE = "image"
"""What a client's tensor is called."""


def steps_of_samples(artifact: Artifact) -> list[dict[str, Json]]:
    """Write the steps that an artifact's samples are read with; none where they are no images."""
    name = image_input(artifact.signature)
    if artifact.preprocess is None or name is None:
        return []
    return steps_of(Preprocess.of(artifact.preprocess), model_input=name)


def image_input(signature: Signature) -> str | None:
    """Give the only input that an image can be; None where there is none, or it is open which."""
    laid = [spec.name for spec in signature.inputs if len(spec.shape) == 4]
    return laid[0] if len(laid) == 1 else None


def steps_of(preprocess: Preprocess, *, model_input: str) -> list[dict[str, Json]]:
    """Write the steps before the model, as a deployment has them."""
    decode: dict[str, Any] = {"step": "decode-image", "input": IMAGE, "color": preprocess.color}
    steps: list[dict[str, Json]] = [{**decode, "orientation": "stored", "alpha": "drop"}]
    if preprocess.resize is not None:
        height, width = preprocess.resize
        steps.append({"step": "resize", "input": IMAGE, "mode": "exact", "height": height, "width": width})
    if preprocess.crop is not None:
        height, width = preprocess.crop
        steps.append({"step": "center-crop", "input": IMAGE, "height": height, "width": width})
    numbers: dict[str, Json] = {"step": "normalise", "input": IMAGE, "output": model_input, "scale": preprocess.scale}
    for name in ("mean", "std"):
        if values := getattr(preprocess, name):
            numbers[name] = list(values)
    steps.append({**numbers, "layout": preprocess.layout, "dtype": preprocess.dtype})
    return steps
