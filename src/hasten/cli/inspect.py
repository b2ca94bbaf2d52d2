"""``hasten inspect``: what a model is, what it costs, and how fast this machine could be at most."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from hasten.artifact import Artifact, Json
from hasten.cli import units
from hasten.cli.answer import COMMON, Answer, Common, Verbatim, describe, python_answer
from hasten.cli.models import find_model, import_lines
from hasten.errors import BadInput, InvalidSetting, UnknownName
from hasten.graph.costs import model_totals, operators_of
from hasten.graph.model import read_model
from hasten.host import this_host
from hasten.measure.peaks import measure_peaks
from hasten.measure.roofline import bound
from hasten.measurement import Operator, Peaks
from hasten.report import format as fmt
from hasten.store import Store


@dataclass(frozen=True, kw_only=True)
class Priced:
    """An operator, or all of one kind. ``bound_ns`` is the least time that this machine could take for it."""

    name: str
    kind: str
    count: int
    operations: float | None
    """None: it cannot be priced; its bytes are counted all the same."""
    bytes: float
    bound_ns: float
    limit: str
    """What would hold it at best: "compute" or "memory"."""


def inspect(
    model: str,
    /,
    *,
    batch: int = 1,
    dims: Annotated[dict[str, str] | None, units.read_by(units.pairs)] = None,
    threads: int | None = None,
    nodes: bool = False,
    state: Path | None = None,
    common: Common = COMMON,
) -> Answer:
    """Show a model: signature, operators, operations and bytes, this machine's limit for each, and its lineage.

    The limit is the larger of operations over peak and bytes over bandwidth, with peaks that are measured on this
    machine once and kept. Operators are counted as the graph has them; engines fuse some.

    .. code-block:: console

        hasten inspect model.onnx
        hasten inspect bert.onnx --dims sequence=128 --nodes
        hasten inspect 3f2a9c --json

    Args:
        model: An ONNX file, an exported program (.pt2), module.py:factory, or a digest in the store.
        batch: Length of the batch axis.
        dims: Lengths of other symbolic axes, as sequence=128,width=64; those not named are 1.
        threads: Threads that the limit is for; by default the cores of this machine.
        nodes: List every operator by itself, not by kind.
        state: Weights for module.py:factory.
        common: The options of every verb.
    """
    used = threads or this_host().usable_cores
    if common.show_python:
        return python_answer(*_python(model, common, state, batch, dims or {}, used))
    artifact = find_model(model, Store(common.home), state=state)
    if artifact.format != "onnx":
        return Answer(document=describe(artifact), shown=(signature_table(artifact), lineage_lines(artifact)))
    lengths = lengths_of(artifact, batch, dims or {})
    operators = operators_of(read_model(artifact), lengths)
    peaks = measure_peaks(used, home=common.home)
    priced = price_operators(operators, peaks)
    kinds = by_kind(priced)
    document = describe(artifact) | {
        "dims": lengths,
        "totals": msgspec.to_builtins(model_totals(operators)),
        "bound_ns": total_ns(priced),
        "peaks": msgspec.to_builtins(peaks),
        "operators": msgspec.to_builtins(priced),
    }
    shown = (
        signature_table(artifact),
        operator_table(priced if nodes else kinds, nodes=nodes),
        summary(priced, peaks, lengths),
        lineage_lines(artifact),
    )
    return Answer(document=document, shown=shown)


def lengths_of(artifact: Artifact, batch: int, dims: Mapping[str, str]) -> dict[str, int]:
    """Give the length of each symbolic axis of a model's inputs.

    Raises:
        UnknownName: the model has no such axis. InvalidSetting: a length is no whole number above 0.
    """
    symbolic = {dim: 1 for spec in artifact.signature.inputs for dim in spec.shape if isinstance(dim, str)}
    batches = {spec.shape[0] for spec in artifact.signature.inputs if spec.shape}
    lengths = symbolic | {dim: batch for dim in batches if isinstance(dim, str)}
    for name, text in dims.items():
        if name not in symbolic:
            raise UnknownName("symbolic axis of this model", name, symbolic)
        if not text.isdecimal() or int(text) < 1:
            raise InvalidSetting(f"axis {name} = {text!r}: a length is a whole number above 0")
        lengths[name] = int(text)
    if batch < 1:
        raise InvalidSetting(f"batch = {batch}: a run takes one sample at least")
    fixed = next((dim for dim in batches if isinstance(dim, int) and dim != batch), None)
    if fixed is not None and batch != 1:
        raise BadInput(f"the model's batch is fixed at {fixed}; leave --batch away")
    return lengths


def price_operators(operators: Sequence[Operator], peaks: Peaks) -> list[Priced]:
    """Give what each operator costs, and the least time that this machine could take for it."""
    # No run is behind these operators: of the bound, only what does not depend on the measured time is used.
    limits = bound(operators, peaks, measured_ns=1.0)
    return [
        Priced(
            name=item.name,
            kind=item.kind,
            count=1,
            operations=None if item.kind in limits.unpriced else item.operations,
            bytes=item.bytes,
            bound_ns=item.bound_ns,
            limit=item.limit,
        )
        for item in limits.operators
    ]


def by_kind(priced: Sequence[Priced]) -> list[Priced]:
    """Add up the operators of each kind, the costliest first. The limit is that of most of the time."""
    groups: dict[str, list[Priced]] = defaultdict(list)
    for item in priced:
        groups[item.kind].append(item)
    found = []
    for kind, items in groups.items():
        times: dict[str, float] = defaultdict(float)
        for item in items:
            times[item.limit] += item.bound_ns
        operations = [item.operations for item in items if item.operations is not None]
        found.append(
            Priced(
                name=kind,
                kind=kind,
                count=len(items),
                operations=sum(operations) if operations else None,
                bytes=sum(item.bytes for item in items),
                bound_ns=total_ns(items),
                limit=max(times, key=lambda limit: times[limit]),
            )
        )
    return sorted(found, key=lambda item: -(item.bound_ns))


def total_ns(priced: Sequence[Priced]) -> float:
    """Add the bounds."""
    return sum(item.bound_ns for item in priced)


def signature_table(artifact: Artifact) -> Table:
    """Draw what goes in and what comes out."""
    title = f"{artifact.digest[:16]}  {artifact.format}, {fmt.size(artifact.size_bytes)}"
    if artifact.traits:
        title += f", {', '.join(sorted(artifact.traits))}"
    table = Table(title=Text(title, style="bold"), title_justify="left", box=None, header_style="dim", pad_edge=False)
    for name in ("", "name", "dtype", "shape"):
        table.add_column(name)
    for word, specs in (("in", artifact.signature.inputs), ("out", artifact.signature.outputs)):
        for spec in specs:
            table.add_row(word, Text(spec.name), spec.dtype, Text(f"[{', '.join(str(dim) for dim in spec.shape)}]"))
    return table


def operator_table(priced: Sequence[Priced], *, nodes: bool) -> Table:
    """Draw the operators, one a row, or one kind a row."""
    table = Table(box=None, header_style="dim", pad_edge=False, show_footer=True, footer_style="bold")
    operations = sum(item.operations or 0.0 for item in priced)
    if nodes:
        table.add_column("operator", footer="all", overflow="fold")
        table.add_column("kind")
    else:
        table.add_column("kind", footer="all")
        table.add_column("count", justify="right", footer=str(sum(item.count for item in priced)))
    table.add_column("operations", justify="right", footer=fmt.count(operations))
    table.add_column("bytes", justify="right", footer=fmt.size(sum(item.bytes for item in priced)))
    table.add_column("at least", justify="right", footer=fmt.duration(total_ns(priced)))
    table.add_column("held by")
    for item in priced:
        first = (Text(item.name), Text(item.kind)) if nodes else (Text(item.kind), Text(str(item.count)))
        counted = fmt.NONE if item.operations is None else fmt.count(item.operations)
        table.add_row(*first, counted, fmt.size(item.bytes), fmt.duration(item.bound_ns), item.limit)
    return table


def summary(priced: Sequence[Priced], peaks: Peaks, lengths: Mapping[str, int]) -> RenderableType:
    """Draw the lines under the table: for what lengths and peaks it holds, and what is not counted."""
    rates = ", ".join(f"{dtype} {fmt.count(rate)}/s" for dtype, rate in peaks.operations_per_s.items())
    shape = ", ".join(f"{name} = {length}" for name, length in lengths.items()) or "fixed shapes"
    measured = f"{rates}; memory {fmt.size(peaks.bytes_per_s)}/s"
    lines = [f"For {shape}. This machine, {peaks.threads} threads, measured: {measured}."]
    if unpriced := sorted({item.kind for item in priced if item.operations is None}):
        lines.append(f"Operations are not counted for {', '.join(unpriced)}; their bytes are.")
    return Text("\n".join(lines), style="dim")


def lineage_lines(artifact: Artifact) -> Verbatim:
    """Write what was done to the model, in order."""
    lines = ["lineage"]
    for step in artifact.lineage:
        told = ", ".join(f"{key}={_short(value)}" for key, value in step.settings.items())
        lines.append(f"  {step.name}{f'({told})' if told else ''}  {fmt.seconds(step.seconds)}")
    return Verbatim("\n".join(lines))


def _short(value: Json) -> str:
    return f"{len(value)} names" if isinstance(value, list | tuple) and len(value) > 2 else str(value)


def _python(
    model: str, common: Common, state: Path | None, batch: int, dims: Mapping[str, str], threads: int
) -> list[str]:
    return [
        *import_lines(model, common.home, state),
        "from hasten.cli.inspect import by_kind, lengths_of, price_operators",
        "from hasten.graph.costs import operators_of",
        "from hasten.graph.model import read_model",
        "from hasten.measure.peaks import measure_peaks",
        "",
        f"lengths = lengths_of(model, {batch}, {dict(dims)!r})",
        f"peaks = measure_peaks({threads}, home=Path({str(common.home)!r}))",
        "priced = price_operators(operators_of(read_model(model), lengths), peaks)",
        "for kind in by_kind(priced):",
        "    print(kind)",
    ]
