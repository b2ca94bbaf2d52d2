"""A model on disk, immutable, with where it came from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec

from hasten.tensors import Signature

Json = Any
"""A value that JSON can hold: msgspec checks it where it is read."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One thing that was done to a model: a pass, or a build."""

    name: str
    settings: Mapping[str, Json] = field(default_factory=dict)
    source: str | None = None
    """Digest of the artifact that it was done to; None where the model came from outside."""
    seconds: float = 0.0
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """A model on disk. Build one with ``Artifact.of``; two with one ``digest`` are the same model, made the same way.

    ``files`` maps each file's name, relative to ``folder``, to its SHA-256; ``entry_name`` is the one to open.
    """

    folder: Path
    format: str
    entry_name: str
    files: Mapping[str, str]
    signature: Signature
    traits: frozenset[str] = frozenset()
    lineage: tuple[Step, ...] = ()
    host: str | None = None
    """``Host.binding`` of the hosts that it runs on; None: on any."""
    preprocess: Mapping[str, Json] | None = None
    """Declared preprocessing of its inputs (``hasten.samples.Preprocess``), or None."""

    @classmethod
    def of(
        cls,
        folder: Path,
        entry_name: str,
        *,
        format: str,  # noqa: A002 - the field's name
        signature: Signature,
        traits: Iterable[str] = (),
        host: str | None = None,
        preprocess: Mapping[str, Json] | None = None,
    ) -> Artifact:
        """Describe the model in ``folder``, hashing every file there."""
        return cls(
            folder=folder,
            format=format,
            entry_name=entry_name,
            files=hash_files(folder),
            signature=signature,
            traits=frozenset(traits),
            host=host,
            preprocess=preprocess,
        )

    @property
    def entry(self) -> Path:
        """The file to open."""
        return self.folder / self.entry_name

    @property
    def size_bytes(self) -> int:
        """All files together."""
        return sum((self.folder / name).stat().st_size for name in self.files)

    @cached_property
    def content(self) -> str:
        """SHA-256 of format and files: equal where the bytes are equal, however they were made."""
        return _sha({"format": self.format, "entry": self.entry_name, "files": dict(sorted(self.files.items()))})

    @cached_property
    def digest(self) -> str:
        """SHA-256 of content, signature, traits, host, preprocessing and lineage (without its timings)."""
        return _sha(
            {
                "content": self.content,
                "signature": msgspec.to_builtins(self.signature),
                "traits": sorted(self.traits),
                "host": self.host,
                "preprocess": self.preprocess,
                "lineage": [{"name": s.name, "settings": dict(s.settings), "source": s.source} for s in self.lineage],
            }
        )

    def after(self, step: Step, *, source: Artifact | None) -> Artifact:
        """Give this artifact with the lineage of ``source`` and ``step`` behind it."""
        before = source.lineage if source else ()
        return replace(self, lineage=(*before, step))


def hash_files(folder: Path) -> dict[str, str]:
    """Give the SHA-256 of every file below ``folder``, by its relative name in POSIX form."""
    return {
        path.relative_to(folder).as_posix(): hash_file(path) for path in sorted(folder.rglob("*")) if path.is_file()
    }


def hash_file(path: Path) -> str:
    """Give the SHA-256 of one file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sha(value: Json) -> str:
    return hashlib.sha256(msgspec.json.encode(value, order="deterministic")).hexdigest()
