"""Samples from what people have: Parquet, CSV, NPZ, images by class, Hugging Face datasets, a Python function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from hasten.errors import BadInput
from hasten.host import this_host
from hasten.samples.arrow import read_csv_file, read_dataset_folder, read_parquet_files
from hasten.samples.columns import Columns, Room
from hasten.samples.files import read_function, read_image_folder, read_npz
from hasten.samples.fit import Labels, ReadResult, fit, labelled
from hasten.samples.preprocess import Preprocess
from hasten.samples.samples import INDEX, Samples
from hasten.tensors import Signature

ACCEPTED = (
    "a .parquet, .csv or .npz file, a folder of images by class, of .parquet files or of a Hugging Face dataset "
    "(FOLDER#SPLIT), or module.py:function"
)

FILES: Mapping[str, Callable[[Path, Room], Columns]] = {
    ".parquet": lambda path, room: read_parquet_files([path], room),
    ".csv": read_csv_file,
    ".npz": read_npz,
}
"""How each kind of file is read, by its ending."""


def read_samples(
    source: str | Path,
    signature: Signature,
    *,
    preprocess: Preprocess | None = None,
    inputs: Mapping[str, str] | None = None,
    label: str | None = None,
    labels: Labels = "needed",
    limit: int | None = None,
    memory_bytes: int | None = None,
) -> ReadResult:
    """Read samples for a model.

    Args:
        source: A ``.parquet``, ``.csv`` or ``.npz`` file; a folder of images by class, of ``.parquet`` files, of a
            Hugging Face dataset (``folder#split`` where it has several) or of saved ``Samples``; or
            ``module.py:function``, which gives Samples, a dictionary of arrays, or ``(inputs, labels)``.
        signature: The model's: columns are matched to its inputs and cast to their dtypes (``fit.cast``).
        preprocess: What to do to images; by default what the input's shape says (``preprocess_for``).
        inputs: Model input to column, where the names differ.
        label: The label column; by default one of ``fit.LABELS``, or none.
        labels: What is done about labels: "needed" raises where they cannot be used, "optional" then leaves them out,
            "unread" leaves them out in any case.
        limit: Read only that many: the first rows of a table, equal shares of each class of a folder.
        memory_bytes: What the samples may take; by default a quarter of this machine's memory.

    Raises:
        BadInput: nothing is there, or it is empty, damaged, ambiguous, or too large.
        UnknownName: a column, an input or a split that is not there.
        SignatureMismatch: the samples do not fit the model.
        StoreError: a folder of saved samples is damaged.
    """
    if limit is not None and limit < 1:
        raise BadInput(f"a limit of {limit} leaves no samples")
    room = Room(this_host().memory_bytes // 4 if memory_bytes is None else memory_bytes, limit)
    columns = open_columns(source, room)
    if isinstance(columns, Samples):
        if preprocess is not None or inputs or label:
            raise BadInput(f"{source} gives finished samples: preprocessing, columns and labels cannot be told apart")
        samples, why = labelled(columns, labels, lambda: (columns.labels, columns.classes))
        samples.check(signature)
        return ReadResult(samples=samples, columns={name: (name,) for name in samples.inputs}, unlabelled=why)
    return fit(columns, signature, room, preprocess=preprocess, inputs=inputs, label=label, labels=labels)


def open_columns(source: str | Path, room: Room) -> Columns | Samples:
    """Read what a source has before it meets a model. Raises as ``read_samples`` does."""
    text = str(source)
    name, _, split = text.partition("#")
    if ".py:" in text:
        return read_function(text, room)
    path = Path(text) if Path(text).exists() else Path(name)
    if path.is_dir():
        return _open_folder(path, split if path == Path(name) and split else None, room)
    if not path.exists():
        raise BadInput(f"there is no file {text!r}; give {ACCEPTED}")
    reader = FILES.get(path.suffix.lower())
    if reader is None:
        raise BadInput(f"{path} is of no kind that hasten reads samples from; give {ACCEPTED}")
    if not path.stat().st_size:
        raise BadInput(f"{path} is empty")
    return reader(path, room)


def _open_folder(folder: Path, split: str | None, room: Room) -> Columns | Samples:
    if (folder / INDEX).exists():
        saved = Samples.load(folder)
        return saved if room.limit is None else saved.take(range(room.rows(len(saved))))
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        return read_dataset_folder(folder, split, room)
    if split is not None:
        raise BadInput(f"{folder} is no Hugging Face dataset, so it has no split {split!r}")
    if tables := sorted(folder.glob("*.parquet")):
        return read_parquet_files(tables, room)
    return read_image_folder(folder, room)
