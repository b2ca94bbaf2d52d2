"""``hasten predict``: a deployment's own service, offline over a file: in pieces, resumable, its output whole."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
from cyclopts import Parameter
from rich.text import Text

from hasten.artifact import Artifact
from hasten.cli.answer import COMMON, Answer, Common, python_answer
from hasten.cli.files_of import PIECE_ROWS, Rows, file_pieces
from hasten.cli.models import DATA, DataOptions
from hasten.cli.predict_output import WRITERS, Part, check_alike, read_part, write_part
from hasten.cli.progress import telling
from hasten.deployment import FILE, Deployment, read_deployment
from hasten.errors import BadInput, InvalidSetting, ModelNotReady, Overloaded
from hasten.host import this_host
from hasten.protocol.messages import InferRequest, InferResponse, Tensor
from hasten.samples import Samples
from hasten.samples.arrow import parquet_pieces
from hasten.samples.columns import Room
from hasten.samples.fit import fit
from hasten.samples.parquet_footer import footer_rows
from hasten.samples.preprocess import Preprocess
from hasten.samples.readers import read_samples
from hasten.serve.reading import open_steps
from hasten.serve.repository import open_repository
from hasten.serve.service import Service
from hasten.steps.bundle_files import names_beside
from hasten.store import locked, write_atomically
from hasten.tensors import Feed

UNDER_WAY = 2
"""Requests for each instance at once: one runs, one waits to be next."""

Pieced = Samples | Rows
"""Rows that are run together: as the model takes them, or as its steps do."""

TRIES = 10
"""Of a request that an overloaded service refuses."""


def predict(
    deployment: Path,
    /,
    *,
    data: str,
    output: Annotated[Path, Parameter(name=("--output", "-o"))],
    piece: int = PIECE_ROWS,
    allow_code: Path | None = None,
    samples: DataOptions = DATA,
    common: Common = COMMON,
) -> Answer:
    """Run a deployment over a file, in this process, and write what it says of every row.

    A deployment with steps is given images and text as they are, and writes what its last step says. Labels are not
    looked at, and limits that the deployment has for clients, as its objective, do not hold. Parquet is read
    piece by piece, so a file may be larger than memory; other data is read whole. Finished pieces are
    kept beside the output until it is whole: after an interruption the same command goes on where it was.

    .. code-block:: console

        hasten predict best/deployment.toml --data data.parquet -o out.parquet
        hasten predict best/ --data images/ -o out.npz

    Args:
        deployment: A deployment.toml, or the folder that it lies in.
        data: Samples, as every verb reads them.
        output: Where to write, as .parquet or .npz; a file that is there is replaced once the new one is whole.
        piece: Rows that are kept together: in memory at once, and lost at most by an interruption.
        allow_code: A folder whose Python files the deployment's steps may run; without it they run no code.
        samples: How samples are read.
        common: The options of every verb.
    """
    check_output(output, data)
    if piece < 1:
        raise InvalidSetting(f"--piece is {piece}, and must be 1 or more")
    if common.show_python:
        return python_answer(
            "from pathlib import Path",
            "from hasten.cli.predict import predict",
            "",
            f"predict(Path({str(deployment)!r}), data={data!r}, output=Path({str(output)!r}), piece={piece})",
        )
    file = deployment / FILE if deployment.is_dir() else deployment
    what, artifact = read_deployment(file)
    steps = open_steps(file, what, artifact, allow_code)
    if what.pre and samples.preprocess:
        raise InvalidSetting(f"{file} prepares its inputs by steps of its own; leave --preprocess out")
    beside = read_by_steps(file, what, allow_code)
    pieces: Iterator[Pieced] = (
        read_pieces(data, artifact, samples, piece, what)
        if steps is None or not what.pre
        else file_pieces(
            data, steps.signature, rows=piece, limit=samples.limit, inputs=samples.inputs or {}, label=samples.label
        )
    )
    with alone(output):
        parts = open_parts(output, key_of(what, data, samples, piece, beside=beside, output=output))
        kept = len(parts.finished())
        rows = asyncio.run(run_pieces(file, pieces, parts, rows_of(data, samples.limit), allow_code))
        WRITERS[output.suffix](output, parts.finished(), what.classes)
        parts.remove()
    document = {"output": str(output), "rows": rows, "pieces_kept_from_before": kept}
    before = f", {kept} pieces of them from before" if kept else ""
    return Answer(document=document, shown=(Text(f"{rows} rows{before}, written to {output}."),))


def check_output(output: Path, data: str) -> None:
    """Check, before any work, that the output can be written and is none of the data. Raises BadInput."""
    if output.suffix not in WRITERS:
        raise BadInput(f"{output} ends in {output.suffix!r}; outputs are written as {' or '.join(WRITERS)}")
    if output.is_dir():
        raise BadInput(f"{output} is a folder; name a file that may be replaced")
    source = source_of(data)
    if source.is_file() and output.exists() and output.samefile(source):
        raise BadInput(f"{output} is what is read, and would be lost; write to another file")
    if output.suffix == ".parquet" and source.is_dir() and output.parent.resolve() == source.resolve():
        raise BadInput(f"{output} would be read as data the next time; write to another folder")


@contextmanager
def alone(output: Path) -> Iterator[None]:
    """Hold off other runs with the same output: they would take this one's pieces for theirs.

    Raises:
        BadInput: another one is at work on it. StoreError: nothing can be written there.
    """
    place = output.with_name(f".{output.name}.lock")
    with locked(place, f"another hasten predict writes {output}; wait for it, or name another file") as held:
        if not place.exists() or not os.path.samestat(os.fstat(held.fileno()), place.stat()):
            raise BadInput(f"another hasten predict has just written {output}; see what it wrote before the next")
        try:
            yield
        finally:
            place.unlink(missing_ok=True)


@dataclass(frozen=True)
class Parts:
    """The finished pieces of an output, in a folder beside it."""

    folder: Path

    def place(self, number: int) -> Path:
        """Give the file of a piece."""
        return self.folder / f"part-{number:08d}.npz"

    def finished(self) -> list[Path]:
        """Give the pieces that are there, in order, up to the first that is not."""
        found = sorted(self.folder.glob("part-*.npz"))
        return [path for number, path in enumerate(found) if path == self.place(number)]

    def remove(self) -> None:
        """Remove them: the output is whole."""
        shutil.rmtree(self.folder)


def open_parts(output: Path, key: str) -> Parts:
    """Give the pieces of a run that was interrupted, or none where it was another run. Raises StoreError."""
    folder = output.with_name(f".{output.name}.parts")
    mark = folder / "key"
    if folder.exists() and not (mark.is_file() and mark.read_text() == key):
        shutil.rmtree(folder)
    write_atomically(mark, key.encode())
    return Parts(folder)


def read_by_steps(file: Path, what: Deployment, code: Path | None) -> list[Path]:
    """Give the files beside a deployment that its steps read, and the code that they may run."""
    found = sorted(file.parent / name for name in names_beside(file.parent, what))
    return [*found, *([] if code is None else sorted(code.rglob("*.py")))]


def key_of(
    what: Deployment,
    data: str,
    samples: DataOptions,
    piece: int,
    *,
    beside: Sequence[Path] = (),
    output: Path | None = None,
) -> str:
    """Give what tells one run from another: the model, the data as it is on disk, and how it is read and cut.

    ``beside`` are other files that answers depend on. ``output`` may lie among the data: what is written is none of it.
    """
    files = _files(source_of(data), output)
    stamp = [(entry.name, entry.stat().st_size, entry.stat().st_mtime_ns) for entry in (*files, *beside)]
    told = msgspec.json.encode(
        [
            what.artifact,
            what.preprocess,
            what.pre,
            what.post,
            what.classes,
            str(Path(data).resolve()),
            stamp,
            msgspec.to_builtins(vars(samples)),
            piece,
        ]
    )
    return hashlib.sha256(told).hexdigest()


def source_of(data: str) -> Path:
    """Give the file or folder that data comes from: of ``FILE.py:FUNCTION`` the code, of ``NAME#SPLIT`` the name."""
    if ".py:" in data:
        return Path(data.rpartition(":")[0])
    return Path(data) if Path(data).exists() else Path(data.partition("#")[0])


