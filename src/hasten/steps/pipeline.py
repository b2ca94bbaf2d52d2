"""The steps of a deployment, fitted to its model: checked once where they are loaded, then run for every request."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace

import numpy as np

from hasten import registry
from hasten.artifact import Json
from hasten.errors import BadRequest, HastenError, StoreError, TooLarge
from hasten.samples.preprocess import CHANNELS
from hasten.settings import build
from hasten.steps.cast import Cast
from hasten.steps.decode_image import DecodeImage, file_of
from hasten.steps.normalise import Normalise
from hasten.steps.rename import Rename
from hasten.steps.step import ROWS, Around, Opened, Place, Specs, Step, with_rows
from hasten.tensors import DTYPES, Array, Feed, Signature, TensorSpec

__all__ = ["KIND", "ROWS", "Pipeline", "Table", "open_pipeline", "stacked"]

KIND = "step"
"""The key of a step's table that says which one it is."""

Table = Mapping[str, Json]
"""A step as a deployment declares it: ``step`` is its name, the rest are its settings."""


@dataclass(frozen=True)
class OwnSize:
    """A file of an image that goes to the model in its own size: what a few bytes of it become is known early."""

    decode: DecodeImage
    pixel_bytes: int
    """Bytes of the model's input for each pixel."""

    def row_bytes(self, values: Feed) -> int:
        """Give the bytes of the model's input for a row, by the file's header. Raises BadRequest."""
        return self.decode.count_pixels(file_of(values[self.decode.input])) * self.pixel_bytes


@dataclass(frozen=True)
class Pipeline:
    """Steps around a model, open. ``signature`` is what a client sees. Any thread, several at once."""

    signature: Signature
    pre: tuple[Opened, ...]
    post: tuple[Opened, ...]
    read: frozenset[str]
    """Tensors of a client that steps before the model read; others go to it as they are."""
    fed: tuple[TensorSpec, ...]
    """The model's inputs, without the batch axis."""
    images: frozenset[str] = frozenset()
    """Tensors of a client that are files of images."""
    own_sizes: tuple[OwnSize, ...] = ()
    """Those of them that no step resizes or crops."""

    @property
    def row_bytes(self) -> int:
        """Bytes of a row as the model takes it; an open length counts as 1."""
        return sum(
            int(np.prod([dim if isinstance(dim, int) else 1 for dim in spec.shape])) * DTYPES[spec.dtype].itemsize
            for spec in self.fed
        )

    def prepare(self, feed: Feed, over: Callable[[], bool], limit_bytes: int) -> dict[str, Array]:
        """Give the model's inputs [n, ...] for a client's tensors [n, ...]; before each row ``over`` may end it early.

        Raises:
            BadRequest: a row cannot be used: which one, and why. TooLarge: the rows together go over ``limit_bytes``.
        """
        if not self.pre:
            return dict(feed)
        rows, fixed_bytes = len(next(iter(feed.values()))), 0
        fills = self._fills()
        longest_bytes = dict.fromkeys(fills, 0)
        """Of what is padded: every row will take as much as the longest."""
        made: list[Feed] = []
        for row in range(rows):
            if over():
                break
            values: Feed = {name: _row(feed[name], row) for name in self.read}
            try:
                ahead_bytes = sum(each.row_bytes(values) for each in self.own_sizes)
                if fixed_bytes + ahead_bytes > limit_bytes:
                    raise _too_large(row, limit_bytes)
                for step in self.pre:
                    values = step.apply(values)
            except BadRequest as error:
                raise BadRequest(f"row {row}: {error}" if rows > 1 else str(error)) from error
            for name, array in values.items():
                if name in fills:
                    longest_bytes[name] = max(longest_bytes[name], array.nbytes)
                else:
                    fixed_bytes += array.nbytes
            if fixed_bytes + (row + 1) * sum(longest_bytes.values()) > limit_bytes:
                raise _too_large(row, limit_bytes)
            made.append(values)
        left = {name: array for name, array in feed.items() if name not in self.read}
        return {**left, **stacked(made, fills)}

    def _fills(self) -> dict[str, int]:
        """Give with what the model's inputs are filled up, by their names after the last step."""
        fills: dict[str, int] = {}
        for step in self.pre:
            fills = {step.renamed.get(name, name): fill for name, fill in fills.items()} | dict(step.fills)
        return fills

    def finish(self, outputs: Feed) -> dict[str, Array]:
        """Give what the client gets for the model's outputs [n, ...]. Raises BadRequest."""
        values = dict(outputs)
        for step in self.post:
            values = step.apply(values)
        return values


