"""Columns to samples: which column feeds which input, which holds the labels, and what is cast to what."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from hasten.errors import BadInput, SignatureMismatch, UnknownName
from hasten.samples.columns import Columns, Images, Room, Unusable, is_array
from hasten.samples.preprocess import Preprocess, open_image, preprocess_for
from hasten.samples.samples import Samples, check_labels
from hasten.tensors import DTYPES, Array, Signature, TensorSpec

LABELS = ("label", "labels", "target", "targets", "y", "class")
"""Names that a label column has, where none is given: the first of these wins."""


Labels = Literal["needed", "optional", "unread"]
"""Of labels that are there: "needed" raises where they cannot be used, "optional" then leaves them out and says why,
"unread" leaves them out unseen."""


@dataclass(frozen=True, kw_only=True)
class ReadResult:
    """Samples, and how they came about."""

    samples: Samples
    preprocess: Preprocess | None = None
    """What was done to the images: declared, or taken from the model's input. Keep it with the artifact."""
    columns: Mapping[str, tuple[str, ...]]
    """The columns that feed each input."""
    label: str | None = None
    """The label column."""
    unused: tuple[str, ...] = ()
    """Columns that feed nothing."""
    unlabelled: str | None = None
    """Why labels that are there were left out, where they were optional."""


def fit(
    columns: Columns,
    signature: Signature,
    room: Room,
    *,
    preprocess: Preprocess | None = None,
    inputs: Mapping[str, str] | None = None,
    label: str | None = None,
    labels: Labels = "needed",
) -> ReadResult:
    """Lay columns out as a model's inputs, and labels.

    A column feeds the input that ``inputs`` assigns it to, else the one of its name. What is left feeds the one input
    that is left: a single column, or all plain numbers side by side as [n, features], or the only column of images.
    Rows are reshaped where only axes of length 1 differ, or where they are flat. The label column feeds no input,
    whether the labels are wanted or not.

    Raises:
        UnknownName: a column or an input that is not there.
        SignatureMismatch: a column does not fit its input.
        BadInput: it is open which column is meant; an image cannot be read; there is too little memory.
    """
    label = label_column(columns, signature, inputs or {}, label)
    assigned = assign(columns, signature, inputs or {}, label)
    used: list[Preprocess] = []
    arrays: dict[str, Array] = {}
    for spec in signature.inputs:
        array, done = _input(columns, spec, assigned[spec.name], preprocess, room)
        room.check(sum(a.nbytes for a in (*arrays.values(), array)), "the samples as the model takes them")
        arrays[spec.name] = array
        used += [done] if done else []
    if preprocess is not None and not used:
        raise BadInput("preprocessing was declared, but no column that feeds the model holds images")
    samples, why = labelled(Samples(arrays), labels, lambda: _labels(columns, label, len(next(iter(arrays.values())))))
    samples.check(signature)
    taken = {name for names in assigned.values() for name in names} | {label}
    return ReadResult(
        samples=samples,
        preprocess=used[0] if used else None,
        columns=assigned,
        label=label,
        unused=tuple(name for name in columns.by_name if name not in taken),
        unlabelled=why,
    )


Labelling = tuple[Array | None, tuple[str, ...] | None]
"""Labels [n, ...], and the name of each class index; None where there are none."""


def labelled(samples: Samples, wanted: Labels, read: Callable[[], Labelling]) -> tuple[Samples, str | None]:
    """Give samples with the labels that ``read`` gives, where they are wanted, and why optional ones were left out.

    Raises:
        BadInput: labels that are needed cannot be used.
    """
    if wanted == "unread":
        return replace(samples, labels=None, classes=None), None
    try:
        labels, classes = read()
        if labels is not None:
            check_labels(labels)
    except BadInput as error:
        if wanted == "needed":
            raise
        return replace(samples, labels=None, classes=None), str(error)
    if labels is samples.labels:  # as they were, and their digest with them
        return samples, None
    return replace(samples, labels=labels, classes=classes), None


def assign(
    columns: Columns, signature: Signature, inputs: Mapping[str, str], label: str | None
) -> dict[str, tuple[str, ...]]:
    """Say which columns feed each input. Raises as ``fit`` does."""
    names = [spec.name for spec in signature.inputs]
    for wanted, column in inputs.items():
        if wanted not in names:
            raise UnknownName("model input", wanted, names)
        if column not in columns.by_name:
            raise UnknownName("column", column, columns.by_name)
    assigned: dict[str, tuple[str, ...]] = {name: (column,) for name, column in inputs.items()}
    free = [name for name in columns.by_name if name != label and name not in inputs.values()]
    for name in names:
        if name not in assigned and name in free:
            assigned[name] = (name,)
            free.remove(name)
    open_inputs = [spec for spec in signature.inputs if spec.name not in assigned]
    if len(open_inputs) == 1:
        assigned[open_inputs[0].name] = _remaining(columns, open_inputs[0], free)
    elif open_inputs:
        raise BadInput(
            f"no column is called like the model's input {open_inputs[0].name!r}; there are {', '.join(free) or 'none'}"
            f" left: assign one with --inputs {open_inputs[0].name}=COLUMN"
        )
    return assigned


