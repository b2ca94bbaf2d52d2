"""Writes docs/reference.md from the code: passes, engines, steps, serving, metrics, errors, verbs.

    python docs/make_reference.py

``tests/test_reference.py`` fails where the page is not what this writes.
"""

from __future__ import annotations

import inspect
import itertools
import re
from pathlib import Path

from hasten import errors, registry
from hasten.cli.app import VERBS
from hasten.composition import Cascade, Ensemble
from hasten.deployment import Serving
from hasten.metrics import METRICS
from hasten.samples.preprocess import Preprocess
from hasten.settings import settings_of

PAGE = Path(__file__).with_name("reference.md")

BOUNDED = re.compile(r"Annotated\[(\w+), msgspec\.Meta\([^)]*\)\]")
"""A type with its bounds, within another one: the bounds are left out, as ``type_name`` does at the outside."""


def reference() -> str:
    """Write the page."""
    parts = [
        "# Reference",
        "Written from the code by `python docs/make_reference.py`. Verbs have their own `--help`.",
        "## Verbs",
        *[f"* `hasten {name}`: {text}" for name, text in VERBS.items()],
        "* Exit codes: 0 done; 1 an error, in one line; 2 usage; 3 done, but the goal was not met; "
        "4 done, but what was measured does not decide; 130 stopped.",
    ]
    for kind, title in (("pass", "Passes"), ("engine", "Engines"), ("step", "Steps")):
        parts.append(f"## {title}")
        for name in registry.BUILT_IN[kind]:
            cls = registry.load(kind, name)
            parts += [f"### {name}", first_line(cls), *table(cls)]
    parts += [
        "## Serving",
        "`[serving]` of a `deployment.toml`, and `hasten deploy --serving KEY=VALUE,...` "
        "([what to choose](how-to/serve.md#what-to-choose)).",
        *table(Serving),
    ]
    parts += ["## Deployments of others"]
    for made in (Ensemble, Cascade):
        parts += [f"### {made.__name__.lower()}", first_line(made), *table(made)]
    parts += ["## Preprocessing", first_line(Preprocess), *table(Preprocess), "## Metrics"]
    parts += ["| metric | | compared with | better |\n|---|---|---|---|"]
    for metric in METRICS.values():
        better = "higher" if metric.higher_is_better else "lower"
        parts.append(f"| `{metric.name}` | {metric.doc} | {metric.needs} | {better} |")
    parts += ["## Errors", "| error | |\n|---|---|"]
    for name, cls in vars(errors).items():
        if inspect.isclass(cls) and issubclass(cls, errors.HastenError):
            parts.append(f"| `{name}` | {first_line(cls)} |")
    return joined(parts)


def table(cls: type) -> list[str]:
    """Write a class's settings as a table."""
    rows = ["| setting | type | default | |\n|---|---|---|---|"]
    for setting in settings_of(cls):
        type_name = BOUNDED.sub(r"\1", setting.type_name).replace("|", "\\|")
        default = "needed" if setting.required else f"`{setting.default!r}`"
        rows.append(f"| `{setting.name}` | `{type_name}` | {default} | {setting.doc} |")
    return rows


def first_line(cls: type) -> str:
    """Give the first line of a docstring."""
    return (inspect.getdoc(cls) or "").partition("\n")[0]


def joined(parts: list[str]) -> str:
    """Join with blank lines, but keep rows of tables and lists together."""
    text = parts[0]
    for before, part in itertools.pairwise(parts):
        together = before[0] in "|*" and part[0] == before[0]
        text += ("\n" if together else "\n\n") + part
    return text + "\n"


if __name__ == "__main__":
    PAGE.write_text(reference())
