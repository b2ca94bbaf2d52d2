"""``hasten apply``: change a model by hand, pass by pass."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec
from cyclopts import Parameter
from rich.table import Table
from rich.text import Text

from hasten import registry
from hasten.artifact import Artifact, Json
from hasten.cli import units
from hasten.cli.answer import COMMON, Answer, Common, Shown, Verbatim, describe, python_answer
from hasten.cli.models import DATA, DataOptions, find_model, import_lines, name_of
from hasten.cli.progress import telling
from hasten.errors import BadInput, MissingDependency
from hasten.isolation import TRAINING_S, Limits, Progress, report_progress, run_isolated
from hasten.plan import Part, load_part
from hasten.report import format as fmt
from hasten.samples import Samples
from hasten.settings import settings_of
from hasten.store import Store, write_atomically, writing
from hasten.transform import Context, run_pass


def apply(
    *words: str,
    out: Annotated[Path | None, Parameter(name=["--out", "-o"])] = None,
    list_passes: Annotated[bool, Parameter(name="--list")] = False,
    data: str | None = None,
    train: str | None = None,
    samples: DataOptions = DATA,
    state: Path | None = None,
    seed: Annotated[int, units.read_by(units.seed)] = 0,
    common: Common = COMMON,
) -> Answer:
    r"""Apply passes to a model, in the order they are written, and write the changed model.

    A pass is its name, or its name with settings: quantize-static:observer=mse,percentile=99.9. A value in
    brackets is JSON: exclude=["/stem/conv","/head/gemm"]. ``hasten apply --list`` shows every pass and setting.

    .. code-block:: console

        hasten apply --list
        hasten apply fold model.onnx -o folded.onnx
        hasten apply fold quantize-static:observer=mse model.onnx \
            --data val.parquet -o int8.onnx

    Args:
        words: The passes, then the model.
        out: Where to write the changed model; without it, it is kept in the store alone.
        list_passes: Show the passes with their settings, and do nothing.
        data: Samples to calibrate with.
        train: Samples to train on, for passes that train.
        state: Weights for module.py:factory.
        seed: Of what a pass draws.
        samples: How samples are read.
        common: The options of every verb.
    """
    if list_passes:
        return list_answer()
    if len(words) < 2:
        raise BadInput("name at least one pass and then the model: hasten apply fold model.onnx -o folded.onnx")
    parts, model = [units.part(word) for word in words[:-1]], words[-1]
    for item in parts:
        load_part("pass", item)
    if common.show_python:
        return python_answer(*_python(parts, model, data, train, samples, state, seed, out, common))
    store = Store(common.home)
    source = find_model(model, store, state=state)
    given = {name: samples.read(path, source) for name, path in (("data", data), ("train", train)) if path}
    with telling(f"{name_of(source)}: {' > '.join(part.name for part in parts)}") as progress:
        made = apply_isolated(parts, source, store, **given, seed=seed, progress=progress)
    if out is not None:
        write_model_file(made, out)
    lines = [f"{made.digest[:16]}  {fmt.size(source.size_bytes)} -> {fmt.size(made.size_bytes)}"]
    lines += [f"  {step.name}  {fmt.seconds(step.seconds)}" for step in made.lineage[len(source.lineage) :]]
    if made.digest == source.digest:
        lines.append("  nothing changed: the passes found nothing to do")
    lines.append(f"  {out or made.entry}")
    return Answer(
        document=describe(made) | {"source": source.digest, "out": str(out) if out else None},
        shown=(Verbatim("\n".join(lines)),),
    )


def apply_isolated(
    parts: Sequence[Part],
    source: Artifact,
    store: Store,
    *,
    data: Samples | None = None,
    train: Samples | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Artifact:
    """Apply passes in a child process. Raises as ``run_pass`` and ``run_isolated`` do."""
    with store.scratch() as folder:
        folders = {name: folder / name for name, rows in (("samples", data), ("training", train)) if rows is not None}
        for name, rows in (("samples", data), ("training", train)):
            if rows is not None:
                rows.save(folders[name])
        digest = run_isolated(
            "hasten.cli.apply:apply_in_child",
            parts=msgspec.to_builtins(list(parts)),
            source=source.digest,
            store=str(store.root),
            folders={name: str(path) for name, path in folders.items()},
            seed=seed,
            progress=progress,
            limits=Limits(seconds=TRAINING_S) if train is not None else None,
        )
    return store.get(str(digest))


def apply_in_child(*, parts: Json, source: str, store: str, folders: dict[str, str], seed: int) -> str:
    """Do the work of ``apply_isolated``; gives the digest of what was made."""
    home = Store(Path(store))
    artifact = home.get(source)
    rows = {name: Samples.load(Path(folder)) for name, folder in folders.items()}
    ctx = Context(
        folder=home.root,
        samples=rows.get("samples"),
        training=rows.get("training"),
        teacher=artifact,
        seed=seed,
        progress=report_progress,
    )
    for part in msgspec.convert(parts, list[Part]):
        artifact = run_pass(load_part("pass", part), artifact, home, ctx)
    return artifact.digest


def write_model_file(artifact: Artifact, out: Path) -> None:
    """Copy a model out of the store; weights in files of their own come along beside it.

    Raises:
        BadInput: a file beside it is there already. StoreError: it cannot be written.
    """
    others = [name for name in artifact.files if name != artifact.entry_name]
    if taken := [name for name in others if (out.parent / name).exists()]:
        raise BadInput(f"{out.parent / taken[0]} is there already, and the model's weights need that name")
    for name in others:
        with writing(out.parent / name):
            (out.parent / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(artifact.folder / name, out.parent / name)
    write_atomically(out, artifact.entry.read_bytes())


def list_answer() -> Answer:
    """Show every pass with its settings and what they mean."""
    document: dict[str, Json] = {}
    shown: list[Shown] = []
    for name, entry in sorted(registry.entries("pass").items()):
        try:
            cls = registry.load("pass", name)
        except MissingDependency as error:
            document[name] = {"missing": list(entry.missing), "fix": error.command}
            shown.append(Text(f"{name}  is not installed here; run: {error.command}\n", style="dim"))
            continue
        doc = (cls.__doc__ or "").strip().partition("\n\n")[0].replace("\n    ", " ")
        known = settings_of(cls)
        document[name] = {
            "doc": doc,
            "settings": [
                {
                    "name": setting.name,
                    "type": setting.type_name,
                    "default": msgspec.to_builtins(setting.default),
                    "doc": setting.doc,
                    "choices": list(setting.choices),
                }
                for setting in known
            ],
        }
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        for setting in known:
            default = str(msgspec.to_builtins(setting.default))
            told = Text(f"  {setting.name}={default}")
            table.add_row(told, Text(setting.type_name, style="dim"), Text(setting.doc))
        shown += [Text.assemble((name, "bold"), f"  {doc}"), table, Text()]
    return Answer(document={"passes": document}, shown=shown)


def _python(
    parts: Sequence[Part],
    model: str,
    data: str | None,
    train: str | None,
    samples: DataOptions,
    state: Path | None,
    seed: int,
    out: Path | None,
    common: Common,
) -> list[str]:
    told = ", ".join(f"hasten.Part({part.name!r}, {part.settings!r})" for part in parts)
    lines = [*import_lines(model, common.home, state), "from hasten.cli.apply import apply_isolated, write_model_file"]
    given = ""
    for name, path in (("data", data), ("train", train)):
        if path is not None:
            more = "".join(f", {line}" for line in samples.python())
            lines.append(f"{name} = hasten.read_samples({path!r}, model.signature{more}).samples")
            given += f", {name}={name}"
    lines.append(f"made = apply_isolated([{told}], model, store{given}, seed={seed})")
    if out is not None:
        lines.append(f"write_model_file(made, Path({str(out)!r}))")
    return [*lines, "print(made.digest)"]
