"""The deployments that a server may load: one bundle, or a folder of models/NAME[/VERSION]/deployment.toml."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hasten.composition import read_composition
from hasten.deployment import FILE, MODEL, parse_deployment
from hasten.errors import ModelNotFound, StoreError

logger = logging.getLogger(__name__)

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""What a folder must be called to be a model or a version; others are none of ours."""

FIRST = "1"
"""The version of a bundle that lies in its model's folder itself."""


Seen = tuple[str, int, int, int, int]
"""A file's name, bytes, inode, and when it was modified and when anything of it was changed, in nanoseconds."""


@dataclass(frozen=True)
class Bundle:
    """Where a version of a model lies; ``stamp`` changes when a file of it comes, goes or is written anew."""

    name: str
    version: str
    path: Path
    stamp: tuple[Seen, ...]
    """Of the TOML file, of those beside it and of the model's: where a bundle is copied file by file, the TOML file may
    be the first to arrive, and some tools give the copies the times of what they copied."""


@dataclass(frozen=True)
class Repository:
    """A folder of models; with ``single``, ``root`` is the TOML file of the only one.

    A name from a request is looked up among the names found here; it never becomes part of a path.
    """

    root: Path
    single: str | None = None
    """The name of the only model."""
    _told: set[str] = field(default_factory=set, compare=False, repr=False)
    """What was logged of folders that are left out: once each."""

    def scan(self, known: Mapping[str, Mapping[str, Bundle]] | None = None) -> dict[str, dict[str, Bundle]]:
        """Read the folder: the versions of each model, by name.

        Of a model whose own folder cannot be looked at, those that are ``known`` stay: it may be for a moment.

        Raises:
            StoreError: the folder cannot be read.
        """
        if self.single is not None:
            try:
                bundle = _bundle(self.single, FIRST, self.root)
            except OSError as error:
                raise StoreError(f"{self.root} cannot be read: {error.strerror or error}") from error
            return {self.single: {FIRST: bundle}} if bundle else {}
        found: dict[str, dict[str, Bundle]] = {}
        try:
            home, folders = self.root.resolve(), sorted(self.root.iterdir())
        except OSError as error:
            raise StoreError(f"{self.root} cannot be read: {error.strerror or error}") from error
        for folder in folders:
            try:
                versions = self._versions(folder, home) if self._is_ours(folder, home) else {}
            except OSError as error:
                self._tell(f"{folder} cannot be looked at: {error.strerror or error}")
                versions = dict((known or {}).get(folder.name, {}))
            if versions:
                found[folder.name] = versions
        return found

    def _versions(self, folder: Path, home: Path) -> dict[str, Bundle]:
        own = _bundle(folder.name, FIRST, folder / FILE)
        if own:
            return {FIRST: own}
        found = {}
        for below in sorted(folder.iterdir()) if folder.is_dir() else ():
            if self._is_ours(below, home) and (bundle := _bundle(folder.name, below.name, below / FILE)):
                found[below.name] = bundle
        return found

    def _is_ours(self, path: Path, home: Path) -> bool:
        """Say whether a folder may be a model or a version; where it holds one and may not, that is logged."""
        if path.name.startswith("."):
            return False
        named = NAME.fullmatch(path.name) is not None
        try:
            inside = path.resolve().is_relative_to(home)
        except (OSError, RuntimeError):  # a link to itself: an error of its own before Python 3.13
            inside = False
        if not (named and inside) and (path.is_symlink() or (path / FILE).is_file()):
            why = "leads out of the repository" if named else "has a name that no client could write"
            self._tell(f"{path} is left out: it {why}")
        return named and inside

    def _tell(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            logger.warning("%s", text)

    def find(self, name: str, version: str | None = None) -> Bundle:
        """Give a model's bundle: that version, or the newest.

        Raises:
            ModelNotFound: there is none.
        """
        return pick(self.scan(), name, version)


def pick(found: Mapping[str, Mapping[str, Bundle]], name: str, version: str | None = None) -> Bundle:
    """Choose of what a scan found: that version of a model, or its newest.

    Raises:
        ModelNotFound: there is none.
    """
    versions = found.get(name)
    if versions is None:
        raise ModelNotFound(f"no model is called {name[:128]!r} here")
    if version is None:
        return versions[newest(versions)]
    if version not in versions:
        raise ModelNotFound(f"model {name!r} has no version {version[:128]!r}; it has {', '.join(sorted(versions))}")
    return versions[version]


def open_repository(path: Path) -> Repository:
    """Give the repository at ``path``: a deployment.toml, a bundle's folder, or a folder of models.

    Raises:
        StoreError: there is nothing to serve.
    """
    file = path / FILE if path.is_dir() else path
    if file.is_file():
        composition = read_composition(file)
        return Repository(file, single=composition.name if composition else parse_deployment(file).name)
    repository = Repository(path)
    if not path.is_dir() or not repository.scan():
        raise StoreError(
            f"{path} holds no deployment: give a {FILE}, or a folder of NAME/{FILE} or NAME/VERSION/{FILE}"
        )
    return repository


def newest(versions: Mapping[str, Bundle]) -> str:
    """Give the highest version: as numbers where they are numbers, which come after words."""
    return max(versions, key=lambda version: (version.isdecimal(), int(version) if version.isdecimal() else 0, version))


def _bundle(name: str, version: str, path: Path) -> Bundle | None:
    """Look at a bundle; None: there is none. Raises OSError: nobody knows."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):  # or gone between looking and asking
        return None
    seen = (*_seen(str(path.parent), deep=False), *_seen(str(path.parent / MODEL), deep=True))
    return Bundle(name, version, path, tuple(sorted(seen)))


def _seen(folder: str, *, deep: bool) -> Iterator[Seen]:
    """Look at the files of a folder, with ``deep`` of those within it too; what goes meanwhile is left out."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if deep and entry.is_dir(follow_symlinks=False):
                yield from _seen(entry.path, deep=True)
            elif entry.is_file():
                stat = entry.stat()
                yield entry.path, stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns


def restamped(bundle: Bundle) -> Bundle | None:
    """Give a bundle as it lies there now, or None: it has gone, or cannot be looked at."""
    try:
        return _bundle(bundle.name, bundle.version, bundle.path)
    except OSError:
        return None
