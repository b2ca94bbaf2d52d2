"""Milliseconds of plans that were never built: a sum over blocks, each measured once, corrected by what was built.

1. The graph is cut into blocks (``graph.blocks``). One cut for each channel group tells which numbers of which block
   follow its width, and how steeply: a block at any widths follows without cutting again.
2. A block's time over the options of the sites that it depends on is measured at every option of each site alone, and
   at the narrowest corner of each pair; all other pairs follow from t(i, o) = a + r(i) c(o) (``completed``). Measured
   rows carry the staircase that vector widths make, which a fit of t = a + b i o would smooth away. Where there are
   few pairs, all are measured.
3. What blocks do not know (layouts changed between them, a call's own time) is fitted to whole models as they get
   measured: a factor for each kind of block, and a constant (``refit``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, product

import numpy as np
import onnx
from scipy.optimize import nnls

from hasten.errors import BadInput, Unsupported, Untrusted
from hasten.graph.blocks import Block, blocks_of
from hasten.graph.cut import cut
from hasten.graph.cut_shapes import settle_splits
from hasten.graph.groups import Group, channel_groups
from hasten.search.knapsack import Choice, Floats, Term
from hasten.search.table import INT8, Site
from hasten.search.timing import Times

FEW_PAIRS = 12
"""Up to so many combinations of options of a block's sites, all are measured."""

MOST_SITES = 2
"""Width sites that one term joins. A block over more (a concatenation of groups) is expanded to pairs."""

NEGLIGIBLE = 1e-6
"""Relative to a block's time: a difference so small says nothing."""

PULL = 0.05
"""How strongly a refit holds a factor at that of all kinds: a tenth off costs as much as one plan 0.5 % off."""

PULL_CONSTANT = 0.3
"""How strongly it holds the constant: a tenth of a plan's time off costs as much as one plan 3 % off."""


@dataclass(frozen=True)
class Part:
    """A block of the untouched graph, and how its numbers follow the widths: ``slopes[site]`` for each unit kept."""

    block: Block
    sizes: Mapping[str, int]
    """Units of each group when untouched."""
    slopes: Mapping[str, tuple[float, ...]]

    @property
    def sites(self) -> tuple[str, ...]:
        """The groups that it depends on, in a fixed order."""
        return tuple(sorted(self.slopes))

    def at(self, widths: Mapping[str, int]) -> Block:
        """Give the block at these widths; a group that is not named is untouched."""
        numbers = np.array(self.block.numbers, dtype=np.float64)
        moved = np.zeros_like(numbers)
        for site, slope in self.slopes.items():
            moved += np.array(slope) * (widths.get(site, self.sizes[site]) - self.sizes[site])
        there = np.where(
            moved == 0, numbers, np.rint(numbers + moved)
        )  # lengths are whole, other constants need not be
        return self.block.with_numbers([float(value) for value in there])


@dataclass(frozen=True)
class Piece:
    """One part's times over its sites' options, before any correction."""

    part: Part
    kind: str
    term: Term
    """Its sites are indices into the sites of the model."""


@dataclass(frozen=True)
class Correction:
    """What blocks' times are multiplied by, by kind, and what every plan takes besides."""

    factors: Mapping[str, float] = field(default_factory=dict)
    constant_ns: float = 0.0

    def time_ns(self, by_kind: Mapping[str, float]) -> float:
        """Give the corrected time of a sum of blocks by kind."""
        return self.constant_ns + math.fsum(self.factors.get(kind, 1.0) * ns for kind, ns in by_kind.items())


@dataclass(frozen=True)
class CostModel:
    """The predicted time of every choice over ``sites``."""

    sites: tuple[Site, ...]
    pieces: tuple[Piece, ...]
    correction: Correction = field(default_factory=Correction)

    def by_kind(self, choice: Choice) -> dict[str, float]:
        """Add up the uncorrected times of a choice's blocks by kind, in nanoseconds."""
        found: dict[str, float] = {}
        for piece in self.pieces:
            at = tuple(choice[site] for site in piece.term.sites)
            found[piece.kind] = found.get(piece.kind, 0.0) + float(piece.term.time_ns[at])
        return found

    def time_ns(self, choice: Choice) -> float:
        """Predict the time of a choice."""
        return self.correction.time_ns(self.by_kind(choice))

    def terms(self) -> tuple[Term, ...]:
        """Give the corrected terms for a ``knapsack.Problem`` over the same sites; ``fixed_ns`` is its constant."""
        factors = self.correction.factors
        return tuple(
            Term(piece.term.sites, piece.term.time_ns * factors.get(piece.kind, 1.0))
            for piece in self.pieces
            if piece.term.sites
        )

    @property
    def fixed_ns(self) -> float:
        """What every choice takes: the constant, and the blocks that depend on no site."""
        factors = self.correction.factors
        untouched = (p for p in self.pieces if not p.term.sites)
        return self.correction.constant_ns + math.fsum(
            float(piece.term.time_ns[()]) * factors.get(piece.kind, 1.0) for piece in untouched
        )


