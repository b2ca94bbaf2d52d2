"""``hasten infer``: send samples to any Open Inference Protocol server, and show what its model says."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from cyclopts import Parameter
from rich.table import Table
from rich.text import Text

from hasten.artifact import Json
from hasten.cli import units
from hasten.cli.answer import COMMON, Answer, Common, Shown, python_answer
from hasten.cli.files_of import Rows, as_objects, files_for
from hasten.cli.models import DATA, DataOptions
from hasten.client.client import Client
from hasten.client.values import InferResult
from hasten.errors import BadInput, InvalidSetting
from hasten.protocol.messages import DATATYPES, ModelMetadata, TensorMetadata
from hasten.report import format as fmt
from hasten.samples import Samples
from hasten.samples.columns import Images
from hasten.samples.readers import read_samples
from hasten.store import write_atomically
from hasten.tensors import Array, Signature, TensorSpec

SHOWN_ROWS, SHOWN_VALUES = 20, 6
"""What a table shows; --json and --output have all."""


def read_rows(text: str) -> slice:
    """Read ``START:STOP``, of which either may be left out, or one row. Raises ValueError."""
    start, colon, stop = text.partition(":")
    if not all(word == "" or word.isdecimal() for word in (start, stop)) or text in ("", ":"):
        raise ValueError(f"{text!r} names no rows; write them as 0:8, 8: or 3")
    first = int(start or 0)
    last = (int(stop) if stop else None) if colon else first + 1
    if last is not None and last <= first:
        raise ValueError(f"{text!r} is no row at all; the first one comes before the end")
    return slice(first, last)


@Parameter(name="*", group="The server")
@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """How the server is called."""

    version: str | None = None
    """A version of the model; by default the one that the server routes to."""
    batch: int = 8
    """Rows in one request."""
    timeout: Annotated[float | None, units.read_by(units.seconds)] = None
    """Time for each request, as 500ms; the server is told."""
    as_text: bool = False
    """Send tensors as JSON instead of bytes, for servers that know no binary tensors; REST only."""
    api_key: str | None = None
    """The key that the server wants."""
    certificate: Path | None = None
    """A file of certificates to trust, in PEM."""


SERVER = ServerOptions()


def infer(
    url: str,
    model: str,
    /,
    *,
    data: str | None = None,
    image: tuple[Path, ...] = (),
    text: tuple[str, ...] = (),
    rows: Annotated[slice | None, units.read_by(read_rows, metavar="START:STOP")] = None,
    output: Path | None = None,
    samples: DataOptions = DATA,
    server: ServerOptions = SERVER,
    common: Common = COMMON,
) -> Answer:
    """Send samples to a server, and show what its model says of each.

    .. code-block:: console

        hasten infer http://127.0.0.1:8000 net --data val.parquet --rows 0:8
        hasten infer grpc://127.0.0.1:8001 net --data images/ --output out.npz
        hasten infer http://127.0.0.1:8000 net --image photo.jpg
        hasten infer http://127.0.0.1:8000 net --text "what a fine day"

    Args:
        url: http://HOST:PORT, https://HOST:PORT, grpc://HOST:PORT or grpcs://HOST:PORT.
        model: The model's name on the server.
        data: Samples, as every verb reads them.
        image: A file of an image, for a model that takes such files; give it again for more rows.
        text: A text, for a model that takes text; give it again for more rows.
        rows: Which of them, as 0:8; by default all.
        output: Where to write the outputs, as an .npz file.
        samples: How samples are read.
        server: How the server is called.
        common: The options of every verb.
    """
    if server.batch < 1:
        raise InvalidSetting(f"--batch is {server.batch}, and must be 1 or more")
    if output is not None and output.suffix != ".npz":
        raise BadInput(f"{output} is no .npz file; outputs are written as one")
    if (data is not None) + bool(image) + bool(text) != 1:
        raise InvalidSetting("give one of --data, --image and --text")
    if common.show_python and data is not None:
        return python_answer(*_python(url, model, data, samples, server))
    if common.show_python:
        return python_answer(*_python_of_files(url, model, image, text))
    with Client(url, binary=not server.as_text, api_key=server.api_key, certificate=server.certificate) as client:
        metadata = client.metadata(model, version=server.version)
        chosen: Samples | Rows
        if data is None:
            chosen, unlabelled = _given(metadata, image, text, limit=samples.limit, rows=rows), None
        else:
            chosen, unlabelled = _samples(data, metadata, samples, rows)
        results = [
            client.infer(model, feed, version=server.version, timeout_s=server.timeout)
            for feed in chosen.batches(server.batch)
        ]
    outputs = joined(results)
    if output is not None:
        write_npz(output, outputs)
    first_row = rows.start if rows else 0
    shown: list[Shown] = [outputs_table(outputs, chosen, first_row), _summary(results, len(chosen), output)]
    if unlabelled is not None:
        shown.append(Text(f"No labels are shown: {unlabelled}.", style="dim"))
    return Answer(document=_document(results, outputs), shown=shown)


def signature_of(metadata: ModelMetadata) -> Signature:
    """Give a model's signature as its server tells it: the first axis counts samples, other -1 are of any length.

    Raises:
        BadInput: a datatype is none of the protocol's.
    """
    return Signature(
        inputs=tuple(_spec(spec) for spec in metadata.inputs), outputs=tuple(_spec(spec) for spec in metadata.outputs)
    )


def _spec(spec: TensorMetadata) -> TensorSpec:
    if spec.datatype not in DATATYPES:
        raise BadInput(f"the server says that {spec.name!r} is {spec.datatype!r}; the protocol has {list(DATATYPES)}")
    shape = tuple(
        length if length >= 0 else ("batch" if axis == 0 else f"{spec.name}_{axis}")
        for axis, length in enumerate(spec.shape)
    )
    return TensorSpec(spec.name, DATATYPES[spec.datatype], shape)


def _given(
    metadata: ModelMetadata, images: Sequence[Path], texts: Sequence[str], *, limit: int | None, rows: slice | None
) -> Rows:
    """Give files, or else texts, as the only input of BYTES.

    Raises:
        BadInput: the model has no such input, there are no such rows, or a file cannot be read.
    """
    takes = [spec for spec in metadata.inputs if spec.datatype == "BYTES"]
    if len(takes) != 1 or len(metadata.inputs) != 1:
        listed = ", ".join(f"{spec.name} {spec.datatype}{list(spec.shape)}" for spec in metadata.inputs)
        raise BadInput(f"model {metadata.name!r} takes {listed}, not one file or text for each row; send it --data")
    if limit is not None and limit < 1:
        raise BadInput(f"a limit of {limit} leaves no rows")
    what, there = ("--text", len(texts)) if texts else ("--image", len(images))
    chosen = _chosen(what, there if limit is None else min(there, limit), rows)
    items = [texts[row].encode() if texts else Images(images).read(row) for row in chosen]
    held = as_objects(items).reshape(len(items), *(1 for _ in takes[0].shape[1:]))
    return Rows({takes[0].name: held})


def _samples(
    data: str, metadata: ModelMetadata, options: DataOptions, rows: slice | None
) -> tuple[Samples | Rows, str | None]:
    """Read the rows that are asked for; with them why they have no labels, where the data has some.

    A model that takes the files of images is given them as they are.
    """
    signature = signature_of(metadata)
    # Of a folder of images by class a limit takes equal shares of each class: other rows than the first ones.
    stop = rows.stop if rows and not Path(data).is_dir() else None
    limits = [limit for limit in (options.limit, stop) if limit is not None]
    limit = min(limits, default=None)
    files = files_for(data, signature, options, limit=limit)
    if files is not None:
        return (files if rows is None else files.take(_chosen(data, len(files), rows))), None
    read = read_samples(
        data,
        signature,
        preprocess=options.preprocess,
        inputs=options.inputs,
        label=options.label,
        labels="optional",
        limit=limit,
    )
    found = read.samples
    return (found if rows is None else found.take(_chosen(data, len(found), rows))), read.unlabelled


def _chosen(what: str, there: int, rows: slice | None) -> range:
    """Give the numbers of the rows that are asked for, of those that are there. Raises BadInput: there are none."""
    if rows is None:
        return range(there)
    if rows.start >= there:
        raise BadInput(f"{what} has {there} rows; there is no row {rows.start}")
    return range(*rows.indices(there))


def joined(results: Sequence[InferResult]) -> dict[str, Array]:
    """Join the outputs of several answers along their rows. Raises BadInput: they do not fit together."""
    first = results[0].outputs
    for result in results:
        for name, array in result.outputs.items():
            if name not in first or not array.ndim or array.shape[1:] != first[name].shape[1:]:
                raise BadInput(
                    f"output {name!r} has the shape {list(array.shape)}, which differs between requests; use --batch 1 "
                    "and --rows with one row"
                )
    return {name: np.concatenate([result.outputs[name] for result in results]) for name in first}


def write_npz(path: Path, outputs: Mapping[str, Array]) -> None:
    """Write outputs whole or not at all: text as fixed-width, bfloat16 as float32. Raises StoreError."""
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:  # numpy.savez cannot hold an array called "file"
        for name, array in outputs.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, plain_array(array), allow_pickle=False)
    write_atomically(path, held.getvalue())


def plain_array(array: Array) -> Array:
    """Give an array that NumPy's own file format knows."""
    if array.dtype == object:
        return np.array([_text(item) for item in array.ravel()], np.str_).reshape(array.shape)
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array


