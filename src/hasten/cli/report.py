"""``hasten report``: a finished run, in the terminal and as a page."""

from __future__ import annotations

import webbrowser
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from hasten.cli.answer import COMMON, Answer, Common, python_answer
from hasten.cli.optimize import PAGE, answer_of, write_page
from hasten.errors import BadInput
from hasten.search.optimize import LAST, RESULT
from hasten.search.result import Result, read_result
from hasten.search.task import runs_in
from hasten.store import Store


def report(
    run: str | None = None,
    /,
    *,
    html: Path | None = None,
    open_page: Annotated[bool, Parameter(name="--open")] = False,
    common: Common = COMMON,
) -> Answer:
    """Show a finished run: the frontier, the verdict, and the page, which is written anew.

    .. code-block:: console

        hasten report
        hasten report --open
        hasten report 3f2a --html out/report.html

    Args:
        run: The run's id, its first characters, or its folder; by default the last run.
        html: Where to write the page; by default report.html in the run's folder.
        open_page: Open the page in a browser.
        common: The options of every verb.
    """
    folder = find_run(run, common.home)
    page = html or folder / PAGE
    result = moved(read_result(folder / RESULT), folder)
    store = store_of(result, (common.home, folder.resolve().parent.parent))
    if common.show_python:
        return python_answer(*_python(folder, store, page))
    write_page(result, store, page)
    if open_page:
        webbrowser.open(page.resolve().as_uri())
    return answer_of(result, page, code=0)


def store_of(result: Result, homes: Sequence[Path]) -> Store | None:
    """Give the first of the stores at ``homes`` that has what a run chose: a run's folder may be given by itself."""
    built = result.trial(result.chosen).artifact
    stores = [Store(home) for home in homes]
    return next((store for store in stores if built and store.holds(built)), None)


def moved(result: Result, folder: Path) -> Result:
    """Give a result with its paths in the folder it was found in: it may have been called from elsewhere."""
    if not result.deployment.is_relative_to(result.run):
        return result
    return replace(result, run=folder, deployment=folder / result.deployment.relative_to(result.run))


def find_run(run: str | None, home: Path) -> Path:
    """Give a finished run's folder.

    Raises:
        BadInput: there is none, several begin so, or it is not finished.
    """
    if run is None:
        last = home / LAST
        if not last.is_file():
            raise BadInput(f"there is no run in {home} yet; start one with hasten optimize, or name another --home")
        folder = home / "runs" / last.read_text().strip()
    else:
        folder = _named(run, home)
    if not (folder / RESULT).is_file():
        raise BadInput(f"the run {folder.name} is not finished; the same hasten optimize command goes on with it")
    return folder


def _named(run: str, home: Path) -> Path:
    path = Path(run)
    if path.is_file():
        path = path.parent
    if path.is_dir():
        return path
    known = runs_in(home)
    found = [folder for folder in known if folder.name.startswith(run)]
    exact = [folder for folder in found if folder.name == run]
    if len(exact or found) != 1:
        told = ", ".join(folder.name for folder in known) or "none"
        raise BadInput(f"{len(found)} runs in {home} begin with {run!r}; there are: {told}")
    return (exact or found)[0]


def _python(folder: Path, store: Store | None, page: Path) -> list[str]:
    get = "" if store is None else f"hasten.Store(Path({str(store.root)!r})).get(result.trial(result.chosen).artifact)"
    return [
        "from pathlib import Path",
        "import hasten",
        "from hasten.report.html import write_html",
        "",
        f"result = hasten.read_result(Path({str(folder / RESULT)!r}))",
        f"chosen = {get or None}",
        f"print(result.verdict.word, write_html(result, Path({str(page)!r}), chosen=chosen))",
    ]
