"""How many units each channel group keeps: the measured staircase, the grid, and widths from a share of the products.

A width is the number of units that a group keeps. Which units those are, ``hasten.graph.importance.largest`` says:
the most important ones.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx

from hasten.errors import InvalidSetting, UnknownName, Unsupported
from hasten.graph.costs import kind_of, operators_of
from hasten.graph.groups import Group
from hasten.graph.model import Graph
from hasten.graph.products import PRODUCTS
from hasten.tensors import Signature

Scores = npt.NDArray[np.float64]
"""Importance of each unit of a group [size], not negative."""

SAME_TIME = 0.02
"""Two measured times this close are one (docs/decisions/0004)."""

LEAST_SHARE = 1 / 8
"""A share asked for never takes more of a group than this leaves: beyond, a layer is a bottleneck for all others."""

OPEN_LENGTH = 64
"""An axis of open length is taken this long where there are no samples to tell: long enough for any chain of strides
to leave something, so that layers weigh against each other as they will."""


def staircase(ns_by_width: Mapping[int, float], *, tolerance: float = SAME_TIME) -> tuple[int, ...]:
    """Give the widths that are worth considering, ascending: the right edges of the stairs of time over width.

    A width is dropped where a wider one takes no more than ``tolerance`` longer: it would lose units and gain nothing.

    Args:
        ns_by_width: The measured time of each width, in nanoseconds.
        tolerance: The relative difference up to which two times are one.
    """
    kept: list[int] = []
    least = math.inf
    """The shortest time of any wider width."""
    for width in sorted(ns_by_width, reverse=True):
        if least > ns_by_width[width] * (1 + tolerance):
            kept.append(width)
        least = min(least, ns_by_width[width])
    return tuple(reversed(kept))


@dataclass(frozen=True, kw_only=True)
class Stairs:
    """The widths that one group may have: multiples of ``step`` from ``least`` on, and its ``size``."""

    size: int
    step: int
    least: int

    @classmethod
    def of(cls, group: Group, grid: int) -> Stairs:
        """Give the stairs on which the group's channels are a multiple of ``grid``.

        A unit of several channels, such as an attention head, makes for longer strides: 64 channels a head fit a grid
        of 8 with any number of heads.
        """
        step = grid // math.gcd(grid, entries_per_unit(group))
        # Two at least: a group of one unit is none any more, and rounds look for it again.
        least = max(2, math.ceil(group.size * LEAST_SHARE / step) * step)
        return cls(size=group.size, step=step, least=min(group.size, least))

    def below(self, width: int) -> int | None:
        """Give the next width down, or None at the foot."""
        lower = (width - 1) // self.step * self.step
        return lower if lower >= self.least else None

    def nearest(self, width: float) -> int:
        """Give the width of the stairs that is nearest, the larger of two."""
        steps = math.floor(width / self.step + 0.5) * self.step
        on_grid = min(self.size, max(self.least, steps))
        return self.size if abs(self.size - width) <= abs(on_grid - width) else on_grid


def entries_per_unit(group: Group) -> int:
    """Give how many channels a unit has in the tensors that make it: 1, or as many as an attention head is deep."""
    counts = (Counter(unit for unit in slot.units if unit >= 0) for slot in group.slots if slot.role == "makes")
    return max((max(count.values()) for count in counts if count), default=1)


def check_widths(widths: Mapping[str, int], groups: Sequence[Group]) -> None:
    """Check that each name is a group's and that each width fits it.

    Raises:
        UnknownName: names the first that is not there, with the nearest.
        InvalidSetting: a width is below 1 or above the size of its group.
    """
    sizes = {group.name: group.size for group in groups}
    for name, width in widths.items():
        if name not in sizes:
            raise UnknownName("channel group", name, sizes)
        if not 1 <= width <= sizes[name]:
            raise InvalidSetting(
                f"widths: group {name!r} has {sizes[name]} units and cannot keep {width}; keep 1 or more"
            )


def scheduled(start: int, end: int, *, share: float) -> float:
    """Give the width after ``share`` (0 to 1) of the way from ``start`` to ``end``, in equal ratios."""
    return float(start * (end / start) ** share)


# What a node multiplies, as a function of the widths.

Axis = tuple[tuple[str, float], ...]
"""Which share of one axis belongs to which group; the rest of the axis stays."""

Terms = tuple[tuple[float, tuple[Axis, ...]], ...]


@dataclass(frozen=True, kw_only=True)
class Product:
    """A node that multiplies. Uncut it makes ``macs`` multiply-accumulates, spread over ``terms``."""

    macs: float
    terms: Terms
    """Each a share of ``macs``, in proportion to the lengths of some axes."""

    def cost(self, kept: Mapping[str, float]) -> float:
        """Give its multiply-accumulates where a share ``kept`` of each group's units is left (1 where not named)."""
        total = 0.0
        for share, axes in self.terms:
            for axis in axes:
                share *= 1.0 - sum(part * (1.0 - kept.get(name, 1.0)) for name, part in axis)
            total += share
        return self.macs * total

    @property
    def groups(self) -> frozenset[str]:
        """The groups that its cost depends on."""
        return frozenset(name for _, axes in self.terms for axis in axes for name, _ in axis)