def outputs_table(outputs: Mapping[str, Array], samples: Samples | Rows, first_row: int) -> Table:
    """Draw a line for each row: the class with its score where an output looks like scores, else values.

    Scores beside words are those of the words.
    """
    worded = any(array.dtype.kind in "OSU" for array in outputs.values())
    labels, classes = (samples.labels, samples.classes) if isinstance(samples, Samples) else (None, None)
    table = Table(box=None, header_style="dim", pad_edge=False)
    table.add_column("row", justify="right")
    for name in outputs:
        table.add_column(Text(name))
    if labels is not None:
        table.add_column("label")
    for row in range(min(len(samples), SHOWN_ROWS)):
        values = [array[row] if row < len(array) else () for array in outputs.values()]
        cells = [_values(value) if worded else _cell(value, classes) for value in values]
        if labels is not None:
            cells.append(_label(labels[row], classes))
        table.add_row(str(first_row + row), *(Text(cell) for cell in cells))
    return table


def _cell(value: Any, classes: Sequence[str] | None) -> str:
    array = np.asarray(value)
    if array.ndim == 1 and array.size > 1 and array.dtype.kind == "f" and not np.isnan(array).any():
        best = int(np.argmax(array))
        name = classes[best] if classes and len(classes) == array.size else f"class {best}"
        return f"{name} ({array[best]:.4g})"
    return _values(array)


