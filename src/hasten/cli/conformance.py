"""``hasten conformance``: what an Open Inference Protocol server does of what it should, check by check."""

from __future__ import annotations

import importlib
import ssl
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from cyclopts import Group, Parameter
from rich.table import Table
from rich.text import Text

from hasten.artifact import Json
from hasten.cli import units
from hasten.cli.answer import COMMON, GOAL_NOT_MET, Answer, Common, Shown, python_answer
from hasten.client.values import read_address
from hasten.conformance.junit import junit as junit_of
from hasten.conformance.server import GrpcCalls, Server, find_model
from hasten.conformance.suite import CHECKS, Result, counts, failures, run
from hasten.conformance.wire import Http
from hasten.errors import BadInput, InvalidSetting, MissingDependency
from hasten.store import write_atomically

LEVELS = ("required", "recommended", "extension")
TITLES = {"not met": "Not met", "skipped": "Could not be told", "not offered": "Not offered"}


@Parameter(name="*", group=Group("What is checked", sort_key=1))
@dataclass(frozen=True, kw_only=True)
class CheckOptions:
    """Which checks, and how much a server may be asked for."""

    model: str | None = None
    """The model that is called; by default the first one that the server's index has ready."""
    grpc: str | None = None
    """The server's gRPC side, as HOST:PORT, over TLS where the URL is https (or as grpcs://HOST:PORT, grpc://HOST:PORT);
    without it REST alone is checked."""
    only: str | None = None
    """Only checks whose name or group contains this."""
    assume: tuple[str, ...] = ()
    """Check an extension though the server does not list it, as binary_tensor_data."""
    reload: bool = False
    """Let checks unload the model and load it again."""
    strict: bool = False
    """Let what is only recommended count too."""
    timeout: Annotated[float, units.read_by(units.seconds)] = 10.0
    """Time for each request."""
    api_key: str | None = None
    """The key that the server wants."""
    certificate: Path | None = None
    """A file of certificates to trust, in PEM."""


OPTIONS = CheckOptions()


def conformance(
    url: str,
    /,
    *,
    junit: Path | None = None,
    options: CheckOptions = OPTIONS,
    common: Common = COMMON,
) -> Answer:
    r"""Check a server against the Open Inference Protocol, and say where it does otherwise.

    Exit code 3: a required check, or one of an extension that the server claims, is not met.

    .. code-block:: console

        hasten conformance http://127.0.0.1:8000
        hasten conformance http://127.0.0.1:8080 --grpc 127.0.0.1:8081 \
            --model net --junit results.xml

    Args:
        url: http://HOST:PORT or https://HOST:PORT.
        junit: Where to write the results as a JUnit file.
        options: What is checked.
        common: The options of every verb.
    """
    if options.timeout <= 0:
        raise InvalidSetting(f"--timeout is {options.timeout}, and must be more than 0")
    if common.show_python:
        return _python(url, options)
    server = server_of(url, options)
    checks = [one for one in CHECKS if options.only is None or options.only in f"{one.name} {one.group}"]
    if not checks:
        groups = ", ".join(dict.fromkeys(one.group for one in CHECKS))
        raise InvalidSetting(f"--only {options.only!r} is in no check's name and no group; groups are {groups}")
    results = run(server, checks)
    if junit is not None:
        _write_junit(junit, results, strict=options.strict)
    failed = failures(results, strict=options.strict)
    return Answer(
        document=_document(url, server, results),
        shown=_shown(results, failed),
        code=GOAL_NOT_MET if failed else 0,
    )