def products_of(model: onnx.ModelProto, groups: Sequence[Group], dims: Mapping[str, int]) -> tuple[Product, ...]:
    """List the products of a model with how their cost follows the widths of ``groups``.

    A product with a constant factor costs in proportion to what is left of that factor. One of two activations, as in
    attention, costs in proportion to the group that makes both of them (heads, or the axis that is summed over), and
    is taken as constant where there is none.

    Args:
        model: What the groups were found in.
        groups: Of ``channel_groups``.
        dims: The length of each symbolic dimension of the inputs; one that is not named is 1.
    """
    graph = Graph(model)
    axes, origins = _axes(graph, groups), _origins(graph)
    costs = _macs_by_node(model, dims)
    found = []
    for node in graph.nodes:
        if not (cost := costs.get(_name(node))):
            continue
        weights = tuple(dict.fromkeys(tensor for name in node.input for tensor in origins.get(name, ())))
        if weights:
            terms = _terms(weights, graph, axes)
        else:
            shared = _shared(node, graph, groups, costs, origins)
            terms = ((1.0, (((shared, 1.0),),) if shared else ()),)
        found.append(Product(macs=cost, terms=terms))
    return tuple(found)


def macs(model: onnx.ModelProto, dims: Mapping[str, int]) -> float:
    """Count the multiply-accumulates of one run; ``dims`` as for ``products_of``."""
    return sum(_macs_by_node(model, dims).values())


def open_lengths(signature: Signature) -> dict[str, int]:
    """Give a length for each symbolic dimension of the inputs: 1 for what they begin with, ``OPEN_LENGTH`` else."""
    batch = {spec.shape[0] for spec in signature.inputs if spec.shape}
    names = {dim for spec in signature.inputs for dim in spec.shape if isinstance(dim, str)}
    return {name: 1 if name in batch else OPEN_LENGTH for name in sorted(names)}


def widths_for(
    products: Sequence[Product],
    stairs: Mapping[str, Stairs],
    scores: Mapping[str, Scores],
    *,
    target: float,
) -> dict[str, int]:
    """Choose widths that leave at most ``target`` multiply-accumulates and lose little importance.

    Greedy: again and again the group goes one stair down that loses the least importance for each multiply-accumulate
    saved (the cost-aware criterion of P. Molchanov et al., "Pruning convolutional neural networks for resource
    efficient inference", arXiv 1611.06440, section 2.3, as a ratio).

    Args:
        products: Of ``products_of``, for the model as it is.
        stairs: By group.
        scores: By group: of the units that it has now. All groups' are on one scale: changes of the loss are by their
            nature, norms where they are relative to the mean of their layer, as ``unit_norms`` gives them (so too
            G. Fang et al., "DepGraph: towards any structural pruning", arXiv 2301.12900).
        target: In multiply-accumulates.

    Raises:
        Unsupported: the target is out of reach; says what is within.
    """
    state = _Descent(products, stairs, scores)
    start = state.total
    while state.total > target * (1 + 1e-9):
        if (name := state.cheapest()) is None:
            raise Unsupported(
                "prune-channels",
                f"it would have to leave {target / start:.1%} of the multiply-accumulates, and with an eighth of each "
                f"group kept, in steps of its grid, {state.total / start:.1%} are left; ask for a larger ratio",
            )
        state.descend(name)
    return state.widths


