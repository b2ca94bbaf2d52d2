"""Channel groups: what of a model may be cut, unit by unit, and what has to be cut together.

A unit is the set of all entries of all weights that go together (``channels``); a group is the set of units that
occur in the same tensors, so that any of them may be dropped as long as one stays. See G. Fang et al., "DepGraph:
towards any structural pruning", arXiv 2301.12900.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import onnx

from hasten.graph.channel_folds import FOLDS
from hasten.graph.channel_layers import LAYERS
from hasten.graph.channel_moves import MOVES
from hasten.graph.channels import Channels, Ints, Rule, name_of, trace

Role = Literal["makes", "reads", "carries"]

RULES: Mapping[str, Rule] = {**LAYERS, **MOVES, **FOLDS}
"""Every operator through which channels are followed."""


@dataclass(frozen=True)
class Slot:
    """The entries of an initializer, along one of its axes, that belong to a group."""

    tensor: str
    axis: int
    units: tuple[int, ...]
    """The unit of each entry along the axis; -1 where it is not of this group."""
    role: Role
    """``makes``: output channels of a layer, and its bias. ``reads``: input channels of a layer that sums over them.
    ``carries``: anything else by the channel, such as batch-norm, added constants and scales of quantized channels."""


@dataclass(frozen=True)
class Group:
    """Units that may be cut one by one."""

    name: str
    """Of its first making node; ``/2`` and so on is added where that node makes several groups."""
    size: int
    """Units, at least 2."""
    slots: tuple[Slot, ...]
    makers: tuple[str, ...]
    """The nodes whose outputs shrink, in the order of the graph."""
    exact: bool
    """A model with units set to zero computes what it computes without them. Not so where something is averaged over
    the axis, as by layer-norm, or two activations are multiplied and summed over it."""


def channel_groups(model: onnx.ModelProto) -> tuple[Group, ...]:
    """Find the groups of a model whose units may be cut, in the order of the nodes that make them.

    Weights in Constant nodes are not cut: make them initializers before. Symbolic dimensions may stay as they are.
    """
    return Survey.of(model).groups


def refusals(model: onnx.ModelProto) -> dict[str, str]:
    """Give for each node that makes channels of which none may be cut a sentence that says why."""
    return Survey.of(model).refusals


@dataclass(frozen=True)
class Survey:
    """A traced model: which labels belong to which unit of which group."""

    channels: Channels
    initializers: tuple[str, ...]

    @classmethod
    def of(cls, model: onnx.ModelProto) -> Survey:
        """Trace a model."""
        return cls(trace(model, RULES), tuple(tensor.name for tensor in model.graph.initializer))

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """The groups, in the order of the nodes that make them."""
        mixed = set(self.channels.classes()[_joined(self.channels.mixed)].tolist())
        slots, taken, found = self._slots(), dict[str, int](), []
        for number, units in enumerate(self._families):
            makers = tuple(dict.fromkeys(name for name, own in self._makers if own.keys() & set(units)))
            taken[makers[0]] = taken.get(makers[0], 0) + 1
            name = makers[0] if taken[makers[0]] == 1 else f"{makers[0]}/{taken[makers[0]]}"
            found.append(Group(name, len(units), tuple(slots[number]), makers, exact=mixed.isdisjoint(units)))
        return tuple(found)

    @cached_property
    def refusals(self) -> dict[str, str]:
        """By maker, why none of its channels may be cut."""
        cuttable = {unit for units in self._families for unit in units}
        whole = dict[str, set[int]]()
        for name, own in self._makers:
            whole.setdefault(name, set()).update(own)
        return {
            name: next((self._stuck[item] for item in sorted(own) if item in self._stuck), "it makes a single unit")
            for name, own in whole.items()
            if not own & cuttable
        }

    @cached_property
    def units(self) -> tuple[Ints, Ints]:
        """The group of each label, and its unit there; -1 where it is of none."""
        classes = self.channels.classes()
        group, unit = (np.full(int(classes.max(initial=-1)) + 1, -1, np.int64) for _ in range(2))
        for i, family in enumerate(self._families):
            group[list(family)], unit[list(family)] = i, np.arange(len(family))
        return group[classes], unit[classes]

    @cached_property
    def _stuck(self) -> dict[int, str]:
        return self.channels.reasons()

    @cached_property
    def _makers(self) -> tuple[tuple[str, dict[int, None]], ...]:
        """Names of nodes, each with the classes of the channels that it makes, in their order."""
        classes = self.channels.classes()
        return tuple((name_of(node), dict.fromkeys(classes[own].tolist())) for node, own in self.channels.makes)

    @cached_property
    def _families(self) -> tuple[tuple[int, ...], ...]:
        """Classes that are made and do not stay, together with those that occur along the same axes of all tensors."""
        loose = {unit: None for _, own in self._makers for unit in own if unit not in self._stuck}
        places: dict[int, list[int]] = {unit: [] for unit in loose}
        classes, place = self.channels.classes(), 0
        for labels in self.channels.labels.values():
            for axis in labels:
                place += 1
                for unit in set(classes[axis].tolist()).intersection(places):
                    places[unit].append(place)
        families = defaultdict[tuple[int, ...], list[int]](list)
        for unit in loose:
            families[tuple(places[unit])].append(unit)
        return tuple(tuple(units) for units in families.values() if len(units) > 1)

    def _slots(self) -> dict[int, list[Slot]]:
        """Give the slots of each group by its number."""
        group, unit = self.units
        made, read = (np.zeros(self.channels.count, np.bool_) for _ in range(2))
        made[_joined([own for _, own in self.channels.makes])] = True
        read[_joined(self.channels.reads)] = True
        found: dict[int, list[Slot]] = defaultdict(list)
        for name in self.initializers:
            for axis, labels in enumerate(self.channels.labels.get(name, ())):
                for number in np.unique(group[labels][group[labels] >= 0]).tolist():
                    ours = group[labels] == number
                    own = labels[ours]
                    role: Role = "makes" if made[own].any() else "reads" if read[own].any() else "carries"
                    found[number].append(Slot(name, axis, tuple(np.where(ours, unit[labels], -1).tolist()), role))
        return found


def _joined(parts: list[Ints]) -> Ints:
    return np.concatenate([*parts, np.zeros(0, np.int64)])
