"""Which units of a channel group matter: the norms of the weights that make them, read from the graph alone.

The norm of a filter as a measure of its importance: H. Li, A. Kadav, I. Durdanovic, H. Samet, H. P. Graf, "Pruning
filters for efficient ConvNets", ICLR 2017 (arXiv:1608.08710).
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx

from hasten.errors import InvalidSetting
from hasten.graph.groups import Group, Slot
from hasten.graph.model import Graph, attribute, is_standard
from hasten.tensors import Array

Order = Literal[1, 2]
Floats = npt.NDArray[np.float64]


def unit_norms(model: onnx.ModelProto, group: Group, order: Order) -> Floats:
    """Give the norm of the weights behind each unit of a group, [size].

    Several layers may make the same units, as those that add to one residual stream do; each layer's norms are taken
    relative to their mean, so that none outweighs the others by its scale, and averaged. A batch-norm right behind a
    layer counts as folded into it: ranks are the same before and after folding. Weights behind a DequantizeLinear
    count as what they stand for. Biases do not count.

    Args:
        model: The graph that the group is of, with its weights.
        group: Of ``channel_groups(model)``.
        order: 1 for the sum of magnitudes, 2 for the Euclidean norm.
    """
    graph = Graph(model)
    total = np.zeros(group.size)
    for slot in group.slots:
        if slot.role == "makes" and (weight := _real(graph, slot)) is not None and weight.ndim >= 2:
            norms = _slot_norms(weight * _folded_scale(graph, slot, weight), slot, group.size, order)
            total += norms / max(float(norms.mean()), np.finfo(np.float64).tiny)
    return total


def largest(scores: npt.ArrayLike, n: int) -> tuple[int, ...]:
    """Give the ``n`` units with the largest scores, in rising order of units. Of equals, the first ones stay.

    Raises:
        InvalidSetting: there are not so many units, or ``n`` is under 1.
    """
    values = np.asarray(scores, dtype=np.float64)
    if not 1 <= n <= len(values):
        raise InvalidSetting(f"{n} units cannot be kept of {len(values)}; keep 1 at least, and no more than there are")
    order = np.argsort(-values, kind="stable")
    return tuple(sorted(int(unit) for unit in order[:n]))


def _slot_norms(weight: Floats, slot: Slot, size: int, order: Order) -> Floats:
    """Add up the entries of each unit along the slot's axis, [size]; a unit may own several entries (a head does)."""
    rows = np.abs(np.moveaxis(weight, slot.axis, 0).reshape(weight.shape[slot.axis], -1)) ** order
    units = np.asarray(slot.units)
    owned = units >= 0
    total = np.zeros(size)
    np.add.at(total, units[owned], rows.sum(axis=1)[owned])
    return np.asarray(total ** (1 / order), dtype=np.float64)


def _real(graph: Graph, slot: Slot) -> Floats | None:
    """Give a slot's tensor in float64, dequantized where the graph does that; None where it is no initializer."""
    value = graph.constant(slot.tensor)
    if value is None:
        return None
    real = value.astype(np.float64)
    for node in graph.consumers.get(slot.tensor, []):
        if node.op_type == "DequantizeLinear" and is_standard(node) and node.input[0] == slot.tensor:
            scale = graph.constant(node.input[1])
            zero = graph.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else None
            if scale is None:
                return real
            axis = int(attribute(node, "axis", 1))
            return (real - _along(zero, real.ndim, axis)) * _along(scale, real.ndim, axis)
    return real


def _along(value: Array | None, ndim: int, axis: int) -> Floats:
    """Lay a vector along one axis of ``ndim``; a scalar stays one, None is zero."""
    array = np.zeros(()) if value is None else value.astype(np.float64)
    shape = [1] * ndim
    if array.size > 1:
        shape[axis] = array.size
    return array.reshape(shape if array.ndim else ())


def _folded_scale(graph: Graph, slot: Slot, weight: Floats) -> Floats:
    """Give what a batch-norm behind the layer multiplies each channel with, laid along the slot's axis; else one."""
    for node in graph.consumers.get(_dequantized_name(graph, slot.tensor), []):
        user = graph.only_consumer(node.output[0])
        if user is None or user.op_type != "BatchNormalization" or user.input[0] != node.output[0]:
            continue
        scale, variance = graph.constant(user.input[1]), graph.constant(user.input[4])
        if scale is None or variance is None or scale.size != weight.shape[slot.axis]:
            continue
        epsilon = float(attribute(user, "epsilon", 1e-5))
        return _along(scale / np.sqrt(variance.astype(np.float64) + epsilon), weight.ndim, slot.axis)
    return np.ones(())


def _dequantized_name(graph: Graph, tensor: str) -> str:
    user = graph.only_consumer(tensor)
    return str(user.output[0]) if user is not None and user.op_type == "DequantizeLinear" else tensor