class _Descent:
    """Widths on their way down, and what the next stair of each group would lose and save."""

    def __init__(
        self,
        products: Sequence[Product],
        stairs: Mapping[str, Stairs],
        scores: Mapping[str, Scores],
    ) -> None:
        self.widths = {name: len(values) for name, values in scores.items()}
        self.total = sum(product.cost({}) for product in products)
        self._stairs = stairs
        self._sizes = dict(self.widths)
        self._lost = {name: np.concatenate([[0.0], np.cumsum(np.sort(values))]) for name, values in scores.items()}
        self._touched = {name: [p for p in products if name in p.groups] for name in scores}
        self._next = {name: self._look(name) for name in scores}

    def cheapest(self) -> str | None:
        """Name the group whose next stair loses least for what it saves; None where all are at their foot."""
        found = [(step[0], name) for name, step in self._next.items() if step is not None]
        return min(found)[1] if found else None

    def descend(self, name: str) -> None:
        """Take a group one stair down."""
        step = self._next[name]
        assert step is not None  # noqa: S101 - ``cheapest`` names no other
        _, self.widths[name], saved = step
        self.total -= saved
        for other in {name}.union(*(product.groups for product in self._touched[name])):
            self._next[other] = self._look(other)

    def _look(self, name: str) -> tuple[float, int, float] | None:
        """Give loss for each multiply-accumulate, the width, and what it saves; None where there is no such stair."""
        width, size, lost = self.widths[name], self._sizes[name], self._lost[name]
        lower = self._stairs[name].below(width)
        if lower is None:
            return None
        kept = {other: self.widths[other] / self._sizes[other] for other in self.widths}
        after = {**kept, name: lower / size}
        saved = sum(product.cost(kept) - product.cost(after) for product in self._touched[name])
        if saved <= 0:
            return None
        return float(lost[size - lower] - lost[size - width]) / saved, lower, saved


def _macs_by_node(model: onnx.ModelProto, dims: Mapping[str, int]) -> dict[str, float]:
    """Give the multiply-accumulates of each node that makes some, by its name or first output."""
    found: dict[str, float] = {}
    for operator in operators_of(model, dims):
        formula = PRODUCTS.get(kind_of(operator))
        if formula and (count := formula(operator)):
            found[operator.name] = found.get(operator.name, 0.0) + count
    return found


def _axes(graph: Graph, groups: Iterable[Group]) -> dict[str, tuple[Axis, ...]]:
    """Give for each initializer that groups have a part in, axis by axis, how large that part is."""
    entries: dict[tuple[str, int], dict[str, npt.NDArray[np.bool_]]] = {}
    for group in groups:
        for slot in group.slots:
            taken = np.asarray(slot.units) >= 0
            parts = entries.setdefault((slot.tensor, slot.axis), {})
            parts[group.name] = parts[group.name] | taken if group.name in parts else taken
    found: dict[str, list[Axis]] = {}
    for (tensor, _), parts in sorted(entries.items()):
        if len(graph.initializers[tensor].dims) > 1:
            found.setdefault(tensor, []).append(tuple((name, float(taken.mean())) for name, taken in parts.items()))
    return {tensor: tuple(axes) for tensor, axes in found.items()}


def _origins(graph: Graph) -> dict[str, tuple[str, ...]]:
    """Give for each constant tensor the matrices among the initializers that it is computed from."""
    origins: dict[str, tuple[str, ...]] = {
        name: (name,) if len(tensor.dims) > 1 else () for name, tensor in graph.initializers.items()
    }
    for node in graph.nodes:
        inputs = [name for name in node.input if name]
        if inputs and all(name in origins for name in inputs):
            origins |= dict.fromkeys(node.output, tuple(tensor for name in inputs for tensor in origins[name]))
    return origins


def _terms(weights: Sequence[str], graph: Graph, axes: Mapping[str, tuple[Axis, ...]]) -> Terms:
    """Spread a product over its constant factors, of which a recurrent layer has two."""
    sizes = {tensor: math.prod(graph.initializers[tensor].dims) for tensor in weights}
    return tuple((size / sum(sizes.values()), axes.get(tensor, ())) for tensor, size in sizes.items())


def _shared(
    node: onnx.NodeProto,
    graph: Graph,
    groups: Sequence[Group],
    costs: Mapping[str, float],
    origins: Mapping[str, tuple[str, ...]],
) -> str | None:
    """Name the group that makes both factors of a product of activations, or None.

    From each factor, the way leads up to the nearest nodes that make channels: products with weights.
    """
    makers = {name for group in groups for name in group.makers}
    found: set[str] = set()
    seen = set(origins)
    names = list(node.input)
    while names:
        if not (name := names.pop()) or name in seen:
            continue
        seen.add(name)
        maker = graph.producers.get(name)
        if maker is None:
            return None  # an input of the graph
        weighted = _name(maker) in costs and any(origins.get(tensor) for tensor in maker.input)
        if weighted or _name(maker) in makers:
            found.add(_name(maker))
        else:
            names += maker.input
    return next((group.name for group in groups if found and found <= set(group.makers)), None)


def _name(node: onnx.NodeProto) -> str:
    return node.name or node.output[0]
