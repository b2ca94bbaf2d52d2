"""A deployment: what a server must run, as a TOML file beside the model's own files."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from hasten.artifact import Artifact, Json
from hasten.errors import BadInput, StoreError, UsageError
from hasten.settings import Doc, build
from hasten.store import MANIFEST, Store, read_artifact, write_atomically, writing

FILE = "deployment.toml"
MODEL = "model"


Count = Annotated[int, Meta(ge=1)]
Milliseconds = Annotated[float, Meta(gt=0)]


@dataclass(frozen=True, kw_only=True)
class Serving:
    """How a server runs a deployment. Every field has a default, so bundles from before it was there still load."""

    instances: Annotated[
        Count | None, Doc("sessions that run at once; none: the cores divided by their threads, or 2 on a GPU")
    ] = None
    batch_sizes: Annotated[
        tuple[Count, ...],
        Doc(
            "rows that a run may have, others are padded; none: powers of two up to 8 or ``batch``, on a GPU 1, 4, 16 "
            "and 64"
        ),
    ] = ()
    queue_rows: Annotated[Count, Doc("rows that may wait")] = 1024
    queue_bytes: Annotated[Count, Doc("bytes of inputs that may wait")] = 256 << 20
    concurrency: Annotated[Count, Doc("requests that may be in the service at once")] = 4096
    objective_ms: Annotated[
        Milliseconds | None, Doc("time in which an answer is wanted: batches wait for it, admission refuses by it")
    ] = None
    timeout_ms: Annotated[Milliseconds | None, Doc("time after which an answer is of no use")] = None
    run_limit_ms: Annotated[Milliseconds, Doc("time after which a run counts as hung")] = 30_000.0
    isolation: Annotated[
        Literal["auto", "thread", "process"],
        Doc(
            "where sessions run: each in a thread or in a process; auto: tiny ones on the event loop, else in a thread"
        ),
    ] = "auto"
    slot_bytes: Annotated[
        Count | None, Doc("bytes of shared memory for a run's inputs or outputs; none: from the signature")
    ] = None
    priority: Annotated[Count, Doc("priority of requests that name none; 1 is the highest")] = 8
    max_change: Annotated[
        Annotated[float, Meta(ge=0)] | None, Doc("largest change of the answers from the version before; none: any")
    ] = None


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """What to serve and how. Times in milliseconds; an absent field is not limited, or not known."""

    name: str
    artifact: str
    """Digest of what the engine built; its files lie in ``model/`` beside this file."""
    engine: str
    settings: dict[str, Json]
    source: str
    """Digest of the model that was imported."""
    plan: str
    """The plan that made it, as one line of JSON."""
    verdict: str
    host: str | None = None
    """Fingerprint of the host that it was built and measured on."""
    versions: dict[str, str] = field(default_factory=dict)
    batch: int = 1
    p99_ms: float | None = None
    """The objective, where the goal had one."""
    preprocess: dict[str, Json] | None = None
    classes: list[str] | None = None
    claims: dict[str, Json] = field(default_factory=dict)
    """What was certified: speed-up and drop with their intervals."""
    serving: Serving = field(default_factory=Serving)
    pre: tuple[dict[str, Json], ...] = ()
    """Steps before the model, in order: ``step`` is the name of each (``hasten.steps``), the rest its settings."""
    post: tuple[dict[str, Json], ...] = ()
    """Steps after the model."""
    raw: bool = False
    """Serve the model without its steps too, as NAME.raw."""


def write_deployment(
    deployment: Deployment, built: Artifact, folder: Path, *, files: Mapping[str, bytes] | None = None
) -> Path:
    """Write a bundle: the deployment, a copy of the model, and other files beside. Gives the path of the TOML file.

    The folder appears whole, or what was there before stays. A bundle that was there is replaced with all its folder
    holds.

    Raises:
        BadInput: something else than a bundle is there. StoreError: the disk is full or cannot be written.
    """
    check_place(folder)
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        try:
            for name in (*built.files, MANIFEST):  # files alone: the store's folders are the owner's
                (fresh / MODEL / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(built.folder / name, fresh / MODEL / name)
            for name, data in (files or {}).items():
                write_atomically(fresh / name, data)
            write_atomically(fresh / FILE, msgspec.toml.encode(_told(deployment)))
            fresh.chmod(0o755)
            old = fresh.with_name(f"{fresh.name}.old")
            if folder.exists():
                folder.rename(old)
            try:
                fresh.rename(folder)
            except OSError:
                if old.exists():
                    old.rename(folder)
                raise
            shutil.rmtree(old, ignore_errors=True)
        except BaseException:
            shutil.rmtree(fresh, ignore_errors=True)
            raise
    return folder / FILE


def check_place(folder: Path) -> None:
    """Check that a bundle may be written to ``folder``: there is nothing, an empty folder, or a bundle to replace.

    Raises:
        BadInput: something else is there, or it lies in another bundle, where nobody would find it.
    """
    for above in list(folder.absolute().parents)[:2]:
        if (above / FILE).is_file():
            raise BadInput(f"{folder} lies in the bundle {above}, which is served whole; give a folder beside it")
    with writing(folder):
        free = not any(folder.iterdir()) if folder.is_dir() else not folder.exists()
        is_bundle = (folder / FILE).is_file()
    if not (free or is_bundle):
        raise BadInput(f"{folder} is there already and is no bundle: it has no {FILE}; give another folder")


def read_deployment(path: Path, between: Callable[[], None] = lambda: None) -> tuple[Deployment, Artifact]:
    """Read a bundle by its TOML file, and check every file of the model.

    Args:
        path: The TOML file.
        between: Called between the steps, for who has others to let through.

    Raises:
        StoreError: a file is missing or damaged, or the model is another than the deployment names.
    """
    deployment = parse_deployment(path)
    between()
    artifact = read_artifact(path.parent / MODEL)
    between()
    if artifact.digest != deployment.artifact:
        raise StoreError(
            f"{path} names artifact {deployment.artifact[:12]}, but {MANIFEST} says {artifact.digest[:12]}"
        )
    Store(path.parent).verify(artifact)
    return deployment, artifact


def parse_deployment(path: Path) -> Deployment:
    """Read the TOML file alone; the model's files are not looked at.

    Raises:
        StoreError: it cannot be read, or is no deployment.
    """
    try:
        plain = msgspec.toml.decode(path.read_bytes())
        serving = plain.get("serving", {})
        if isinstance(serving, Mapping):  # an unknown field must not pass for a default
            build(Serving, serving, name="serving")
        return msgspec.convert(plain, Deployment)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, UsageError, RecursionError) as error:
        raise StoreError(f"{path} is no deployment that can be read: {error}") from error


def _told(deployment: Deployment) -> dict[str, Json]:
    """Give what its file says: without steps where there are none, so that somebody can write some behind the rest."""
    told = _without_none(msgspec.to_builtins(deployment))
    return {key: value for key, value in told.items() if value or key not in ("pre", "post")}


def _without_none(value: Mapping[str, Json]) -> dict[str, Json]:
    """TOML has no null: an absent key says the same."""
    return {
        key: _without_none(item) if isinstance(item, Mapping) else item
        for key, item in value.items()
        if item is not None
    }
