"""Artifacts on disk, by digest, and what made them, by key. Every write is whole or not there."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath
from typing import BinaryIO

import msgspec
import psutil

from hasten.artifact import Artifact, Json, Step, hash_file
from hasten.errors import BadInput, StoreError
from hasten.tensors import Signature

MANIFEST = "manifest.json"


class Manifest(msgspec.Struct, frozen=True):
    """What ``manifest.json`` beside a stored model's files says."""

    format: str
    entry_name: str
    files: dict[str, str]
    signature: Signature
    traits: list[str]
    lineage: list[Step]
    host: str | None
    preprocess: dict[str, Json] | None


@dataclass(frozen=True)
class Store:
    """A folder of artifacts (``objects/DIGEST/``), a cache of steps (``cache/KEY.json``), scratch space (``tmp/``)."""

    root: Path

    def put(self, artifact: Artifact) -> Artifact:
        """Keep an artifact; its folder must be inside ``scratch()`` and is moved. Gives it as it is stored.

        Raises:
            StoreError: the disk is full or cannot be written; nothing half-written is left.
        """
        target = self.root / "objects" / artifact.digest
        if not target.exists():
            manifest = Manifest(
                format=artifact.format,
                entry_name=artifact.entry_name,
                files=dict(artifact.files),
                signature=artifact.signature,
                traits=sorted(artifact.traits),
                lineage=list(artifact.lineage),
                host=artifact.host,
                preprocess=None if artifact.preprocess is None else dict(artifact.preprocess),
            )
            with writing(target):
                target.parent.mkdir(parents=True, exist_ok=True)
                (artifact.folder / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest)))
                try:
                    artifact.folder.rename(target)
                except OSError:
                    if not (target / MANIFEST).exists():  # else another process was first, with the same bytes
                        raise
        return self.get(artifact.digest)

    def get(self, digest: str) -> Artifact:
        """Give the artifact of a digest, or of its first characters if only one begins so.

        Raises:
            StoreError: it is not here, or its manifest cannot be read.
        """
        objects = self.root / "objects"
        found = list(objects.glob(f"{digest}*")) if digest.isalnum() else []
        if len(found) != 1:
            raise StoreError(f"{len(found)} artifacts in {objects} begin with {digest!r}; give a longer digest")
        return read_artifact(found[0])

    def holds(self, digest: str) -> bool:
        """Say whether the artifact of this whole digest is here."""
        return (self.root / "objects" / digest / MANIFEST).exists()

    def verify(self, artifact: Artifact) -> None:
        """Check every file against the manifest.

        What is called ``.something``, or lies below a folder that is, may be there beside what the manifest names: it
        belongs to file systems, editors and file managers (``.nfs0000``, ``.DS_Store``), which come and go as they do.

        Raises:
            StoreError: names the file that differs, or cannot be read, or is not of the artifact.
        """
        folder = artifact.folder
        is_object = folder.parent == self.root / "objects"
        advice = "delete that folder" if is_object else "that copy is not whole yet, or damaged: copy it again"
        try:
            for name, digest in sorted(artifact.files.items()):
                if not (folder / name).is_file() or hash_file(folder / name) != digest:
                    raise StoreError(f"{folder / name} is not what its manifest says; {advice}")
            found = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
        except OSError as error:  # not to be read, or renamed while it was looked at
            raise StoreError(f"a file of {folder} cannot be read: {error}") from error
        for foreign in sorted(found - {PurePath(name) for name in (*artifact.files, MANIFEST)}):
            if not any(part.startswith(".") for part in foreign.parts):
                raise StoreError(f"{folder / foreign} is not in its manifest; delete that file")

    def artifacts(self) -> Iterator[Artifact]:
        """Give every artifact, in the order of digests."""
        for folder in sorted((self.root / "objects").glob("*")):
            yield read_artifact(folder)

    def cached(self, key: str) -> Artifact | None:
        """Give what the step with this key made before, if it is still here.

        Raises:
            StoreError: the note of it cannot be read.
        """
        path = self.root / "cache" / f"{key}.json"
        if not path.exists():
            return None
        try:
            digest = msgspec.json.decode(path.read_bytes(), type=dict[str, str])["digest"]
        except (msgspec.DecodeError, KeyError, OSError) as error:
            raise StoreError(f"{path} cannot be read: {error}; delete it") from error
        return self.get(digest) if self.holds(digest) else None

    def remember(self, key: str, artifact: Artifact) -> None:
        """Note that the step with this key makes ``artifact``."""
        write_atomically(self.root / "cache" / f"{key}.json", msgspec.json.encode({"digest": artifact.digest}))

    def checkpoints(self, key: str) -> Path:
        """Give a folder that outlives an interruption, for the work that ``key`` names. Raises StoreError."""
        folder = self.root / "checkpoints" / key
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        return folder

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """Give an empty folder that is gone afterwards, unless ``put`` has moved it.

        What a process left that was killed in the middle goes when the next one asks.
        """
        parent = self.root / "tmp"
        with writing(parent):
            parent.mkdir(parents=True, exist_ok=True)
            for left in parent.iterdir():
                owner = left.name.partition("-")[0]
                if not (owner.isdigit() and psutil.pid_exists(int(owner))):
                    shutil.rmtree(left, ignore_errors=True)
            folder = Path(tempfile.mkdtemp(dir=parent, prefix=f"{os.getpid()}-"))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def read_artifact(folder: Path) -> Artifact:
    """Read a stored artifact by the manifest in its folder.

    Raises:
        StoreError: there is no manifest, or it is damaged, or it names files outside the folder.
    """
    path = folder / MANIFEST
    try:
        manifest = msgspec.json.decode(path.read_bytes(), type=Manifest)
    except FileNotFoundError as error:
        raise StoreError(f"{folder} holds no artifact: it has no {MANIFEST}") from error
    except (msgspec.DecodeError, UnicodeDecodeError, OSError) as error:
        raise StoreError(f"{path} cannot be read: {error}") from error
    for name in (manifest.entry_name, *manifest.files):
        parts = PurePosixPath(name)
        if parts.is_absolute() or ".." in parts.parts:
            raise StoreError(f"{path} names the file {name!r}, which is outside its folder")
    return Artifact(
        folder=folder,
        format=manifest.format,
        entry_name=manifest.entry_name,
        files=manifest.files,
        signature=manifest.signature,
        traits=frozenset(manifest.traits),
        lineage=tuple(manifest.lineage),
        host=manifest.host,
        preprocess=manifest.preprocess,
    )


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that a reader sees the old one or the new one, whole.

    Raises:
        StoreError: the disk is full or cannot be written; the old file is as it was.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
        try:
            with fresh.open("xb") as file:  # as the user's umask says; a temporary file would be the owner's alone
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(path)
        except BaseException:
            fresh.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def database(path: Path, otherwise: str) -> Iterator[sqlite3.Connection]:
    """Open an SQLite file with a write-ahead log for one transaction, which is there whole or not at all.

    Args:
        path: The file; it is made where there is none.
        otherwise: How the message ends: what is kept, or what to do.

    Raises:
        StoreError: the file is no database, or cannot be written.
    """
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=30)) as db, db:
            db.execute("PRAGMA journal_mode = WAL")
            yield db
    except sqlite3.Error as error:
        what = "the disk is full" if "full" in str(error) else str(error)
        raise StoreError(f"{path}: {what}; {otherwise}") from error


@contextlib.contextmanager
def locked(file: Path, busy: str) -> Iterator[BinaryIO]:
    """Hold a file that stands for something for this process alone until the block ends; a killed one lets go of it.

    Raises:
        BadInput: another process holds it, in the words of ``busy``. StoreError: it cannot be written.
    """
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        held = file.open("ab")
    with held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput(busy) from None
        yield held


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failure of the disk below into one line that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StoreError(f"the disk is full while writing {path}; free some space, nothing was changed") from error
        raise StoreError(f"cannot write {path}: {error.strerror or error}") from error
