"""``hasten doctor``: what works here, and the fix for what does not."""

from __future__ import annotations

import importlib
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import msgspec
from rich.table import Table
from rich.text import Text

from hasten import registry
from hasten.cli.answer import COMMON, Answer, Common, python_answer
from hasten.errors import HastenError, MissingDependency
from hasten.host import this_host, versions
from hasten.isolation import Limits
from hasten.measure.worker import open_isolated
from hasten.plan import Inputs, Part, Plan, run_plan_isolated
from hasten.report import format as fmt
from hasten.search.task import runs_in
from hasten.serve.compiled import is_compiled
from hasten.store import Store
from hasten.testing.models import mlp, random_samples, stored

KINDS: tuple[registry.Kind, ...] = ("engine", "frontend", "pass")
LIMITS = Limits(seconds=120.0)
FEWEST_DISK_BYTES = 2_000_000_000
"""A search of a middling model leaves about so much behind."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at. ``fix`` is there where it does not work and something can be done."""

    kind: str
    name: str
    works: bool
    says: str
    fix: str | None = None


def doctor(*, common: Common = COMMON) -> Answer:
    """Show what works here: every engine, frontend and pass, the machine, the disk; and the fix for what does not.

    Each engine really builds, opens and runs a small model, in a process of its own. The exit code is 1 where an
    engine is installed but does not run.

    .. code-block:: console

        hasten doctor
        hasten doctor --json
    """
    if common.show_python:
        return python_answer(
            "from pathlib import Path",
            "from hasten.cli.doctor import examine",
            "",
            f"for finding in examine(Path({str(common.home)!r})):",
            "    print(finding)",
        )
    findings = examine(common.home)
    document = {
        "host": msgspec.to_builtins(this_host()),
        "versions": versions(),
        "findings": msgspec.to_builtins(findings),
    }
    broken = any(not finding.works and finding.kind == "engine" and not finding.fix for finding in findings)
    return Answer(document=document, shown=(findings_table(findings),), code=1 if broken else 0)


def examine(home: Path) -> list[Finding]:
    """Look at everything."""
    findings = [_host(), *_threads(), _disk(home), store_finding(home), _server()]
    for kind in KINDS:
        findings += [_plug_in(kind, name) for name in sorted(registry.entries(kind))]
    return findings


def findings_table(findings: list[Finding]) -> Table:
    """Draw the findings, one a row."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for finding in findings:
        says = Text(finding.says)
        if finding.fix:
            says.append(f"\nrun: {finding.fix}", style="yellow")
        mark = Text("ok", style="green") if finding.works else Text("no", style="yellow" if finding.fix else "red")
        table.add_row(mark, finding.kind, Text(finding.name), says)
    return table


def _plug_in(kind: registry.Kind, name: str) -> Finding:
    try:
        registry.load(kind, name)
        says = run_engine(name) if kind == "engine" else "is here"
    except MissingDependency as error:
        missing = ", ".join(registry.entries(kind)[name].missing) or name
        return Finding(kind=kind, name=name, works=False, says=f"{missing} is not installed", fix=error.command)
    except HastenError as error:
        return Finding(kind=kind, name=name, works=False, says=str(error))
    except ImportError as error:
        return Finding(kind=kind, name=name, works=False, says=f"it cannot be imported: {error}")
    return Finding(kind=kind, name=name, works=True, says=says)


def run_engine(name: str) -> str:
    """Build a small model with an engine, open it in a child, run it, and say how that went.

    Raises:
        HastenError: what went wrong.
    """
    part = Part(name, {"threads": 1})
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "store")
        source = stored(mlp(), store)
        samples = Path(folder) / "samples"
        random_samples(source, n=8).save(samples)
        built = run_plan_isolated(Plan(part), source, Inputs(store=store), limits=LIMITS)
        with open_isolated(part, built, store, samples, batch=1, limits=LIMITS, seed=0) as session:
            session.outputs(0, 8, 8)
            load_ns = session.resources().load_ns
    version = versions().get(name)
    return f"runs{f', version {version}' if version else ''}; a small model opens in {fmt.duration(load_ns)}"


def _host() -> Finding:
    host = this_host()
    quota = "no CPU quota" if host.quota is None else f"CPU quota {host.quota:g}"
    flags = " ".join(host.flags) or "none of the instruction sets that matter"
    says = f"{host.cpu}; {host.cores} cores, {quota}; {fmt.size(host.memory_bytes)} memory; {flags}"
    return Finding(kind="host", name=host.fingerprint, works=True, says=says)


def _threads() -> list[Finding]:
    """A quota under the core count throttles whoever runs one thread a core: worth a line of its own."""
    host = this_host()
    if host.quota is None or host.quota >= host.cores:
        return []
    says = f"{host.cores} cores are visible, but {host.quota:g} may be used; hasten takes {host.usable_cores} threads"
    return [Finding(kind="host", name="quota", works=True, says=says)]


def _server() -> Finding:
    """Say whether the server can be started, and what it is made of; what it needs is an extra."""
    try:
        importlib.import_module("hasten.serve.app")
    except ImportError as error:
        fix = "pip install 'hasten[serve]'"
        return Finding(kind="server", name="serve", works=False, says=f"{error.name or error} is not here", fix=fix)
    says = "machine code" if is_compiled() else "run by the interpreter; compiled it is faster (docs/how-to/compile.md)"
    return Finding(kind="server", name="serve", works=True, says=says)


def _disk(home: Path) -> Finding:
    place = next(path for path in (home.resolve(), *home.resolve().parents) if path.exists())
    free = shutil.disk_usage(place).free
    enough = free >= FEWEST_DISK_BYTES
    says = f"{fmt.size(free)} free at {place}" + ("" if enough else "; a search may need more: free some")
    return Finding(kind="disk", name="space", works=enough, says=says)


def store_finding(home: Path) -> Finding:
    """Say what the store at ``home`` holds."""
    files = [path for path in home.rglob("*") if path.is_file()] if home.exists() else []
    models = sum(1 for path in (home / "objects").glob("*")) if home.exists() else 0
    total = sum(path.stat().st_size for path in files)
    says = f"{home}: {models} models, {len(runs_in(home))} runs, {fmt.size(total)}"
    return Finding(kind="disk", name="store", works=True, says=says)
