"""The server as a process: load and warm, then listen, serve, and end without losing a request.

SIGTERM or SIGINT: readiness turns 503 at once, requests are still taken for ``drain_s``, then the ports close, what
is in work is finished, and the process ends with 0. A second signal ends it at once. SIGHUP: API keys, certificate,
access log and repository are read again, once the models are loaded.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from io import FileIO
from pathlib import Path
from time import time
from typing import Literal

import uvloop

from hasten.errors import BadInput, InvalidSetting, MissingDependency, ModelNotReady, StoreError
from hasten.host import allow_files
from hasten.serve.access import AccessLog
from hasten.serve.certificate import Certificate
from hasten.serve.http1 import Http1Server
from hasten.serve.keys import Keys, read_keys
from hasten.serve.limits import Limits
from hasten.serve.listen import HttpListener, Listener, Spot
from hasten.serve.manager import READY, STOPPING, reloading, tell_manager
from hasten.serve.renewal import Renewal
from hasten.serve.repository import open_repository
from hasten.serve.rest import Rest
from hasten.serve.scheduling import own_threads
from hasten.serve.service import Service
from hasten.serve.shared_memory import SharedMemory
from hasten.serve.traces import Traces
from hasten.serve.worker import SWITCH_INTERVAL_S

logger = logging.getLogger(__name__)

GC_THRESHOLD = (20_000, 20, 50)
"""Of the cyclic collector: what a request makes is freed by counting, and each pass costs as much as a few requests."""

STANDARD_INPUT, STANDARD_OUTPUT = 0, 1
"""Its file descriptor: ``sys.stdout`` may stand for another while a verb runs."""

Transport = Literal["fast", "library"]


@dataclass(frozen=True, kw_only=True)
class Listening:
    """How to serve: where to listen, by which transport, and within which bounds."""

    host: str = "127.0.0.1"
    """Loopback unless told: who opens a server to others says so."""
    port: int = 8000
    """Of HTTP. 0: any free one."""
    grpc_port: int | None = 8001
    """Of gRPC. 0: any free one; None: no gRPC."""
    transport: Transport = "fast"
    """HTTP and gRPC straight on asyncio, or through uvicorn and grpcio."""
    limits: Limits = field(default_factory=Limits)
    drain_s: float = 5.0
    """How long requests are still taken after the first signal."""
    finish_s: float = 30.0
    """How long what is in work may take after that."""
    api_keys: Path | None = None
    """A file of keys, one a line. None: nobody needs one."""
    tls_cert: Path | None = None
    tls_key: Path | None = None
    watch_s: float | None = None
    """How often to look whether the repository has changed. None: only when it is told to."""
    reuse_port: bool = False
    """Let another server listen on the same port."""
    fd: int | None = None
    """An inherited TCP socket that listens, for HTTP, as systemd's socket activation passes them: others may hold it
    too, and it outlives this server, so that a restart closes no port. ``host`` and ``port`` then say nothing."""
    grpc_fd: int | None = None
    """The same for gRPC."""
    code: Path | None = None
    """A folder whose Python files the steps of deployments may run. None: they run none."""
    access_log: Path | None = None
    """Where to append a line of JSON for each request; ``-`` is standard output."""
    shared_memory: bool = False
    """Let clients of this machine hand tensors over in shared memory that they name."""
    otel: str | None = None
    """Where a collector takes OpenTelemetry spans, as http://HOST:4318. None: nowhere, but for ``OTEL_VARIABLES``."""

    def __post_init__(self) -> None:
        """Check the ports: of a larger number the system takes the last 16 bits. Raises InvalidSetting."""
        for name, port in (("port", self.port), ("grpc-port", self.grpc_port)):
            if port is not None and not 0 <= port <= LAST_PORT:
                raise InvalidSetting(f"--{name} is {port}, and must be 0 to {LAST_PORT}; 0 takes any free one")
        if self.port == self.grpc_port != 0 and (self.fd, self.grpc_fd) == (None, None):
            raise InvalidSetting(f"--port and --grpc-port are both {self.port}; each takes one of its own: change one")


