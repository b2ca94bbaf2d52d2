"""The files of a bundle beside its TOML file and its model: golden answers, and what its steps read."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from hasten import registry
from hasten.deployment import FILE, MODEL, Deployment, check_place, parse_deployment
from hasten.errors import BadInput, HastenError, StoreError
from hasten.golden import GOLDEN
from hasten.settings import settings_of
from hasten.steps.pipeline import KIND, Table
from hasten.steps.step import Around
from hasten.store import MANIFEST, read_artifact


def files_beside(path: Path, deployment: Deployment) -> dict[str, bytes]:
    """Give what a copy of a bundle needs beside its model, by name relative to the bundle's folder.

    Args:
        path: Its TOML file.
        deployment: What that says.

    Raises:
        StoreError: a file cannot be read or is too large, or a step is not known here.
    """
    around = Around(folder=path.parent)
    try:
        return {name: around.file(name).read_bytes() for name in names_beside(path.parent, deployment)}
    except OSError as error:
        raise StoreError(f"a file of {path.parent} cannot be read: {error}") from error


def check_replaceable(folder: Path) -> None:
    """Check that writing a bundle to ``folder`` loses nothing but another bundle.

    Raises:
        BadInput: what is there is no bundle, or it holds something else besides.
    """
    check_place(folder)
    path = folder / FILE
    if not path.is_file():
        return
    try:
        model = (f"{MODEL}/{name}" for name in (*read_artifact(folder / MODEL).files, MANIFEST))
        own = {PurePosixPath(name) for name in (FILE, *model, *names_beside(folder, parse_deployment(path)))}
    except StoreError as error:
        raise BadInput(f"{folder} is no bundle that may be replaced: {error}; give another folder") from error
    own |= {parent for name in own for parent in name.parents}
    for found in folder.rglob("*"):
        systems = found.name == ".DS_Store" or found.name.startswith(".nfs")  # nobody's: a system's own notes
        if PurePosixPath(found.relative_to(folder).as_posix()) not in own and not systems:
            raise BadInput(f"{found} is no part of the bundle in {folder} and would be lost; give another folder")


def names_beside(folder: Path, deployment: Deployment) -> frozenset[str]:
    """Give golden answers and the files that steps read, where they are there. Raises StoreError."""
    try:
        texts = {GOLDEN}.union(*(_texts(table) for table in (*deployment.pre, *deployment.post)))
    except HastenError as error:
        raise StoreError(f"{folder / FILE}: {error}") from error
    return frozenset(text for text in texts if _is_inside(folder, text))


def _texts(table: Table) -> set[str]:
    """Give the settings of a step that are texts: a file is named by one. Raises HastenError: no such step."""
    defaults = {setting.name: setting.default for setting in settings_of(registry.load("step", str(table.get(KIND))))}
    return {value for value in {**defaults, **table}.values() if isinstance(value, str)}


def _is_inside(folder: Path, name: str) -> bool:
    if PurePosixPath(name).is_absolute():
        return False
    try:
        return (folder / name).is_file() and (folder / name).resolve().is_relative_to(folder.resolve())
    except OSError:  # a text that is too long for a file's name
        return False
