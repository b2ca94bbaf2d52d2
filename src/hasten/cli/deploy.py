"""``hasten deploy``: a deployment of a model as it is, for ``hasten serve``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import msgspec
from cyclopts import Parameter
from rich.text import Text

from hasten.cli import units
from hasten.cli.answer import COMMON, Answer, Common, Shown, Verbatim, python_answer
from hasten.cli.models import DATA, DataOptions, find_model, import_lines, name_of, stand_in_samples
from hasten.cli.progress import telling
from hasten.deployment import Serving
from hasten.errors import BadInput
from hasten.plan import Part, Plan
from hasten.search.as_is import Deployed
from hasten.search.as_is import deploy as deploy_as_is
from hasten.serve.repository import NAME
from hasten.settings import build
from hasten.steps.bundle_files import check_replaceable
from hasten.store import Store

ROWS = 16
"""Random samples that it is checked on where none are given."""


def read_serving(text: str) -> Serving:
    """Read how it is to be served. Raises ValueError, InvalidSetting or UnknownName."""
    return build(Serving, units.settings(text), name="serving")


def deploy(
    model: str,
    /,
    *,
    output: Annotated[Path, Parameter(name=("--output", "-o"))],
    engine: str = "onnxruntime",
    data: str | None = None,
    name: str | None = None,
    serving: Annotated[Serving | None, units.read_by(read_serving, metavar="KEY=VALUE,...")] = None,
    samples: DataOptions = DATA,
    state: Path | None = None,
    seed: Annotated[int, units.read_by(units.seed)] = 0,
    common: Common = COMMON,
) -> Answer:
    r"""Make a deployment of a model as it is, with one engine: nothing is searched, and no speed is claimed.

    It is built here, its answers are compared with what the untouched model says, and some are kept with it, so
    that a server can check it before it is ready. ``hasten optimize`` finds a faster form and proves it.

    .. code-block:: console

        hasten deploy model.onnx -o models/net
        hasten deploy net.py:make --state net.safetensors --data images/ \
            -o models/net --serving instances=2,objective_ms=20
        hasten deploy model.onnx -o models/net \
            --engine onnxruntime:provider=cuda,graphs=true

    Args:
        model: An ONNX file, an exported program (.pt2), module.py:factory, or a digest in the store.
        output: Folder for the bundle, as models/NAME or models/NAME/VERSION; a bundle that is there is replaced.
        engine: An engine, with settings after a colon.
        data: Samples to check it on; without them, random ones that fit the inputs.
        name: What clients call it where it is served alone; by default the folder's, as in a folder of models.
        serving: How to serve it, as instances=2,batch_sizes=[1,8].
        samples: How samples are read.
        state: Weights for module.py:factory.
        seed: Of random samples.
        common: The options of every verb.
    """
    part = units.part(engine)
    Plan(part).load_engine()
    called = _checked(name or _called(output))
    check_replaceable(output)
    if common.show_python:
        return python_answer(*_python(part, model, data, called, serving, samples, state, seed, output, common))
    store = Store(common.home)
    source = find_model(model, store, state=state)
    if data is None:
        rows, preprocess = stand_in_samples(source, rows=ROWS, seed=seed), None
    else:
        rows, preprocess = samples.read_with_preprocess(data, source)
    with telling(f"{name_of(source)} for {part}") as progress:
        made = deploy_as_is(
            source,
            part,
            rows,
            store,
            output,
            name=called,
            preprocess=preprocess,
            serving=serving,
            seed=seed,
            progress=progress,
        )
    return Answer(
        document=msgspec.to_builtins(vars(made) | {"path": str(made.path)}),
        shown=tuple(_shown(made, real=data is not None)),
    )


def _called(folder: Path) -> str:
    """Give the name of a model in folder/NAME or folder/NAME/VERSION."""
    place = folder.absolute()
    return place.parent.name if place.name.isdecimal() else place.name


def _checked(name: str) -> str:
    """Check that clients can name it. Raises BadInput."""
    if NAME.fullmatch(name) is None:
        raise BadInput(
            f"{name!r} cannot be a model's name: it begins with a letter or digit, and has nothing but those, dots, "
            "hyphens and underscores; name another folder, or --name"
        )
    return name


def _shown(made: Deployed, *, real: bool) -> list[Shown]:
    lines = [f"  {name}  off by {error:.1e} of its largest value" for name, error in made.agreement.items()]
    if lines:
        what = "samples" if real else "random samples; --data checks it on real ones"
        lines.insert(0, f"against the untouched model, on {made.golden_rows} {what}:")
    if made.note is not None:
        lines.append(made.note)
    shown: list[Shown] = [Text(line, style="dim") for line in lines]
    return [*shown, Verbatim(f"{made.path}\nhasten serve {shlex.quote(str(made.path))}")]


def _python(
    part: Part,
    model: str,
    data: str | None,
    name: str,
    serving: Serving | None,
    samples: DataOptions,
    state: Path | None,
    seed: int,
    output: Path,
    common: Common,
) -> list[str]:
    lines = [*import_lines(model, common.home, state), "from hasten.deployment import Serving"]
    lines.append("from hasten.search.as_is import deploy")
    if data is None:
        lines += ["from hasten.cli.models import stand_in_samples", ""]
        lines.append(f"samples, preprocess = stand_in_samples(model, rows={ROWS}, seed={seed}), None")
    else:
        more = "".join(f", {line}" for line in samples.python())
        lines += ["", f"read = hasten.read_samples({data!r}, model.signature{more})"]
        lines.append("samples, preprocess = read.samples, read.preprocess")
    given = {key: value for key, value in vars(serving or Serving()).items() if value != getattr(Serving(), key)}
    return [
        *lines,
        "made = deploy(",
        f"    model, hasten.Part({part.name!r}, {part.settings!r}), samples, store, Path({str(output)!r}),",
        f"    name={name!r}, preprocess=preprocess, seed={seed},",
        f"    serving=Serving({', '.join(f'{key}={value!r}' for key, value in given.items())}),",
        ")",
        "print(made.path, made.agreement)",
    ]
