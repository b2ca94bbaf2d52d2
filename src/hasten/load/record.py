"""A run of load on disk: ``run.json`` beside the columns, whole or not there.

The columns' file is named by its digest and written first; ``run.json`` names it. So a reader sees the old run or the
new one, whatever is interrupted. Nothing is read that is larger than ``run.json`` says, and nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

import msgspec
import numpy as np

from hasten.artifact import Json
from hasten.errors import StoreError
from hasten.load.run import OUTCOMES, PHASES, Ints, LoadRun, Requests
from hasten.store import write_atomically, writing

RUN = "run.json"
LARGEST_JSON_BYTES = 16 << 20
MOST_REQUESTS = 50_000_000
HEADER_ROOM_BYTES = 4096
"""What the head of an .npy file may take."""

COLUMNS = tuple(field.name for field in fields(Requests))


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What ``run.json`` says: ``LoadRun`` without its columns, and where they are."""

    columns: str
    sha256: str
    requests: int
    outcomes: list[str]
    phases: list[str]
    url: str
    protocol: str
    model: str
    version: str | None
    arrivals: str
    seed: int
    duration_s: float
    timeout_s: float
    began_unix_ns: int
    conditions: dict[str, Json]
    cut_short: str | None


PLAIN = tuple(field.name for field in fields(LoadRun) if field.name != "requests")


def write_run(run: LoadRun, folder: Path) -> None:
    """Write a run into a folder; one that is there already is replaced once the new one is whole.

    Raises:
        StoreError: the disk is full or cannot be written; the old run is as it was.
    """
    data = _packed(run.requests)
    digest = hashlib.sha256(data).hexdigest()
    record = Record(
        columns=f"requests-{digest[:12]}.npz",
        sha256=digest,
        requests=len(run.requests.scheduled_ns),
        outcomes=list(OUTCOMES),
        phases=list(PHASES),
        **{name: getattr(run, name) for name in PLAIN},
    )
    write_atomically(folder / record.columns, data)
    write_atomically(folder / RUN, msgspec.json.format(msgspec.json.encode(record)))
    with writing(folder):
        for old in folder.glob("requests-*.npz"):
            if old.name != record.columns:
                old.unlink(missing_ok=True)


def read_run(folder: Path) -> LoadRun:
    """Read a run that ``write_run`` wrote.

    Raises:
        StoreError: there is none, or it is damaged: says which file and how.
    """
    path = folder / RUN
    try:
        if path.stat().st_size > LARGEST_JSON_BYTES:
            raise StoreError(
                f"{path} has {path.stat().st_size} bytes, more than the {LARGEST_JSON_BYTES} that are read"
            )
        record = msgspec.json.decode(path.read_bytes(), type=Record)
    except FileNotFoundError as error:
        raise StoreError(f"{folder} holds no run of load: it has no {RUN}") from error
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise StoreError(f"{path} cannot be read: {error}") from error
    if record.outcomes != list(OUTCOMES) or record.phases != list(PHASES):
        raise StoreError(f"{path} was written by another version of hasten; measure again")
    if not 0 <= record.requests <= MOST_REQUESTS or Path(record.columns).name != record.columns:
        raise StoreError(f"{path} is damaged: {record.requests} requests in {record.columns!r}")
    columns = _unpacked(folder / record.columns, record)
    return LoadRun(requests=Requests(**columns), **{name: getattr(record, name) for name in PLAIN})


def _packed(requests: Requests) -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name in COLUMNS:
            whole = io.BytesIO()
            column = np.ascontiguousarray(getattr(requests, name), dtype=np.int64)
            np.lib.format.write_array(whole, column, allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), whole.getvalue(), zipfile.ZIP_DEFLATED)
    return held.getvalue()


def _unpacked(path: Path, record: Record) -> Mapping[str, Ints]:
    largest = record.requests * 8 * len(PHASES) + HEADER_ROOM_BYTES
    try:
        if path.stat().st_size > (largest + HEADER_ROOM_BYTES) * len(COLUMNS):
            raise StoreError(f"{path} has {path.stat().st_size} bytes, too many for {record.requests} requests")
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != record.sha256:
            raise StoreError(f"{path} is not what {RUN} says; the run is damaged, measure again")
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return {name: _column(archive, name, record.requests, largest) for name in COLUMNS}
    except (OSError, zipfile.BadZipFile, KeyError, ValueError, EOFError) as error:
        raise StoreError(f"{path} cannot be read: {error}") from error


def _column(archive: zipfile.ZipFile, name: str, requests: int, largest: int) -> Ints:
    with archive.open(f"{name}.npy") as file:
        data = file.read(largest + 1)
    if len(data) > largest:
        raise ValueError(f"the column {name!r} is larger than {requests} requests")
    found = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    shape = (requests, len(PHASES)) if name == "phases_ns" else (requests,)
    if found.dtype != np.int64 or found.shape != shape:
        raise ValueError(f"the column {name!r} is {found.dtype} {list(found.shape)}, and must be int64 {list(shape)}")
    column: Ints = found
    return column