def open_pipeline(
    tables: Mapping[Place, Sequence[Table]], model: Signature, around: Around, *, where: str
) -> Pipeline | None:
    """Build, fit and open the steps of a deployment; None where it has none.

    Args:
        tables: The steps before and after the model, in order.
        model: What the model takes and gives; axis 0 of every tensor counts rows.
        around: What the steps may read.
        where: How messages call the deployment.

    Raises:
        StoreError: a step is unknown, misplaced or has a wrong setting, does not fit what comes before it or the model,
            or its files are missing; the message names the deployment and the step.
    """
    if not any(tables.values()):
        return None
    pre, post = (_built(tables.get(place, ()), place, where) for place in ("pre", "post"))
    wanted = {spec.name: _without_rows(spec) for spec in model.inputs}
    read, untouched, opened_pre = _fit_pre(pre, wanted, replace(around, place="pre"))
    given: Specs = {spec.name: _without_rows(spec) for spec in model.outputs}
    opened_post = []
    for each in post:
        given, opened = each.fitted(given, replace(around, place="post"))
        opened_post.append(opened)
    return Pipeline(
        signature=Signature(
            tuple(map(with_rows, (*read.values(), *untouched.values()))), tuple(map(with_rows, given.values()))
        ),
        pre=tuple(opened_pre),
        post=tuple(opened_post),
        read=frozenset(read),
        fed=tuple(wanted.values()),
        images=frozenset(each.step.input for each in pre if isinstance(each.step, DecodeImage)),
        own_sizes=_own_sizes([each.step for each in pre], read, wanted),
    )


@dataclass(frozen=True)
class _Named:
    """A step, and how messages call it."""

    step: Step
    called: str

    def fitted(self, given: Specs, around: Around) -> tuple[Specs, Opened]:
        """Give what is there after it, and how it runs. Raises StoreError."""
        try:
            after = self.step.gives(given)
            return after, self.step.open(around, given)
        except HastenError as error:
            raise StoreError(f"{self.called}: {error}") from error


def _built(tables: Sequence[Table], place: Place, where: str) -> list[_Named]:
    steps = []
    for number, table in enumerate(tables, 1):
        name = table.get(KIND)
        called = f"{where}: {place} step {number} ({name})"
        if not isinstance(name, str):
            raise StoreError(f'{where}: {place} step {number} has no {KIND} = "NAME"')
        try:
            kind = registry.load("step", name)
            step: Step = build(kind, {key: value for key, value in table.items() if key != KIND})
        except HastenError as error:
            raise StoreError(f"{called}: {str(error).removeprefix(f'{name}: ')}") from error
        if place not in step.places:
            raise StoreError(f"{called}: it stands under [[{' or '.join(sorted(step.places))}]], not under [[{place}]]")
        steps.append(_Named(step, called))
    return steps


def _fit_pre(steps: Sequence[_Named], wanted: Specs, around: Around) -> tuple[Specs, Specs, list[Opened]]:
    """Walk from the client to the model.

    Gives the client's tensors that steps read, those that go to the model as they are, and the opened steps.
    """
    outer: dict[str, TensorSpec] = {}
    shared = {dim for spec in wanted.values() for dim in spec.shape}
    given: dict[str, TensorSpec] = {}
    opened = []
    made: set[str] = set()
    for each in steps:
        for spec in each.step.takes(wanted):
            if spec.name not in given and spec.name not in made:
                outer[spec.name] = given[spec.name] = _apart(spec, outer, shared)
        before = given.keys()
        after, ready = each.fitted(given, around)
        made |= before - after.keys() | after.keys()
        given = dict(after)
        opened.append(ready)
    last = steps[-1].called if steps else ""
    for name, spec in given.items():
        if name not in wanted:
            raise StoreError(f"{last}: it leaves {spec}, which the model does not take; it takes {_list(wanted)}")
        _check_fit(last, spec, wanted[name])
    untouched = {name: spec for name, spec in wanted.items() if name not in given}
    for name in untouched.keys() & outer.keys():
        raise StoreError(f"{last}: the model takes {wanted[name]}, and the steps use that name for something else")
    return outer, untouched, opened