def parts_of(
    model: onnx.ModelProto,
    sites: Sequence[Site],
    dims: Mapping[str, int],
    *,
    groups: Sequence[Group] | None = None,
) -> tuple[Part, ...]:
    """Cut a graph into blocks, and find out how each follows the widths of the sites of kind "width".

    Args:
        model: The graph that the engine is given, or one that differs from it by what engines fold (batch-norm).
        sites: Their names are of groups of this graph.
        dims: The length of each symbolic dimension of the inputs.
        groups: Of ``channel_groups(model)``, where they are known already.

    Raises:
        Unsupported: a cut changes which nodes there are, or a block cannot be described (``blocks_of``).
    """
    model = settle_splits(model)
    base = blocks_of(model, dims)
    wanted = {site.name: site.options for site in sites if site.kind == "width"}
    found = {group.name: group for group in (groups or channel_groups(model)) if group.name in wanted}
    slopes: list[dict[str, tuple[float, ...]]] = [{} for _ in base]
    for name, options in wanted.items():
        if name not in found:
            raise BadInput(f"the graph has no channel group {name!r}; take the sites from its own groups")
        narrow = options[-1]
        other = blocks_of(cut(model, {name: range(narrow)}), dims)
        if [block.name for block in other] != [block.name for block in base]:
            raise Unsupported("cost model", f"cutting group {name!r} changes which nodes the graph has")
        for at, (before, after) in enumerate(zip(base, other, strict=True)):
            if before.key != after.key:
                slopes[at][name] = _slope(before, after, narrow - options[0])
    sizes = {name: options[0] for name, options in wanted.items()}
    return tuple(
        Part(block, {name: sizes[name] for name in slope}, slope) for block, slope in zip(base, slopes, strict=True)
    )


def wanted_blocks(parts: Sequence[Part], sites: Sequence[Site]) -> tuple[Block, ...]:
    """Give the blocks to time for a cost model, the untouched ones first, then those that say most."""
    options = {site.name: site.options for site in sites if site.kind == "width"}
    levels: list[list[Block]] = [[], [], []]
    for part in parts:
        full, corners, rest = _points(part, options)
        levels[0].append(part.at(full))
        levels[1] += [part.at(point) for point in corners]
        levels[2] += [part.at(point) for point in rest]
    unique = {block.key: block for level in levels for block in level}
    return tuple(unique.values())


def cost_model(
    parts: Sequence[Part], sites: Sequence[Site], times: Times, *, quantized: Sequence[Part] = ()
) -> CostModel:
    """Lay measured times over the options of the sites.

    Args:
        parts: Of the float graph.
        sites: What there is to choose.
        times: Of ``wanted_blocks`` of ``parts`` and ``quantized``; options that are missing, because time was over, are
            interpolated between those that are there.
        quantized: Parts of the same graph with every precision site in int8: a float block whose node is such a site
            is replaced by those that are built around one of its nodes.

    Raises:
        Untrusted: not even the untouched form of a block was measured; names it, and why.
    """
    places: dict[tuple[str, str], int] = {(site.kind, site.name): at for at, site in enumerate(sites)}
    widths = {site.name: site.options for site in sites if site.kind == "width"}
    twins_of = _by_name(quantized)
    pieces: list[Piece] = []
    for part in parts:
        bits = places.get(("bits", part.block.name))
        twins = [twins_of[name] for name in part.block.covers if name in twins_of]
        if bits is None or not twins:
            pieces += _pieces(part, part.block.kind, widths, places, times)
            continue
        in_float = [at for at, option in enumerate(sites[bits].options) if option != INT8]
        in_int8 = [at for at, option in enumerate(sites[bits].options) if option == INT8]
        count = len(sites[bits].options)
        made = _pieces(part, part.block.kind, widths, places, times)
        pieces += [_only_at(piece, bits, in_float, count) for piece in made]
        for twin in twins:
            made = _pieces(twin, twin.block.kind, widths, places, times)
            pieces += [_only_at(piece, bits, in_int8, count) for piece in made]
    return CostModel(tuple(sites), tuple(pieces), Correction(constant_ns=times.call_ns))