def _remaining(columns: Columns, spec: TensorSpec, free: list[str]) -> tuple[str, ...]:
    """Choose what feeds the last input."""
    if len(free) == 1:
        return (free[0],)
    images = [name for name in free if isinstance(columns.by_name[name], Images)]
    if len(images) == 1 and len(spec.shape) >= 3:
        return (images[0],)
    for name in free:
        _usable(columns, name)
    by_name = {name: column for name in free if is_array(column := columns.by_name[name])}
    if len(spec.shape) >= 2 and by_name and len(by_name) == len(free):
        if all(column.ndim == 1 and column.dtype.kind in "biuf" for column in by_name.values()):
            return tuple(free)
        exact = [name for name, column in by_name.items() if column.ndim > 1 and _reshaped(column, spec) is not None]
        if len(exact) == 1:
            return (exact[0],)
    raise BadInput(
        f"it is open which column feeds the model's input {spec.name!r}: there are {', '.join(free) or 'none'}; "
        f"say --inputs {spec.name}=COLUMN"
    )


def cast(array: Array, dtype: str, what: str) -> Array:
    """Cast to a model's dtype where that is safe.

    To a float: every number and boolean, rounded to the nearest, but no finite value may become infinite (so int64
    above 2**24 lose their last digits in float32, as they would in training). To an integer: integers and booleans
    in its range. To boolean or string: only the same. Never a float to an integer: what to round is the user's call.

    Raises:
        SignatureMismatch: anything else; the message has both dtypes.
    """
    wanted = DTYPES[dtype]
    if array.dtype == wanted or (dtype == "string" and array.dtype.kind in "SU"):
        return array
    to_float = dtype.startswith(("float", "bfloat")) and (array.dtype.kind in "biuf" or array.dtype.name == "bfloat16")
    to_integer = wanted.kind in "iu" and array.dtype.kind in "biu"
    if not to_float and not to_integer:
        raise SignatureMismatch(f"{what} holds {_dtype(array)}, the model wants {dtype}; convert it first")
    if to_integer and array.dtype.kind != "b" and array.size:
        low, high = int(array.min()), int(array.max())
        limits = np.iinfo(dtype)
        if low < limits.min or high > limits.max:
            raise SignatureMismatch(f"{what} holds {low} to {high}, which the model's {dtype} cannot hold")
    with np.errstate(over="ignore"):
        made = array.astype(wanted)
    narrower = array.dtype.kind == "f" and wanted.itemsize < array.dtype.itemsize
    if (
        to_float
        and (narrower or (dtype == "float16" and array.dtype.kind != "b"))
        and np.isinf(made.astype(np.float64)).sum() > np.isinf(array.astype(np.float64)).sum()
    ):
        raise SignatureMismatch(f"{what} holds values that are too large for the model's {dtype}")
    return made


def _dtype(array: Array) -> str:
    return "strings" if array.dtype.kind in "US" else array.dtype.name


def label_column(columns: Columns, signature: Signature, inputs: Mapping[str, str], label: str | None) -> str | None:
    """Give the column of labels: the one named, the format's own, or one with a usual name. Raises UnknownName."""
    if label is not None:
        if label not in columns.by_name:
            raise UnknownName("column", label, columns.by_name)
        return label
    if columns.label is not None and columns.label not in inputs.values():
        return columns.label
    taken = {spec.name for spec in signature.inputs} | set(inputs.values())
    lower = {name.lower(): name for name in reversed(list(columns.by_name)) if name not in taken}
    return next((lower[name] for name in LABELS if name in lower), None)


def _labels(columns: Columns, label: str | None, rows: int) -> Labelling:
    """Give the labels of so many rows: numbers as they are, strings as indices into their sorted values."""
    if label is None:
        return None, None
    column = _usable(columns, label)
    if isinstance(column, Images):
        raise BadInput(f"the label column {label!r} holds images; labels are numbers or strings")
    if len(column) != rows:
        raise BadInput(f"there are {len(column)} labels (column {label!r}) for {rows} samples; each sample needs one")
    if column.dtype.kind == "S":
        try:
            column = np.char.decode(column.astype(np.bytes_), "utf-8")
        except UnicodeDecodeError as error:
            raise BadInput(f"the label column {label!r} holds bytes that are no UTF-8 text: {error.reason}") from error
    named = columns.classes if label == columns.label else None
    if column.dtype.kind not in "US":
        if named is not None:
            _check_within(column, len(named), label)
        whole = column.dtype.kind in "biu"
        return (column.astype(np.int64) if whole else column), named
    classes = columns.vocabularies.get(label) or tuple(str(word) for word in np.unique(column))
    return np.searchsorted(np.asarray(classes), column).astype(np.int64), classes


