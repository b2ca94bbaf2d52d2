from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from hasten.artifact import Artifact
from hasten.errors import BuildFailed, StoreError, Unsupported
from hasten.graph.model import read_model, write_model
from hasten.samples import Samples
from hasten.store import Store
from hasten.testing.models import mlp, stored
from hasten.transform import Context, Pass, run_pass, step_key


@dataclass(frozen=True, kw_only=True)
class Rename:
    """Rename the graph. Its settings let it misbehave."""

    name: ClassVar[str] = "rename"
    uses_samples: ClassVar[bool] = False
    uses_training: ClassVar[bool] = False

    to: str = "other"
    error: str = ""

    def why_not(self, source: Artifact) -> str | None:
        return "it is renamed already" if "renamed" in source.traits else None

    def apply(self, source: Artifact, ctx: Context) -> Artifact:
        ctx.progress("renaming", 0.5)
        if self.error:
            raise ERRORS[self.error](source, ctx.folder)
        model = read_model(source)
        if model.graph.name == self.to:
            return source
        model.graph.name = self.to
        return write_model(model, ctx.folder, source, add={"renamed"})


class Calibrated(Rename):
    name: ClassVar[str] = "calibrated"
    uses_samples: ClassVar[bool] = True
    uses_training: ClassVar[bool] = False


ERRORS = {
    "unsupported": lambda source, folder: Unsupported("rename", "it has no kernel for NonZero"),
    "bug": lambda source, folder: ZeroDivisionError("one\ntwo"),
    "read": lambda source, folder: FileNotFoundError(2, "No such file or directory", str(source.entry)),
    "write": lambda source, folder: PermissionError(13, "Permission denied", str(folder / "model.onnx")),
    "full": lambda source, folder: OSError(28, "No space left on device"),
}


@pytest.fixture
def source(store: Store) -> Artifact:
    return stored(mlp(), store)


def samples(value: float = 0.0) -> Samples:
    return Samples({"x": np.full((4, 16), value, np.float32)})


def test_the_result_is_kept_with_its_lineage(source, store, ctx):
    made = run_pass(Rename(), source, store, ctx)
    assert store.get(made.digest) == made
    step = made.lineage[-1]
    assert (step.name, step.settings, step.source) == ("rename", {"to": "other", "error": ""}, source.digest)
    assert step.versions["onnx"]
    assert step.seconds > 0
    assert made.traits == {"renamed"}


def test_a_second_time_it_comes_from_the_cache(source, store, ctx):
    calls: list[str] = []
    counting = replace(ctx, progress=lambda text, share: calls.append(text))
    assert run_pass(Rename(), source, store, counting) == run_pass(Rename(), source, store, counting)
    assert calls == ["renaming"]


def test_a_pass_that_changes_nothing_gives_its_source(source, store, ctx):
    made = run_pass(Rename(to="net"), source, store, ctx)
    assert made == source
    assert [step.name for step in made.lineage] == ["import"]


def test_a_pass_that_declines_says_why(source, store, ctx):
    made = run_pass(Rename(), source, store, ctx)
    with pytest.raises(Unsupported, match="rename: it is renamed already"):
        run_pass(Rename(), made, store, ctx)


def test_an_announced_failure_goes_through_as_it_is(source, store, ctx):
    with pytest.raises(Unsupported, match="NonZero"):
        run_pass(Rename(error="unsupported"), source, store, ctx)


def test_any_other_failure_is_wrapped_in_one_line_with_its_cause(source, store, ctx):
    with pytest.raises(BuildFailed, match="rename: ZeroDivisionError: one two") as error:
        run_pass(Rename(error="bug"), source, store, ctx)
    assert isinstance(error.value.__cause__, ZeroDivisionError)


def test_a_source_that_cannot_be_read_is_not_blamed_on_writing(source, store, ctx):
    with pytest.raises(BuildFailed, match=r"No such file.*model\.onnx"):
        run_pass(Rename(error="read"), source, store, ctx)


@pytest.mark.parametrize(("error", "message"), [("write", "cannot write"), ("full", "the disk is full")])
def test_a_result_that_cannot_be_written_is_a_store_error_and_leaves_nothing(source, store, ctx, error, message):
    with pytest.raises(StoreError, match=message):
        run_pass(Rename(error=error), source, store, ctx)
    assert not list((store.root / "tmp").iterdir())
    assert list(store.artifacts()) == [source]


def test_a_pass_gets_an_empty_folder_of_its_own(source, store, ctx):
    seen: list[Path] = []

    class Looks(Rename):
        def apply(self, source: Artifact, ctx: Context) -> Artifact:
            seen.append(ctx.folder)
            assert not list(ctx.folder.iterdir())
            return super().apply(source, ctx)

    run_pass(Looks(), source, store, ctx)
    assert seen[0] != store.root
    assert not seen[0].exists()


def test_the_key_changes_with_whatever_changes_the_result(source, store, ctx):
    other = run_pass(Rename(to="third"), source, store, ctx)
    keys = [
        step_key(Rename(), source, ctx),
        step_key(Rename(to="third"), source, ctx),
        step_key(Rename(), other, ctx),
        step_key(Rename(), source, replace(ctx, seed=1)),
        step_key(Calibrated(), source, replace(ctx, samples=samples())),
        step_key(Calibrated(), source, replace(ctx, samples=samples(1.0))),
    ]
    assert len(set(keys)) == len(keys)


def test_samples_do_not_matter_to_a_pass_that_does_not_use_them(source, ctx):
    assert step_key(Rename(), source, ctx) == step_key(Rename(), source, replace(ctx, samples=samples()))


def test_a_pass_that_needs_samples_says_so_without_them(source, store, ctx):
    with pytest.raises(Unsupported, match="--data"):
        run_pass(Calibrated(), source, store, ctx)
    assert run_pass(Calibrated(), source, store, replace(ctx, samples=samples())).traits == {"renamed"}


def test_the_protocol_knows_a_pass_when_it_sees_one():
    assert isinstance(Rename(), Pass)
    assert not isinstance(object(), Pass)