def refit(model: CostModel, measured: Mapping[Choice, float]) -> CostModel:
    """Correct a cost model by the measured nanoseconds of whole plans.

    Factors by kind and a constant are fitted by non-negative least squares of the relative errors, pulled towards one
    factor for all kinds and the constant that the model has, as far as the plans do not say otherwise: two measured
    plans do not tell four factors apart, and plans that take about the same do not tell factors from the constant.

    Args:
        model: Its factors are forgotten, its constant is where the fitted one is pulled to.
        measured: Nanoseconds by choice.

    Raises:
        BadInput: a measured time is not a positive number.
    """
    if not measured:
        return model
    if not all(math.isfinite(ns) and ns > 0 for ns in measured.values()):
        raise BadInput("a refit needs measured times above 0; leave out the plans that failed")
    sums = {choice: model.by_kind(choice) for choice in measured}
    kinds = sorted({kind for by_kind in sums.values() for kind in by_kind})
    start, typical = model.correction.constant_ns, float(np.median(list(measured.values())))
    whole = {choice: max(math.fsum(by_kind.values()), 1.0) for choice, by_kind in sums.items()}
    scale = float(np.median([max(ns - start, 0.1 * ns) / whole[choice] for choice, ns in measured.items()]))
    rows = [
        [*(scale * sums[choice].get(kind, 0.0) / ns for kind in kinds), typical / ns] for choice, ns in measured.items()
    ]
    wanted = [1.0] * len(rows)
    pulls = [*(PULL for _ in kinds), PULL_CONSTANT]
    rows += [[pull if at == column else 0.0 for column in range(len(pulls))] for at, pull in enumerate(pulls)]
    wanted += [*(PULL for _ in kinds), PULL_CONSTANT * start / typical]
    found, _ = nnls(np.array(rows), np.array(wanted))
    factors = {kind: scale * float(value) for kind, value in zip(kinds, found[:-1], strict=True)}
    return replace(model, correction=Correction(factors, float(found[-1]) * typical))


def mean_error(model: CostModel, measured: Mapping[Choice, float]) -> float:
    """Give the mean of |predicted - measured| / measured.

    Raises:
        BadInput: nothing was measured.
    """
    if not measured:
        raise BadInput("an error of predictions needs measured plans, and there are none")
    return float(np.mean([abs(model.time_ns(choice) - ns) / ns for choice, ns in measured.items()]))


def completed(rows: Mapping[tuple[int, ...], float], shape: tuple[int, ...]) -> Floats:
    """Fill an array of times over one or two axes from some of its entries.

    Row 0 and column 0 are filled by linear interpolation of what is known of them; entry (0, 0) must be known. Every
    other entry is r + c - t + k (r - t)(c - t), with r = [i, 0], c = [0, j], t = [0, 0]: the time of a product over an
    offset (its factor k is one over what is not offset), and for k = 0 of what is summed side by side; k follows from
    the known entries off both lines. Where there are none, it is a product without offset.

    Args:
        rows: Known times by index.
        shape: Of two axes at most; along each, index 0 is the untouched option.

    Raises:
        Untrusted: the first entry is not known.
    """
    zero = (0,) * len(shape)
    if zero not in rows:
        raise Untrusted("the untouched form was not measured")
    if not shape:
        return np.asarray(rows[zero], dtype=np.float64)
    lines = [_line({at[axis]: ns for at, ns in rows.items() if _on_line(at, axis)}, n) for axis, n in enumerate(shape)]
    if len(shape) == 1:
        return lines[0]
    top = max(float(rows[zero]), 1.0)
    down, right = lines[0] - top, lines[1] - top
    both = np.outer(down, right)
    sums = top + down[:, None] + right[None, :]
    inner = {at: ns for at, ns in rows.items() if all(at) and abs(both[at]) > NEGLIGIBLE * top**2}
    # More than one over the largest saving, and the narrower of two widths would be the slower.
    most = 1 / max(-float(min(down.min(), right.min())), NEGLIGIBLE * top)
    factors = [(ns - sums[at]) / both[at] for at, ns in inner.items()]
    made = sums + min(max(float(np.median(factors)), 0.0) if factors else 1 / top, most) * both
    for at, ns in rows.items():
        made[at] = ns
    return np.maximum(made, 0.0)


