"""A pass, and the one place where passes are checked, cached, timed, given a lineage, and their failures wrapped."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Protocol, runtime_checkable

import msgspec

from hasten.artifact import Artifact, Step, hash_file
from hasten.errors import BuildFailed, HastenError, StoreError, Unsupported
from hasten.host import this_host, versions
from hasten.isolation import Progress
from hasten.samples import Samples
from hasten.settings import values_of
from hasten.store import Store, writing

HISTORY = "training.json"
"""What a pass that trains leaves beside its model: how the training went."""

NO_ROOM_BYTES = 1 << 16
"""A disk with less is full."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a pass may use while it works."""

    folder: Path
    """Empty, and the pass's own: the new artifact's files go here, and nothing else."""
    samples: Samples | None
    """The calibrate split, for passes with ``uses_samples``."""
    seed: int
    progress: Progress
    """Call it in long loops: ``ctx.progress("layer 3 of 50", 0.06)``."""
    training: Samples | None = None
    """The train split, for passes with ``uses_training``, where there is one; its labels may be None."""
    teacher: Artifact | None = None
    """The original model, to distill from; None: the pass's own source."""
    checkpoints: Path | None = None
    """A folder that outlives an interruption, the pass's own: long work leaves there what it goes on from."""


@runtime_checkable
class Pass(Protocol):
    """One way to change a model: a frozen dataclass whose fields are its settings.

    ``name`` is its registry name. With ``uses_samples`` its result depends on the calibration samples, with
    ``uses_training`` on the train split and the teacher.
    """

    name: ClassVar[str]
    uses_samples: ClassVar[bool]
    uses_training: ClassVar[bool]

    def why_not(self, source: Artifact) -> str | None:
        """Say in a sentence why it cannot take ``source``, or None. Cheap: reads no weights."""

    def apply(self, source: Artifact, ctx: Context) -> Artifact:
        """Write the changed model into ``ctx.folder`` and describe it (``Artifact.of``), without lineage.

        Raises:
            Unsupported: it meets something in the model that it cannot handle; never guesses.
        """


@runtime_checkable
class ReadsFiles(Protocol):
    """A pass whose settings name files: its result depends on what they hold."""

    def reads(self) -> tuple[Path, ...]:
        """Give the files; ``why_not`` has seen that they are there."""


def run_pass(step: Pass, source: Artifact, store: Store, ctx: Context) -> Artifact:
    """Apply a pass: check that it can, look into the cache, run it, add the lineage, keep the result.

    ``ctx.folder`` is ignored: the pass gets an empty one of the store. Gives ``source`` itself, where the pass
    left every byte as it was.

    Raises:
        Unsupported: the pass declines, with its sentence.
        BuildFailed: it failed in a way it did not announce; the cause is chained.
        StoreError: the result cannot be written.
    """
    if reason := step.why_not(source):
        raise Unsupported(step.name, reason)
    key = step_key(step, source, ctx)
    found = store.cached(key)
    if found is not None and found.host in (None, this_host().binding):
        return found
    with store.scratch() as folder:
        start = time.perf_counter()
        kept = store.checkpoints(key) if step.uses_training else None
        made = _apply(step, source, replace(ctx, folder=folder, checkpoints=kept))
        record = Step(
            name=step.name,
            settings=values_of(step),
            source=source.digest,
            seconds=time.perf_counter() - start,
            versions=versions(),
        )
        unchanged = made.content == source.content
        result = source if unchanged else store.put(made.after(record, source=source))
    store.remember(key, result)
    if kept is not None:
        shutil.rmtree(kept, ignore_errors=True)
    return result


def step_key(step: Pass, source: Artifact, ctx: Context) -> str:
    """Give the cache key: pass, settings, source, seed, versions, and the samples and files where they matter."""
    parts = {
        "name": step.name,
        "settings": values_of(step),
        "source": source.digest,
        "seed": ctx.seed,
        "versions": versions(),
        "samples": ctx.samples.digest if step.uses_samples and ctx.samples else None,
        **({"training": _training_key(ctx)} if step.uses_training else {}),
        **({"files": [hash_file(path) for path in step.reads()]} if isinstance(step, ReadsFiles) else {}),
    }
    return hashlib.sha256(msgspec.json.encode(parts, order="deterministic")).hexdigest()


def _training_key(ctx: Context) -> tuple[str | None, str | None]:
    return ctx.training.digest if ctx.training else None, ctx.teacher.content if ctx.teacher else None


def _apply(step: Pass, source: Artifact, ctx: Context) -> Artifact:
    if step.uses_samples and ctx.samples is None:
        raise Unsupported(step.name, "it needs calibration samples; give some with --data")
    try:
        return step.apply(source, ctx)
    except StoreError as error:
        raise BuildFailed(step.name, str(error)) from error  # what a runtime refuses is no fault of the disk
    except HastenError:
        _check_room(ctx.folder)
        raise
    except Exception as error:
        _check_room(ctx.folder)
        if isinstance(error, OSError) and _in_writing(error, ctx.folder):
            with writing(ctx.folder):
                raise
        reason = " ".join(str(error).split())[:500]
        raise BuildFailed(step.name, f"{type(error).__name__}: {reason}") from error


def _check_room(folder: Path) -> None:
    """Say that the disk is full, where that is why a runtime could not write: few of them tell.

    Raises:
        StoreError: there is less than ``NO_ROOM_BYTES`` left.
    """
    if shutil.disk_usage(folder).free < NO_ROOM_BYTES:
        raise StoreError(f"the disk is full while writing {folder}; free some space, nothing was changed")


def _in_writing(error: OSError, folder: Path) -> bool:
    """Tell a failure to write the result from one to read something else."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return full or error.filename is None or Path(os.fsdecode(error.filename)).is_relative_to(folder)