def _values(value: Any) -> str:
    array = np.asarray(value)
    flat = array.ravel()
    words = [f"{item:.4g}" if isinstance(item, float) else _text(item) for item in flat[:SHOWN_VALUES].tolist()]
    return " ".join(words) + (f" … of {list(array.shape)}" if flat.size > SHOWN_VALUES else "")


def _label(value: Any, classes: Sequence[str] | None) -> str:
    array = np.asarray(value)
    if classes and array.ndim == 0 and array.dtype.kind in "iu" and 0 <= int(array) < len(classes):
        return classes[int(array)]
    return _cell(array, None)


def _text(item: Any) -> str:
    return item.decode(errors="replace") if isinstance(item, bytes) else str(item)


def _summary(results: Sequence[InferResult], rows: int, output: Path | None) -> Text:
    more = f", the first {SHOWN_ROWS} shown" if rows > SHOWN_ROWS else ""
    text = f"\n{rows} rows in {len(results)} requests{more}, version {results[0].version or 'unknown'}"
    if "infer" in results[0].phases_ns:
        text += f"; the first one's inference took {fmt.duration(results[0].phases_ns['infer'])}"
    return Text(f"{text}{'' if output is None else f'; written to {output}'}.", style="dim")


def _document(results: Sequence[InferResult], outputs: Mapping[str, Array]) -> dict[str, Json]:
    return {
        "model": results[0].model,
        "version": results[0].version,
        "outputs": {name: plain_array(array).tolist() for name, array in outputs.items()},
        "phases_ns": [dict(result.phases_ns) for result in results],
    }


def _python(url: str, model: str, data: str, samples: DataOptions, server: ServerOptions) -> list[str]:
    more = "".join(f", {line}" for line in samples.python())
    key = "" if server.api_key is None else ", api_key=KEY"
    return [
        "import hasten",
        "from hasten.cli.infer import signature_of",
        "",
        f"with hasten.Client({url!r}, binary={not server.as_text}{key}) as client:",
        f"    signature = signature_of(client.metadata({model!r}))",
        f"    samples = hasten.read_samples({data!r}, signature{more}).samples",
        f"    for feed in samples.batches({server.batch}):",
        f"        print(client.infer({model!r}, feed, version={server.version!r}).outputs)",
    ]


def _python_of_files(url: str, model: str, images: Sequence[Path], texts: Sequence[str]) -> list[str]:
    rows = [repr(text) for text in texts] or [f"Path({str(path)!r}).read_bytes()" for path in images]
    return [
        "from pathlib import Path",
        "import hasten",
        "import numpy as np",
        "",
        f"with hasten.Client({url!r}) as client:",
        f"    name = client.metadata({model!r}).inputs[0].name",
        f"    print(client.infer({model!r}, {{name: np.array([{', '.join(rows)}], object)}}).outputs)",
    ]
