"""Outputs that have the inputs' rows without a name for it: seen by running the model, and then called the same.

Shape inference loses sight of the rows on its way through some operators (Reshape, ArrayFeatureExtractor, as exporters
of scikit-learn's classifiers put them at the end). A model whose tensors have no axis in common could not be run on
several samples at once.
"""

from __future__ import annotations

import contextlib
import math
import re
import tempfile
from pathlib import Path

import numpy as np
import onnx

from hasten.errors import BadInput, HastenError, SignatureMismatch
from hasten.frontends.reference import SYMBOLIC_LENGTH, random_feed, run_references
from hasten.graph.model import signature_of, write_model
from hasten.isolation import Limits
from hasten.samples import Samples
from hasten.tensors import Array, Feed, Signature, TensorSpec, assert_agrees

LENGTHS = (2, 5, 67)
"""Rows that a model is run on: an axis that has each of them has the rows."""

SLICES = (slice(None), *(slice(0, length) for length in LENGTHS[:-1]), slice(-LENGTHS[1], None))
"""Which of the most rows each run has: all, the first ones, and the last ones without those before them."""

AS_DATA_SAY = {"Compress", "If", "Loop", "NonMaxSuppression", "NonZero", "Scan", "Unique"}
"""Operators whose outputs may be as long as the data say, and not the rows."""

LARGEST_BYTES = 256 << 20
"""Of the inputs; a model that takes more for so many rows is left as it is."""

LIMITS = Limits(seconds=120)


def name_rows(model: onnx.ModelProto, samples: Samples | None, beside: Path) -> list[str]:
    """Call the first axis of every output as the inputs', in place, where it has their rows and no name of its own.

    It has them where it is as long as each of ``LENGTHS``, and a row does not change with those before or behind it.

    Args:
        model: Its inputs' and outputs' dimensions have names.
        samples: What to run it on, repeated as needed; without any, random numbers.
        beside: A folder beside which there is room for the model's files.

    Returns:
        The outputs whose axis was renamed; none where the model cannot be run.
    """
    signature = signature_of(model)
    rows, others = _names(signature)
    if not others or any(node.op_type in AS_DATA_SAY for node in model.graph.node):
        return []
    feed = _feed(signature, rows, samples)
    if feed is None:
        return []
    with tempfile.TemporaryDirectory(dir=beside.parent) as folder:
        inside = Path(folder) / "rows"
        inside.mkdir()
        write_model(model, inside)
        feeds = [{name: array[rows] for name, array in feed.items()} for rows in SLICES]
        try:
            runs = run_references(inside / "model.onnx", feeds, LIMITS)
        except HastenError:
            return []
    apart = {name for output, name in others.items() if not _has_rows([run[output] for run in runs])}
    found = {output: name for output, name in others.items() if name not in apart}
    for value in model.graph.output:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in found.values():
                dim.dim_param = rows
    return sorted(found)


def _names(signature: Signature) -> tuple[str, dict[str, str]]:
    """Give the name of the inputs' first axis, and by output those of first axes that are nowhere else.

    A name that the exporter gave says that the axis is another; those that nobody gave are ours, and inference's.
    """
    firsts = {spec.shape[0] if spec.shape else None for spec in signature.inputs}
    rows = firsts.pop() if len(firsts) == 1 else None
    elsewhere = {dim for spec in signature.inputs for dim in spec.shape[1:]}
    if not isinstance(rows, str) or rows in elsewhere:
        return "", {}
    elsewhere |= {rows, *(dim for spec in signature.outputs for dim in spec.shape[1:])}
    first_of = {spec.name: spec.shape[0] for spec in signature.outputs if spec.shape}
    return rows, {
        name: dim
        for name, dim in first_of.items()
        if isinstance(dim, str) and dim not in elsewhere and (dim == f"{name}_dim0" or GENERATED.fullmatch(dim))
    }


GENERATED = re.compile(r"unk__\d+")
"""What ONNX's inference calls a length that it does not know."""


def _feed(signature: Signature, rows: str, samples: Samples | None) -> Feed | None:
    """Give inputs of the largest length; None where they would be too large, or all rows alike: these prove nothing."""
    most, feed = max(LENGTHS), None
    if samples is not None and len(samples):
        with contextlib.suppress(SignatureMismatch, BadInput):  # told where they are needed
            samples.check(signature)
            held = samples.feed(slice(0, most))
            if most * sum(array[:1].nbytes for array in held.values()) > LARGEST_BYTES:
                return None
            feed = {name: np.resize(array, (most, *array.shape[1:])) for name, array in held.items()}
    if feed is None:
        if sum(_row_bytes(spec) for spec in signature.inputs) * most > LARGEST_BYTES:
            return None
        feed = random_feed(signature, lengths={rows: most})
    return None if all(np.array_equal(array[1:], array[:-1]) for array in feed.values()) else feed


def _row_bytes(spec: TensorSpec) -> int:
    """Give what a row of made-up numbers takes while they are drawn, in float64."""
    return 8 * math.prod(SYMBOLIC_LENGTH if isinstance(dim, str) else dim for dim in spec.shape[1:])


def _has_rows(outputs: list[Array]) -> bool:
    """Say whether an output [rows, ...] has the rows of each run, and the same ones where they were the same."""
    whole = outputs[0]
    if whole.shape[:1] != (max(LENGTHS),):
        return False
    try:
        for rows, output in zip(SLICES, outputs, strict=True):
            assert_agrees({"rows": whole[rows]}, {"rows": output}, what="output")
    except HastenError:
        return False
    return True