@dataclass(frozen=True, kw_only=True)
class Open:
    """A server that answers: its addresses, and its service."""

    http: str
    grpc: str | None
    service: Service


OTEL_VARIABLES = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
"""Where OpenTelemetry's own variables name a collector, spans go there."""

LAST_PORT = 65_535

MOST_RENEWALS = 2
"""One goes on, and one waits."""

FILES_APART = 512
"""File descriptors that connections leave for models, logs, pipes, and those who are told that they are too many."""

Announce = Callable[[Open], None]


def serve(path: Path, listening: Listening, announce: Announce) -> bool:
    """Serve a deployment or a repository until a signal says otherwise. ``announce`` is called once the ports answer.

    Returns:
        True where every request was finished; False after a second signal, or where the time was over.

    Raises:
        StoreError: what ``path`` names cannot be read. ModelNotReady: no model could be loaded, and why.
        BadInput: a port is taken; a key or certificate file cannot be used.
    """
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    return uvloop.run(_serve(path, listening, announce))


def within_files(limits: Limits, ports: int) -> Limits:
    """Give the limits of so many ports with the files that this process may open, of which it asks for enough.

    Where they end, the system refuses a connection without a word, and a model cannot be loaded: some are kept apart.
    """
    files = allow_files(ports * (limits.connections + limits.surplus) + FILES_APART)
    apart = min(FILES_APART, files // 2)
    if files - apart < limits.connections:
        logger.warning(
            "this process may open %d files, so at most about %d connections are taken at once, not %d; raise the "
            "limit (ulimit -n, systemd's LimitNOFILE), or set --max-connections",
            files,
            files - apart,
            limits.connections,
        )
    return replace(limits, descriptors=files - apart, surplus=min(limits.surplus, apart // 4))


async def _serve(path: Path, listening: Listening, announce: Announce) -> bool:
    keys, certificate = _keys(listening), _certificate(listening)
    service = _service(path, listening, own_process=True)
    with contextlib.ExitStack() as stack:
        stop, now = _signals(stack)
        ports = 1 if listening.grpc_port is None else 2
        listening = replace(listening, limits=within_files(listening.limits, ports))
        access = _access_log(listening, stack)
        listeners = make_listeners(service, listening, keys=keys, certificate=certificate, access=access)
        known = (listening.api_keys, keys) if listening.api_keys and keys else None
        renewal = Renewal(keys=known, certificate=certificate, access=access)
        ready = asyncio.Event()
        _on_hangup(stack, stop, ready, lambda: _renew(service, renewal))
        try:
            if not await _started(service, stop):
                return True
            _settle()
            for listener in listeners:
                await listener.open()
            if not stop.is_set():
                announce(Open(http=listeners[0].url, grpc=listeners[1].url if listeners[1:] else None, service=service))
                tell_manager(READY)
                ready.set()
            watching = None if listening.watch_s is None else asyncio.create_task(service.follow(listening.watch_s))
            await stop.wait()
            tell_manager(STOPPING)
            if watching is not None:
                watching.cancel()
            return await _finish(service, listeners, listening, now)
        finally:
            for listener in listeners:
                listener.abort()
            await service.stop(0.0)


def make_listeners(
    service: Service,
    listening: Listening,
    *,
    keys: Keys | None,
    certificate: Certificate | None,
    access: AccessLog | None,
) -> tuple[Listener, ...]:
    """Make the transports of a service, closed: HTTP first, then gRPC where it is asked for.

    Those that are not asked for are not imported: a server that is restarted shall be there again soon.

    Raises:
        BadInput: the certificate or its key cannot be used. InvalidSetting: an inherited socket for a library.
    """
    tls = None if certificate is None else certificate.context(speaks="http/1.1")
    rest = Rest(service, body_bytes=listening.limits.body_bytes, keys=keys)
    http: Listener
    spot = Spot(listening.host, listening.port, listening.reuse_port, listening.fd)
    if listening.transport == "library":
        if (listening.fd, listening.grpc_fd) != (None, None):
            raise InvalidSetting("an inherited socket takes the transport 'fast': grpcio and uvicorn close theirs")
        from hasten.serve.asgi import AsgiListener

        http = AsgiListener(rest, listening.limits, spot=spot, tls=tls, access=access)
    else:
        clock_s = asyncio.get_running_loop().time
        log = None if access is None else access.log
        server = Http1Server(
            rest.route, limits=listening.limits, clock_s=clock_s, log=log, cork=service.cork, turns=service.turns
        )
        http = HttpListener(server, spot, tls=tls, access=access)
    if listening.grpc_port is None:
        return (http,)
    spot = Spot(listening.host, listening.grpc_port, listening.reuse_port, listening.grpc_fd)
    if listening.transport == "fast":
        from hasten.serve.grpc_fast import FastGrpcListener

        tls = None if certificate is None else certificate.context(speaks="h2")
        return http, FastGrpcListener(service, listening.limits, spot=spot, keys=keys, tls=tls, access=access)
    from hasten.serve.grpc_library import GrpcListener

    return http, GrpcListener(service, listening.limits, spot=spot, keys=keys, tls=certificate)


def _settle() -> None:
    """Take what lives as long as the server out of the collector's way; requests leave it next to nothing."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLD)


def _service(path: Path, listening: Listening, *, own_process: bool) -> Service:
    """Make the service.

    In a process of its own, what a version leaves is collected as soon as it has gone: requests make so little garbage
    that a hundred swaps would pass before the collector came by itself.
    """
    memory = SharedMemory(largest_bytes=listening.limits.body_bytes) if listening.shared_memory else None
    return Service(
        open_repository(path),
        code=_code(listening),
        shared_memory=memory,
        traces=_traces(listening),
        gone=gc.collect if own_process else lambda: None,
        scheduler=own_threads() if own_process else None,
    )


def _traces(listening: Listening) -> Traces | None:
    """Make who traces requests, where the setting or the environment asks. Raises MissingDependency, BadInput."""
    if listening.otel is None and not any(os.environ.get(name) for name in OTEL_VARIABLES):
        return None
    try:
        otel = importlib.import_module("hasten.serve.otel")
    except ImportError as error:
        raise MissingDependency(f"what traces need ({error.name or error})", "pip install 'hasten[otel]'") from error
    made: Traces = otel.open_traces(listening.otel)
    return made


async def _start(service: Service) -> None:
    """Load every model; go on where some failed, since the index tells which, but not where all did."""
    await service.start()
    states = service.index()
    if not any(state["state"] == "READY" for state in states):
        reasons = "; ".join(f"{state['name']}: {state['reason']}" for state in states)
        raise ModelNotReady(f"no model could be loaded: {reasons or 'the repository is empty'}")


async def _started(service: Service, stop: asyncio.Event) -> bool:
    """Load every model; False where the server was told to end meanwhile: nothing was bound, nothing is lost."""
    starting = asyncio.create_task(_start(service))
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if stop.is_set():
        service.drain()
        with contextlib.suppress(ModelNotReady):
            await starting
        return False
    await starting
    return True


async def _finish(service: Service, listeners: Sequence[Listener], listening: Listening, now: asyncio.Event) -> bool:
    """Drain, close, finish. A second signal cuts it short."""

    async def orderly() -> bool:
        service.drain()
        for listener in listeners:
            listener.drain()
        await asyncio.sleep(listening.drain_s)
        await asyncio.gather(*(listener.close(listening.finish_s) for listener in listeners))
        return await service.stop(listening.finish_s)

    work = asyncio.create_task(orderly())
    hurry = asyncio.create_task(now.wait())
    await asyncio.wait({work, hurry}, return_when=asyncio.FIRST_COMPLETED)
    hurry.cancel()
    if work.done():
        return work.result()
    work.cancel()
    return False


def _code(listening: Listening) -> Path | None:
    if listening.code is not None and not listening.code.is_dir():
        raise BadInput(f"there is no folder {listening.code} of code to allow")
    return listening.code


def _signals(stack: contextlib.ExitStack) -> tuple[asyncio.Event, asyncio.Event]:
    """Give two events: the first signal sets the first, the second signal the second."""
    loop = asyncio.get_running_loop()
    stop, now = asyncio.Event(), asyncio.Event()

    def arrived() -> None:
        (now if stop.is_set() else stop).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, arrived)
        stack.callback(loop.remove_signal_handler, number)
    return stop, now


def _on_hangup(
    stack: contextlib.ExitStack, stop: asyncio.Event, ready: asyncio.Event, renew: Callable[[], Awaitable[None]]
) -> None:
    """Let SIGHUP read again what may have changed, one time after the other. Under nohup it is nothing.

    Where the server's terminal has gone, it is a reason to end: nobody would know of the server any more.
    """
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        return
    loop, going, one = asyncio.get_running_loop(), set[asyncio.Future[None]](), asyncio.Lock()
    terminal = os.isatty(STANDARD_INPUT)

    async def again() -> None:
        async with one:
            await ready.wait()
            if not stop.is_set():
                await renew()

    def arrived() -> None:
        if terminal and not os.isatty(STANDARD_INPUT):
            logger.warning("the terminal has gone: the server ends")
            stop.set()
        elif len(going) < MOST_RENEWALS:  # one that waits reads what all the later ones would
            task = asyncio.ensure_future(again())
            going.add(task)  # the loop itself holds a task only weakly
            task.add_done_callback(going.discard)

    loop.add_signal_handler(signal.SIGHUP, arrived)
    stack.callback(loop.remove_signal_handler, signal.SIGHUP)


async def _renew(service: Service, renewal: Renewal) -> None:
    """Read keys, certificate and log anew, and look at the repository again."""
    tell_manager(*reloading())
    try:
        taken = renewal.renew()
        try:
            await service.refresh(anew=True)
        except StoreError as error:
            logger.error("the repository stays as it is loaded: %s", error)
        else:
            taken.append("repository")
        logger.warning("read again: %s", ", ".join(taken) or "nothing")
    finally:
        tell_manager(READY)


def _keys(listening: Listening) -> Keys | None:
    return None if listening.api_keys is None else read_keys(listening.api_keys)


def _certificate(listening: Listening) -> Certificate | None:
    if listening.tls_cert is None and listening.tls_key is None:
        return None
    if listening.tls_cert is None or listening.tls_key is None:
        raise InvalidSetting("TLS takes both --tls-cert and --tls-key")
    return Certificate(listening.tls_cert, listening.tls_key)


def _access_log(listening: Listening, stack: contextlib.ExitStack) -> AccessLog | None:
    if listening.access_log is None:
        return None
    if str(listening.access_log) == "-":
        return AccessLog(FileIO(STANDARD_OUTPUT, "ab", closefd=False), time_s=time)
    log = AccessLog.at(listening.access_log, time_s=time)
    stack.callback(log.close)
    return log


@contextlib.asynccontextmanager
async def open_app(path: Path, listening: Listening) -> AsyncIterator[Open]:
    """Serve within the running event loop, without signal handlers: for tests, notebooks and other frameworks."""
    service = _service(path, listening, own_process=False)
    keys, certificate = _keys(listening), _certificate(listening)
    listeners = make_listeners(service, listening, keys=keys, certificate=certificate, access=None)
    try:
        await _start(service)
        for listener in listeners:
            await listener.open()
        yield Open(http=listeners[0].url, grpc=listeners[1].url if listeners[1:] else None, service=service)
        await asyncio.gather(*(listener.close(listening.finish_s) for listener in listeners))
    finally:
        for listener in listeners:
            listener.abort()
        await service.stop(0.0)