def server_of(url: str, options: CheckOptions = OPTIONS) -> Server:
    """Make what checks are run on.

    Raises:
        BadInput: the address is none, or no model is named and the server tells none.
        MissingDependency: gRPC is wanted, and grpcio is not installed.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise BadInput(f"{url!r} is no address: {error}") from error
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.path not in ("", "/"):
        raise BadInput(f"{url!r} is no address; write http://HOST:PORT")
    http = Http(
        host=parts.hostname,
        port=port or (443 if parts.scheme == "https" else 80),
        tls=_tls(options.certificate) if parts.scheme == "https" else None,
        headers={} if options.api_key is None else {"Authorization": f"Bearer {options.api_key}"},
        timeout_s=options.timeout,
    )
    return Server(
        http=http,
        model_name=options.model or find_model(http),
        grpc=None if options.grpc is None else _grpc(options.grpc, options, secure=parts.scheme == "https"),
        assumed=options.assume,
        reload=options.reload,
    )


def _tls(certificate: Path | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=certificate)
    except (OSError, ssl.SSLError) as error:
        raise BadInput(f"the certificates of {certificate} cannot be used: {error}") from error


def _grpc(address: str, options: CheckOptions, *, secure: bool) -> GrpcCalls:
    url = address if "://" in address else f"{'grpcs' if secure else 'grpc'}://{address}"
    try:
        place = read_address(url, api_key=options.api_key, certificate=options.certificate)
    except InvalidSetting as error:
        raise BadInput(f"{address!r} is no address of gRPC; write HOST:PORT") from error
    if not place.is_grpc or place.prefix or ":" not in address.rpartition("://")[2]:
        raise BadInput(f"{address!r} is no address of gRPC; write HOST:PORT")
    try:
        wire = importlib.import_module("hasten.conformance.grpc_wire")
    except ImportError as error:
        raise MissingDependency(f"what gRPC needs ({error.name or error})", "pip install 'hasten[serve]'") from error
    made: GrpcCalls = wire.open_grpc(place, timeout_s=options.timeout)
    return made


def _write_junit(path: Path, results: Sequence[Result], *, strict: bool) -> None:
    write_atomically(path, junit_of(results, strict=strict))


def _document(url: str, server: Server, results: Sequence[Result]) -> dict[str, Json]:
    return {
        "url": url,
        "model": server.model_name,
        "counts": counts(results),
        "checks": [
            {
                "name": result.check.name,
                "group": result.check.group,
                "level": result.check.level,
                "source": result.check.source,
                "outcome": result.outcome,
                "says": result.says,
                "seconds": round(result.seconds, 6),
            }
            for result in results
        ],
    }


def _shown(results: Sequence[Result], failed: Sequence[Result]) -> list[Shown]:
    table = Table(box=None, header_style="dim", pad_edge=False)
    for column in ("group", *LEVELS):
        table.add_column(column, justify="left" if column == "group" else "right")
    for group in [*dict.fromkeys(result.check.group for result in results), "all"]:
        own = [result for result in results if group in (result.check.group, "all")]
        table.add_row(group, *(_share([result for result in own if result.check.level == level]) for level in LEVELS))
    shown: list[Shown] = [table]
    for outcome, title in TITLES.items():
        listed = [result for result in results if result.outcome == outcome]
        if listed:
            shown += [Text(f"\n{title}", style="bold"), (_counted if outcome == "not offered" else _listed)(listed)]
    count = f"{_checks(len(failed))} count{'s' if len(failed) == 1 else ''} against this server."
    verdict = count if failed else "Nothing counts against this server."
    return [*shown, Text(f"\n{verdict}", style="bold")]


def _share(results: Sequence[Result]) -> Text:
    """Give how many are met of those that could be told."""
    met = sum(result.outcome == "met" for result in results)
    told = met + sum(result.outcome == "not met" for result in results)
    return Text(f"{met} of {told}" if told else "", style="" if met == told else "red")


def _checks(count: int) -> str:
    return f"{count} check{'' if count == 1 else 's'}"


def _listed(results: Sequence[Result]) -> Table:
    """List checks with what was said of each; neighbours of which the same was said stand together."""
    table = _two_columns()
    for (says, level), same in groupby(results, key=lambda result: (result.says, result.check.level)):
        names = "\n".join(result.check.name for result in same)
        table.add_row(Text(names), Text(f"{says}{' (recommended)' if level == 'recommended' else ''}"))
    return table


def _counted(results: Sequence[Result]) -> Table:
    """Say of how many checks the same was said."""
    table = _two_columns()
    for says, count in Counter(result.says for result in results).items():
        table.add_row(Text(_checks(count)), Text(says))
    return table


def _two_columns() -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(overflow="fold", ratio=2)
    table.add_column(overflow="fold", ratio=3)
    return table


def _python(url: str, options: CheckOptions) -> Answer:
    changed: dict[str, Any] = {
        name: getattr(options, name) for name in ("model", "grpc", "assume", "reload") if getattr(options, name)
    }
    words = ", ".join(f"{name}={value!r}" for name, value in changed.items())
    return python_answer(
        "from hasten.cli.conformance import CheckOptions, server_of",
        "from hasten.conformance.suite import failures, run",
        "",
        f"results = run(server_of({url!r}, CheckOptions({words})))",
        "print(failures(results))",
    )