def _own_sizes(steps: Sequence[Step], read: Specs, wanted: Specs) -> tuple[OwnSize, ...]:
    """Find the client's files of images of which no step changes the size."""
    found = []
    for at, decode in enumerate(steps):
        if not isinstance(decode, DecodeImage) or decode.input not in read:
            continue
        name: str | None = decode.output or decode.input
        for step in steps[at + 1 :]:
            name = _followed(step, name)
        spec = None if name is None else wanted.get(name)
        if spec is not None:
            found.append(OwnSize(decode, CHANNELS[decode.color] * DTYPES[spec.dtype].itemsize))
    return tuple(found)


def _followed(step: Step, name: str | None) -> str | None:
    """Give the name after a step of a tensor that may only be cast, normalised or renamed; None: it is another now."""
    match step:
        case Normalise(input=its, output=output) if its == name:
            return output or its
        case Rename(input=its, to=to) if its == name:
            return to
        case Normalise() | Rename() | Cast() | DecodeImage():
            return name
    return None


def _apart(spec: TensorSpec, others: Specs, shared: Set[int | str]) -> TensorSpec:
    """Give a tensor's open axes names of their own where others have them too, but for those that the model shares."""
    taken = {dim for other in others.values() for dim in other.shape if isinstance(dim, str)} - shared
    return replace(spec, shape=tuple(f"{spec.name}.{dim}" if dim in taken else dim for dim in spec.shape))


def _check_fit(last: str, made: TensorSpec, wanted: TensorSpec) -> None:
    fits = made.dtype == wanted.dtype and len(made.shape) == len(wanted.shape)
    pairs = zip(made.shape, wanted.shape, strict=True) if fits else ()
    if not fits or any(isinstance(want, int) and have != want for have, want in pairs):
        raise StoreError(f"{last}: the steps give {made} for each row, and the model takes {wanted}")


def _list(specs: Specs) -> str:
    return ", ".join(str(spec) for spec in specs.values())


def _without_rows(spec: TensorSpec) -> TensorSpec:
    if not spec.shape:
        raise StoreError(f"{spec} has no batch axis, and steps work on rows")
    return replace(spec, shape=spec.shape[1:])


def _too_large(row: int, limit_bytes: int) -> TooLarge:
    if row == 0:
        return TooLarge(f"its first row takes more than {limit_bytes} bytes; send a smaller one")
    return TooLarge(f"its first {row + 1} rows take more than {limit_bytes} bytes; send fewer at once")


def _row(column: Array, row: int) -> Array:
    """Give one row as an array, also where it is a single Python object."""
    return column[row : row + 1].reshape(column.shape[1:])


def stacked(rows: Sequence[Feed], fills: Mapping[str, int]) -> dict[str, Array]:
    """Put rows together to [n, ...]; those of ``fills`` are filled up at their end to the longest.

    Raises:
        BadRequest: the rows of a tensor differ in shape, and nothing says how to fill them.
    """
    if not rows:
        return {}
    ready: dict[str, Array] = {}
    for name, first in rows[0].items():
        column = [row[name] for row in rows]
        if name in fills:
            target = np.full((len(column), max(map(len, column))), fills[name], first.dtype)
            for at, row in enumerate(column):
                target[at, : len(row)] = row
            ready[name] = target
            continue
        for at, row in enumerate(column):
            if row.shape != first.shape:
                raise BadRequest(
                    f"row {at} has the shape {list(row.shape)} for the model's input {name!r}, and row 0 has "
                    f"{list(first.shape)}; send them in requests of their own"
                )
        ready[name] = column[0][None] if len(column) == 1 else np.stack(column)
    return ready
