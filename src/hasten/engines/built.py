"""What every engine says of what it built, and checks before it opens it."""

from __future__ import annotations

from pathlib import Path

from hasten.artifact import Artifact
from hasten.engines.batch import with_batch
from hasten.errors import StoreError
from hasten.host import this_host


def built_from(source: Artifact, folder: Path, entry: str, *, engine: str, batch: int | None) -> Artifact:
    """Describe what an engine wrote into ``folder``: bound to this host, its batch fixed where it was asked for."""
    return Artifact.of(
        folder,
        entry,
        format=engine,
        signature=source.signature if batch is None else with_batch(source.signature, batch),
        traits=source.traits,
        host=this_host().binding,
        preprocess=source.preprocess,
    )


def check_built(built: Artifact, *, engine: str) -> None:
    """Check that an artifact is what an engine wrote, whole, and for this host.

    Raises:
        StoreError: it is not; says what to do.
    """
    if built.format != engine:
        raise StoreError(f"{built.entry} is {built.format!r}, not what {engine} writes; build it first")
    if missing := [name for name in built.files if not (built.folder / name).is_file()]:
        raise StoreError(f"{built.folder / missing[0]} is not there; delete that folder and build it again")
    if built.host not in (None, this_host().binding):
        raise StoreError(f"{built.entry} was built for another processor; build it again on this one")