def _check_within(column: Array, classes: int, label: str) -> None:
    values = column.astype(np.float64)
    outside = np.argwhere((values < 0) | (values >= classes))
    if outside.size:
        place = tuple(outside[0])
        raise BadInput(
            f"the label column {label!r} has the value {column[place]} in row {place[0]}, but its classes are 0 to "
            f"{classes - 1}; take out the rows without a class, or name another column with --label"
        )


def _input(
    columns: Columns, spec: TensorSpec, names: tuple[str, ...], preprocess: Preprocess | None, room: Room
) -> tuple[Array, Preprocess | None]:
    first = _usable(columns, names[0])
    if isinstance(first, Images):
        return _decode(first, names[0], spec, preprocess_for(spec, preprocess), room)
    if preprocess is not None and first.dtype == np.uint8 and first.ndim in (3, 4) and len(spec.shape) >= 3:
        chosen = preprocess_for(spec, preprocess)
        if first.ndim == 4 and first.shape[3] not in (1, 3, 4):
            raise BadInput(
                f"column {names[0]!r} has pixels of shape {list(first.shape[1:])}; preprocessing takes height, width "
                "and channels, in this order"
            )
        made = _prepared(first, chosen, room)
        return _fitted(made, spec, names[0]), chosen
    what = f"column {names[0]!r}" if len(names) == 1 else f"the columns {names[0]!r} to {names[-1]!r}"
    parts = [cast(_plain(_usable(columns, name)), spec.dtype, f"column {name!r}") for name in names]
    return _fitted(side_by_side(parts, names), spec, what), None


def side_by_side(parts: Sequence[Array], names: Sequence[str]) -> Array:
    """Put columns together: one as it is, several numbers as [n, features]. Raises BadInput: they differ in length."""
    if len(parts) == 1:
        return parts[0]
    if len({part.shape for part in parts}) > 1:
        told = ", ".join(f"{name}: {len(part)}" for name, part in zip(names, parts, strict=True))
        raise BadInput(f"columns that feed one input together differ in length ({told})")
    return np.stack(parts, axis=1)


def _usable(columns: Columns, name: str) -> Array | Images:
    column = columns.by_name[name]
    if isinstance(column, Unusable):
        raise BadInput(column.reason)
    return column


def _plain(column: Array | Images) -> Array:
    if isinstance(column, Images):
        raise BadInput("images and numbers cannot feed one input together")
    return column


def _fitted(values: Array, spec: TensorSpec, what: str) -> Array:
    made = _reshaped(values, spec)
    if made is None:
        raise SignatureMismatch(
            f"{what} has rows of shape {list(values.shape[1:])}, the model's input {spec.name!r} wants "
            f"{list(spec.shape[1:])}"
        )
    return made


def _reshaped(values: Array, spec: TensorSpec) -> Array | None:
    """Give rows in the shape of the input: as they are, with axes of length 1 put in or left out, or unfolded."""
    if not spec.shape:
        return None
    wanted, have = spec.shape[1:], values.shape[1:]
    if len(wanted) == len(have):
        fits = all(isinstance(dim, str) or dim == length for dim, length in zip(wanted, have, strict=True))
        return values if fits else None
    row = tuple(dim for dim in wanted if isinstance(dim, int))
    if len(row) < len(wanted):
        return None
    flat = len(have) <= 1
    same = [dim for dim in row if dim != 1] == [length for length in have if length != 1]
    return values.reshape(len(values), *row) if (flat or same) and np.prod(row) == np.prod(have) else None


def _decode(
    images: Images, name: str, spec: TensorSpec, preprocess: Preprocess, room: Room
) -> tuple[Array, Preprocess]:
    """Decode every image into one array, whose size is known and checked before."""
    with _row_named(0, name):
        header = open_image(images.read(0))
    shape = preprocess.shape(header.height, header.width)
    dtype = DTYPES[preprocess.dtype]
    room.check(len(images) * int(np.prod(shape)) * dtype.itemsize, f"{len(images)} images of {list(shape)}")
    made = np.empty((len(images), *shape), dtype)
    for row in range(len(images)):
        with _row_named(row, name):
            image = preprocess.apply_image(images.read(row))
            if image.shape != shape:
                raise BadInput(f"its shape is {list(image.shape)}, the first image's {list(shape)}; declare a resize")
        made[row] = image
    return _fitted(made, spec, f"column {name!r}"), preprocess


def _prepared(pixels: Array, preprocess: Preprocess, room: Room) -> Array:
    """Prepare pixels [n, H, W] or [n, H, W, C] row by row, into one array whose size is checked before."""
    shape, dtype = preprocess.shape(pixels.shape[1], pixels.shape[2]), DTYPES[preprocess.dtype]
    room.check(len(pixels) * int(np.prod(shape)) * dtype.itemsize, f"{len(pixels)} images of {list(shape)}")
    made = np.empty((len(pixels), *shape), dtype)
    for row, each in enumerate(pixels):
        made[row] = preprocess.apply_pixels(np.asarray(each, np.uint8))
    return made


@contextlib.contextmanager
def _row_named(row: int, column: str) -> Iterator[None]:
    try:
        yield
    except BadInput as error:
        raise BadInput(f"row {row} of column {column!r}: {error}") from error
