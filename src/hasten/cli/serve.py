"""``hasten serve``: a deployment, or a folder of them, for any Open Inference Protocol client."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
from cyclopts import Group, Parameter

from hasten.cli import units
from hasten.cli.answer import COMMON, Answer, Common, python_answer
from hasten.cli.standard_output import write_now
from hasten.errors import InvalidSetting, MissingDependency, ServeError

if TYPE_CHECKING:
    from hasten.serve.app import Open

FIX = "pip install 'hasten[serve]'"
UNFINISHED = 1
NO_GRPC = -1


@Parameter(name="*", group=Group("Where it listens", sort_key=1))
@dataclass(frozen=True, kw_only=True)
class PortOptions:
    """Where to listen, and by what."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets other machines in."""
    port: int = 8000
    """Port of HTTP; 0 takes any free one."""
    grpc_port: int = 8001
    """Port of gRPC; 0 takes any free one, -1 leaves gRPC out."""
    transport: Literal["fast", "library"] = "fast"
    """HTTP and gRPC by hasten's own servers, or by uvicorn and grpcio."""
    reuse_port: bool = False
    """Let another server listen on the same port."""
    fd: int | None = None
    """An inherited socket for HTTP, as 3 with systemd's socket activation: a restart closes no port, and loses no
    connection that waits there."""
    grpc_fd: int | None = None
    """The same for gRPC."""


@Parameter(name="*", group=Group("Who may call, and how much", sort_key=2))
@dataclass(frozen=True, kw_only=True)
class GuardOptions:
    """Limits, keys and TLS."""

    max_body: Annotated[int | None, units.read_by(units.size)] = None
    """The largest body of a request; by default 64MiB."""
    max_requests: int | None = None
    """Requests in work at once; by default 4096."""
    max_connections: int | None = None
    """Connections open at once; by default 16384."""
    api_keys: Path | None = None
    """A file of API keys, one a line; without it nobody needs one."""
    tls_cert: Path | None = None
    """The certificate chain, in PEM."""
    tls_key: Path | None = None
    """Its key, in PEM."""
    allow_code: Path | None = None
    """A folder whose Python files the steps of deployments may run; without it they run no code."""
    shared_memory: bool = False
    """Let clients of this machine hand tensors over in shared memory that they name."""
    otel: str | None = None
    """Where an OpenTelemetry collector takes spans, as http://HOST:4318; by default where OTEL_EXPORTER_OTLP_ENDPOINT
    says, or nowhere."""
    access_log: Path | None = None
    """Where to append a line of JSON for each request; --access-log=- writes to standard output."""


PORTS = PortOptions()
GUARDS = GuardOptions()


def serve(
    what: Path,
    /,
    *,
    drain: Annotated[float, units.read_by(units.seconds_or_none)] = 5.0,
    watch: Annotated[float | None, units.read_by(units.seconds)] = None,
    ports: PortOptions = PORTS,
    guards: GuardOptions = GUARDS,
    common: Common = COMMON,
) -> Answer:
    """Serve a deployment, or a folder of deployments, over HTTP and gRPC.

    Models are loaded and warmed before a port is bound. SIGTERM or Ctrl-C drains and ends; a second one ends at once.
    SIGHUP reads API keys, certificate, access log and folder again.

    .. code-block:: console

        hasten serve best/deployment.toml
        hasten serve models/ --host 0.0.0.0 --port 8080 --grpc-port 9000

    Args:
        what: A deployment.toml, or a folder of models/NAME[/VERSION]/deployment.toml.
        drain: How long requests are still taken after the first signal.
        watch: How often to look for new versions in the folder; without it only when a client says load.
        ports: Where to listen.
        guards: Who may call, and how much.
        common: The options of every verb.
    """
    if common.show_python:
        return python_answer(
            "from pathlib import Path",
            "from hasten.serve.app import Listening, serve",
            "",
            f"listening = Listening(host={ports.host!r}, port={ports.port}, drain_s={drain})",
            f"serve(Path({str(what)!r}), listening, print)",
        )
    app = _app()
    finished = app.serve(
        what, _listening(app, (drain, watch), ports, guards), lambda opened: _announce(opened, guards, common)
    )
    document = {"served": str(what), "finished": finished}
    return Answer(document=document, code=0 if finished else UNFINISHED)


def _app() -> Any:
    """Import the server, which needs the extra."""
    try:
        return importlib.import_module("hasten.serve.app")
    except ImportError as error:
        raise MissingDependency(f"what serving needs ({error.name or error})", FIX) from error


def _listening(app: Any, times_s: tuple[float, float | None], ports: PortOptions, guards: GuardOptions) -> Any:
    bounds = {
        "body_bytes": guards.max_body,
        "requests": guards.max_requests,
        "connections": guards.max_connections,
    }
    for name, bound in bounds.items():
        if bound is not None and bound < 1:
            raise InvalidSetting(f"--max-{name.partition('_')[0]} is {bound}, and must be 1 or more")
    return app.Listening(
        host=ports.host,
        port=ports.port,
        grpc_port=None if ports.grpc_port == NO_GRPC else ports.grpc_port,
        transport=ports.transport,
        reuse_port=ports.reuse_port,
        fd=ports.fd,
        grpc_fd=ports.grpc_fd,
        drain_s=times_s[0],
        watch_s=times_s[1],
        limits=app.Limits(**{name: bound for name, bound in bounds.items() if bound is not None}),
        api_keys=guards.api_keys,
        tls_cert=guards.tls_cert,
        tls_key=guards.tls_key,
        access_log=guards.access_log,
        code=guards.allow_code,
        shared_memory=guards.shared_memory,
        otel=guards.otel,
    )


def _announce(opened: Open, guards: GuardOptions, common: Common) -> None:
    """Say where the server is and how to call it, at once: the process goes on."""
    from hasten.serve.sample_calls import Caller, curl_line, python_line

    models, lines = [], [f"HTTP  {opened.http}", f"gRPC  {opened.grpc or 'off'}"]
    for state in opened.service.index():
        name, version = str(state["name"]), str(state["version"])
        models.append({"name": name, "version": version, "state": state["state"], "reason": state["reason"]})
        lines.append(f"model {name} {version}: {str(state['state']).lower()} {state['reason']}".rstrip())
    ready = next(name["name"] for name in models if name["state"] == "READY")
    try:
        metadata = opened.service.model_metadata(str(ready))
    except ServeError:  # it failed between its warm-up and now; its state above says so
        calls: list[str] = []
    else:
        caller = Caller(
            url=opened.http,
            with_key=guards.api_keys is not None,
            certificate=None if guards.tls_cert is None else str(guards.tls_cert),
            takes_image=opened.service.takes_image(str(ready)),
        )
        calls = [line for line in (curl_line(caller, metadata), python_line(caller, metadata)) if line is not None]
    if common.json:
        document = {"http": opened.http, "grpc": opened.grpc, "models": models, "calls": calls}
        write_now(msgspec.json.encode(document).decode() + "\n")
    else:
        write_now("\n".join([*lines, "", *calls, ""]) + "\n")