def _on_line(at: tuple[int, ...], axis: int) -> bool:
    return all(index == 0 for other, index in enumerate(at) if other != axis)


def _line(known: Mapping[int, float], count: int) -> Floats:
    places = sorted(known)
    return np.interp(np.arange(count), places, [known[at] for at in places])


def _slope(before: Block, after: Block, units: int) -> tuple[float, ...]:
    first, second = np.array(before.numbers), np.array(after.numbers)
    if first.shape != second.shape or before.with_numbers(after.numbers).key != after.key:
        raise Unsupported(
            "cost model", f"the block of node {before.name!r} is another one after cutting, not a smaller"
        )
    return tuple(float(value) for value in (second - first) / units)


def _points(
    part: Part, options: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, int], list[dict[str, int]], list[dict[str, int]]]:
    """Give the widths at which a part is measured: untouched; the narrowest, alone and in pairs; the others."""
    lines = {site: options[site] for site in part.sites}
    full = {site: line[0] for site, line in lines.items()}
    if math.prod(len(line) for line in lines.values()) <= FEW_PAIRS and len(lines) <= MOST_SITES:
        return full, [], [dict(zip(lines, point, strict=True)) for point in product(*lines.values())]
    corners = [{**full, site: line[-1]} for site, line in lines.items()]
    corners += [{**full, a: lines[a][-1], b: lines[b][-1]} for a, b in combinations(lines, 2)]
    return full, corners, [{**full, site: width} for site, line in lines.items() for width in line[1:-1]]


def _pieces(
    part: Part,
    kind: str,
    widths: Mapping[str, tuple[int, ...]],
    places: Mapping[tuple[str, str], int],
    times: Times,
) -> list[Piece]:
    """Give a part's times over its sites: one array; for more sites than ``MOST_SITES``, an expansion into pairs.

    The expansion is the cut-HDMR of H. Rabitz, O. F. Alis, "General foundations of high-dimensional model
    representations", Journal of Mathematical Chemistry 25, 1999, to second order around the untouched form. It is exact
    for what reads several groups side by side and makes one: the sum over what it reads, times what it makes.
    """
    sites = part.sites
    numbers = tuple(places["width", site] for site in sites)
    if len(sites) <= MOST_SITES:
        return [Piece(part, kind, Term(numbers, _measured(part, sites, widths, times)))]
    zero = float(_measured(part, (), widths, times)[()])
    singles = {site: _measured(part, (site,), widths, times) - zero for site in sites}
    found = [Piece(part, kind, Term((), np.asarray(zero)))]
    found += [Piece(part, kind, Term((places["width", site],), singles[site])) for site in sites]
    for a, b in combinations(sites, 2):
        both = _measured(part, (a, b), widths, times) - zero - singles[a][:, None] - singles[b][None, :]
        found.append(Piece(part, kind, Term((places["width", a], places["width", b]), both)))
    return found


def _measured(part: Part, sites: tuple[str, ...], widths: Mapping[str, tuple[int, ...]], times: Times) -> Floats:
    """Give a part's times over the options of some of its sites, the others untouched."""
    shape = tuple(len(widths[site]) for site in sites)
    known: dict[tuple[int, ...], float] = {}
    for at in product(*(range(count) for count in shape)):
        key = part.at({site: widths[site][i] for site, i in zip(sites, at, strict=True)}).key
        if key in times.ns:
            known[at] = times.ns[key]
    try:
        return completed(known, shape)
    except Untrusted as error:
        reason = times.failures.get(part.block.key, "there was no time for it")
        raise Untrusted(f"the block of node {part.block.name!r} has no time: {reason}") from error


def _only_at(piece: Piece, site: int, options: Sequence[int], count: int) -> Piece:
    """Let a piece count only at some options of one more site."""
    times = piece.term.time_ns
    spread = np.zeros((*times.shape, count))
    for option in options:
        spread[..., option] = times
    return Piece(piece.part, piece.kind, Term((*piece.term.sites, site), spread))


def _by_name(parts: Sequence[Part]) -> dict[str, Part]:
    """Give the parts by the node that each is built around: a block stands for one float block alone."""
    return {part.block.name: part for part in parts}
