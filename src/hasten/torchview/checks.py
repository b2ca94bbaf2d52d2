"""What must hold of a view before it is trained, and its outputs on samples."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

import numpy as np
import torch

from hasten.errors import HastenError, UnknownName, Unsupported
from hasten.samples import Samples
from hasten.tensors import Array, relative_error
from hasten.torchview.arrays import to_numpy
from hasten.torchview.batches import Rows, in_turn, inputs_of
from hasten.torchview.view import View

QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")

CHECKED_ROWS = 16
"""Samples that the independence of rows is tried on."""

TOLERANCE = 1e-3
"""Kernels sum in another order at another batch length, which moves float32 by 1e-6 or so, through deep layers more."""

QUANTIZED_TOLERANCE = 5e-2
"""In a quantized graph such a move may tip a value to the next step, and that one others behind it."""


def outputs_of(view: View, samples: Samples, batch: int = 64) -> dict[str, Array]:
    """Give a view's outputs on all samples, in evaluation mode, by name: [n, ...], in the order of the samples.

    The mode that the view is in is kept. It runs where its parameters are.

    Args:
        view: The model.
        samples: With the inputs that it wants; labels are not looked at.
        batch: Samples at a time.
    """
    parts = [_outputs(view, samples, rows) for rows in in_turn(np.arange(len(samples)), batch)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def check_rows_independent(view: View, samples: Samples, seed: int = 0) -> None:
    """Check that a sample's output does not depend on the others in its batch, nor on their order.

    A model fails that was exported with batch-norm in training mode, or that computes across the batch axis: what it
    answers, and so its accuracy, is then a matter of how samples are put together.

    Args:
        view: The model; it is run in evaluation mode.
        samples: The first rows of a random order are tried. With one sample there is nothing to try.
        seed: Of the order.

    Raises:
        Unsupported: names the output that changes, or the batch length that the graph cannot take.
    """
    rows = np.random.default_rng(seed).permutation(len(samples))[:CHECKED_ROWS]
    n = len(rows)
    whole = _tried(view, samples, rows)
    for name, array in whole.items():
        if array.ndim == 0 or len(array) != n:
            raise Unsupported("train", f"output {name!r} is {list(array.shape)} for {n} samples: it has none for each")
    order = np.random.default_rng([seed, 1]).permutation(n)
    tries = {"their order": order, "their number": np.arange(max(n // 2, 1)), "those beside it": np.arange(1)}
    limit = QUANTIZED_TOLERANCE if is_quantized(view) else TOLERANCE
    for what, chosen in tries.items():
        for name, array in _tried(view, samples, rows[chosen]).items():
            error = relative_error(whole[name][chosen], array)
            if error > limit:
                raise Unsupported(
                    "train",
                    f"output {name!r} of a sample changes by {error:.2g} of its largest value with the others of its "
                    f"batch ({what}); export the model in evaluation mode (batch-norm with running statistics)",
                )


def is_quantized(view: View) -> bool:
    """Tell whether the graph has quantized values: training is quantization-aware then."""
    return any(node.op_type in QUANTIZERS for node in view.model().graph.node)


def step_sizes_of(view: View) -> frozenset[str]:
    """Give the names of the parameters that are scales of quantized values."""
    scales = {node.input[1] for node in view.model().graph.node if node.op_type in QUANTIZERS}
    found = set()
    for name in scales:
        with contextlib.suppress(UnknownName):  # one that does not learn, or is tied to another
            found.add(id(view.tensor(name)))
    return frozenset(name for name, parameter in view.named_parameters() if id(parameter) in found)


def _tried(view: View, samples: Samples, rows: Rows) -> Mapping[str, Array]:
    try:
        return _outputs(view, samples, rows)
    except HastenError:
        raise
    except (RuntimeError, ValueError, IndexError) as error:
        reason = " ".join(str(error).split())[:300]
        raise Unsupported(
            "train", f"the graph cannot take a batch of {len(rows)} ({reason}); export it with an open batch axis"
        ) from error


def _outputs(view: View, samples: Samples, rows: Rows) -> dict[str, Array]:
    training = view.training
    view.eval()
    try:
        with torch.no_grad():
            made = view(*inputs_of(samples, rows, view.inputs, view.device).values())
    finally:
        view.train(training)
    return {name: to_numpy(value) for name, value in zip(view.outputs, made, strict=True)}