def _files(path: Path, output: Path | None) -> list[Path]:
    """Give the files of a source; of a folder without the output, what is written to become it, and its pieces."""
    if not path.is_dir():
        return [path] if path.is_file() else []
    found = sorted(each for each in path.resolve().rglob("*") if each.is_file())
    if output is None:
        return found
    home, name = output.parent.resolve(), output.name

    def is_of_output(each: Path) -> bool:
        first = each.relative_to(home).parts[0] if each.is_relative_to(home) else ""
        return first == name or first.startswith(f".{name}.")

    return [each for each in found if not is_of_output(each)]


def read_pieces(data: str, artifact: Artifact, options: DataOptions, rows: int, what: Deployment) -> Iterator[Samples]:
    """Give the samples in pieces of ``rows``; the last may have fewer. Raises as ``read_samples`` does."""
    declared = options.preprocess or (Preprocess.of(what.preprocess) if what.preprocess else None)
    if Path(data).suffix.lower() == ".parquet" and Path(data).is_file():
        room, left = Room(this_host().memory_bytes // 4), options.limit
        for columns in parquet_pieces(Path(data), rows):
            found = fit(
                columns,
                artifact.signature,
                room,
                preprocess=declared,
                inputs=options.inputs,
                label=options.label,
                labels="unread",
            ).samples
            yield found if left is None or left >= len(found) else found.take(range(left))
            left = None if left is None else left - len(found)
            if left is not None and left <= 0:
                return
        return
    whole = read_samples(
        data,
        artifact.signature,
        preprocess=declared,
        inputs=options.inputs,
        label=options.label,
        labels="unread",
        limit=options.limit,
    ).samples
    for start in range(0, len(whole), rows):
        yield whole.take(range(start, min(start + rows, len(whole))))


def rows_of(data: str, limit: int | None) -> int | None:
    """Give how many rows there will be, for the progress alone; None where only reading tells."""
    path = Path(data)
    found = footer_rows(path) if path.suffix.lower() == ".parquet" and path.is_file() else None
    return found if found is None or limit is None else min(found, limit)


async def run_pieces(
    file: Path, pieces: Iterator[Pieced], parts: Parts, expected_rows: int | None, code: Path | None = None
) -> int:
    """Run what is not finished yet, and give the rows of all; ``expected_rows`` is for the progress alone.

    Raises:
        ModelNotReady: the deployment cannot be loaded, and why. ServeError: a piece could not be run.
        BadInput: there are no rows.
    """
    finished, rows, number = set(parts.finished()), 0, -1
    like: Part | None = None
    service = Service(open_repository(file), code=code, offline=True)
    try:
        await service.start()
        state = service.index()[0]
        if state["state"] != "READY":
            raise ModelNotReady(f"{file} cannot be run: {state['reason']}")
        with telling(f"predicting by {file}") as progress:
            for number, samples in enumerate(pieces):
                if parts.place(number) not in finished:
                    part = await _run(service, str(state["name"]), samples)
                    like = like or part
                    check_alike(part, like)  # rather now than after all of them
                    write_part(parts.place(number), part)
                rows += len(samples)
                progress(f"{rows} rows", min(1.0, rows / expected_rows) if expected_rows else None)
    finally:
        await service.stop(0.0)
    if not rows:
        raise BadInput("there are no rows to run")
    for stale in parts.finished()[number + 1 :]:
        stale.unlink()
    return rows


async def _run(service: Service, model: str, samples: Pieced) -> Part:
    """Run one piece in requests of the largest batch, a few at once."""
    config = service.config(model)
    size = max(1, int(str(config["max_batch_size"])))
    gate = asyncio.Semaphore(UNDER_WAY * service.models()[0].instances)

    async def one(feed: Feed) -> InferResponse:
        async with gate:
            return await _infer(service, model, feed)

    tasks = [asyncio.ensure_future(one(feed)) for feed in samples.batches(size)]
    try:
        return _joined(await asyncio.gather(*tasks))
    finally:
        for task in tasks:  # after a failure, what is left of the piece is of no use
            task.cancel()


async def _infer(service: Service, model: str, feed: Feed) -> InferResponse:
    """Run one request; what the service refuses for now is tried again when it says."""
    request = InferRequest(model=model, inputs=tuple(Tensor.of(name, array) for name, array in feed.items()))
    for _ in range(TRIES):
        try:
            return await service.infer(request)
        except Overloaded as error:
            await asyncio.sleep(error.retry_after_s)
    return await service.infer(request)


def _joined(answers: list[InferResponse]) -> Part:
    parts = [{tensor.name: tensor.data for tensor in answer.outputs} for answer in answers]
    for part in parts:
        check_alike(part, parts[0])
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


__all__ = ["Parts", "key_of", "open_parts", "predict", "read_part", "read_pieces", "run_pieces"]
