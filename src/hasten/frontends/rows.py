"""Outputs that have the inputs' rows under another name: seen by running the model, and then called the same.

Shape inference loses sight of the rows on its way through some operators (Reshape, ArrayFeatureExtractor, as exporters
of scikit-learn's classifiers put them at the end) and calls the axis after nothing. A model whose tensors have no axis
in common could not be run on several samples at once.
"""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

import onnx

from hasten.errors import BadInput, BuildFailed, SignatureMismatch, Unsupported
from hasten.frontends.reference import random_feed, run_reference
from hasten.graph.model import signature_of, write_model
from hasten.samples import Samples
from hasten.tensors import Feed

LENGTHS = (2, 5)
"""Rows that a model is run on: an axis that has both has the rows."""


def name_rows(model: onnx.ModelProto, samples: Samples | None, beside: Path) -> list[str]:
    """Call the first axis of every output as the inputs', in place, where it always has their rows.

    Args:
        model: Its inputs' and outputs' dimensions have names.
        samples: What to run it on; without any, or with too few, random numbers.
        beside: A folder beside which there is room for the model's files.

    Returns:
        The outputs whose axis was renamed; none where the model cannot be run.
    """
    rows, others = _names(model)
    if rows is None or not others:
        return []
    with tempfile.TemporaryDirectory(dir=beside.parent) as folder:
        inside = Path(folder) / "rows"
        inside.mkdir()
        write_model(model, inside)
        try:
            for length in LENGTHS:
                got = run_reference(inside / "model.onnx", _feed(model, samples, length))
                apart = {name for output, name in others.items() if got[output].shape[:1] != (length,)}
                others = {output: name for output, name in others.items() if name not in apart}
        except (Unsupported, BuildFailed):
            return []
    renamed = set(others.values())
    for value in model.graph.output:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in renamed:
                dim.dim_param = rows
    return sorted(others)


def _names(model: onnx.ModelProto) -> tuple[str | None, dict[str, str]]:
    """Give the name of the inputs' first axis, and by output those of other first axes that are nowhere else."""
    signature = signature_of(model)
    firsts = {spec.shape[0] if spec.shape else None for spec in signature.inputs}
    rows = firsts.pop() if len(firsts) == 1 else None
    if not isinstance(rows, str):
        return None, {}
    elsewhere = {dim for spec in signature.inputs for dim in spec.shape}
    elsewhere |= {dim for spec in signature.outputs for dim in spec.shape[1:]}
    first_of = {spec.name: spec.shape[0] for spec in signature.outputs if spec.shape}
    return rows, {name: dim for name, dim in first_of.items() if isinstance(dim, str) and dim not in elsewhere}


def _feed(model: onnx.ModelProto, samples: Samples | None, length: int) -> Feed:
    signature = signature_of(model)
    if samples is not None and len(samples) >= length:
        with contextlib.suppress(SignatureMismatch, BadInput):  # told where they are needed
            samples.check(signature)
            return samples.feed(slice(0, length))
    return {name: array[:length] for name, array in random_feed(signature).items()}
