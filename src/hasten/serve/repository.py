"""The deployments that a server may load: one bundle, or a folder of models/NAME[/VERSION]/deployment.toml."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from hasten.composition import read_composition
from hasten.deployment import FILE, MODEL, parse_deployment
from hasten.errors import ModelNotFound, StoreError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""What a folder must be called to be a model or a version; others are none of ours."""

FIRST = "1"
"""The version of a bundle that lies in its model's folder itself."""


@dataclass(frozen=True)
class Bundle:
    """Where a version of a model lies; ``stamp`` changes when a file of it comes, goes or is written anew."""

    name: str
    version: str
    path: Path
    stamp: tuple[int, ...]
    """Of the TOML file, the modification time in nanoseconds, and the inode: bundles are replaced by renaming. Of the
    files beside it and of the model: how many there are, their bytes, and the last modification: where a bundle is
    copied file by file, the TOML file may be the first to arrive."""


@dataclass(frozen=True)
class Repository:
    """A folder of models; with ``single``, ``root`` is the TOML file of the only one.

    A name from a request is looked up among the names found here; it never becomes part of a path.
    """

    root: Path
    single: str | None = None
    """The name of the only model."""

    def scan(self) -> dict[str, dict[str, Bundle]]:
        """Read the folder: the versions of each model, by name.

        Raises:
            StoreError: the folder cannot be read.
        """
        if self.single is not None:
            bundle = _bundle(self.single, FIRST, self.root)
            return {self.single: {FIRST: bundle}} if bundle else {}
        home = self.root.resolve()
        found: dict[str, dict[str, Bundle]] = {}
        try:
            for folder in sorted(self.root.iterdir()):
                if NAME.fullmatch(folder.name) and _inside(folder, home):
                    versions = _versions(folder, home)
                    if versions:
                        found[folder.name] = versions
        except OSError as error:
            raise StoreError(f"{self.root} cannot be read: {error.strerror or error}") from error
        return found

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


def _versions(folder: Path, home: Path) -> dict[str, Bundle]:
    own = _bundle(folder.name, FIRST, folder / FILE)
    if own:
        return {FIRST: own}
    found = {}
    for below in sorted(folder.iterdir()) if folder.is_dir() else ():
        if (
            NAME.fullmatch(below.name)
            and _inside(below, home)
            and (bundle := _bundle(folder.name, below.name, below / FILE))
        ):
            found[below.name] = bundle
    return found


def _inside(path: Path, home: Path) -> bool:
    return path.resolve().is_relative_to(home)


def _bundle(name: str, version: str, path: Path) -> Bundle | None:
    try:
        stat = path.stat()
    except OSError:  # not there, or gone between looking and asking: either way there is none
        return None
    return Bundle(name, version, path, (stat.st_mtime_ns, stat.st_ino, *_stamp(path.parent)))


def _stamp(folder: Path) -> tuple[int, int, int]:
    """Give the count, the bytes and the last modification of the files of a bundle, as far as they can be seen."""
    count = size = last_ns = 0
    for stat in (*_stats(str(folder), deep=False), *_stats(str(folder / MODEL), deep=True)):
        count, size, last_ns = count + 1, size + stat.st_size, max(last_ns, stat.st_mtime_ns)
    return count, size, last_ns


def _stats(folder: str, *, deep: bool) -> Iterator[os.stat_result]:
    """Look at the files of a folder, with ``deep`` of those within it too; what goes meanwhile is left out."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if deep and entry.is_dir(follow_symlinks=False):
                yield from _stats(entry.path, deep=True)
            elif entry.is_file():
                yield entry.stat()


def restamped(bundle: Bundle) -> Bundle | None:
    """Give a bundle as it lies there now, or None: it has gone."""
    return _bundle(bundle.name, bundle.version, bundle.path)
