"""Ports: sockets that are bound once everything behind them works, TLS, and the listeners of an app."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from hasten.errors import BadInput
from hasten.serve.access import AccessLog
from hasten.serve.http1 import Http1Server
from hasten.serve.limits import Limits
from hasten.serve.ticker import Ticker

BACKLOG = 4096
"""Connections that wait to be accepted, at most; the kernel takes the less of this and net.core.somaxconn. Beyond it,
Linux drops the end of a handshake, and may reset a connection that its client believes in."""

KEEPALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 20, "TCP_KEEPCNT": 3}
"""When the kernel asks a silent client whether it is there: after so many seconds, again every so many, and so often.
Who has vanished and waits for an answer, or watches the health, would else be kept for ever."""

FRESH_S = 1.0
"""How long a server that ends waits for the first request of a connection that was just made."""


@dataclass(frozen=True)
class Spot:
    """Where to listen: an address, or a socket that listens already and outlives this server."""

    host: str
    port: int
    """0: any free one."""
    reuse_port: bool = False
    """Other servers may listen there too."""
    fd: int | None = None
    """The file descriptor of an inherited socket; the address is then its own."""


class Listener(Protocol):
    """A transport with a port of its own. All methods run on the event loop."""

    @property
    def url(self) -> str:
        """Its address, as a client writes it. Known once it is open."""

    async def open(self) -> None:
        """Bind and accept. Raises BadInput where the port is taken."""

    def drain(self) -> None:
        """Still accept, but let connections end with their answers where the protocol can say so."""

    async def close(self, finish_s: float) -> None:
        """Accept no more, finish what is in work for at most ``finish_s``, and close."""

    def abort(self) -> None:
        """End at once."""


def bind(spot: Spot) -> socket.socket:
    """Give a TCP socket that listens: bound here, or a second hold on the inherited one.

    Raises:
        BadInput: the port is taken or not allowed, the host is none of this machine's, or what was inherited is no TCP
            socket that listens.
    """
    if spot.fd is not None:
        return _inherited(spot.fd)
    host, port = spot.host, spot.port
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
            0
        ]
        bound = socket.socket(family, kind)
    except OSError as error:
        raise BadInput(f"{host!r} is no address of this machine: {error.strerror or error}") from error
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if spot.reuse_port:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        bound.bind(address)
        _keep_alive(bound)
        bound.listen(BACKLOG)
        bound.setblocking(False)
    except OSError as error:
        bound.close()
        raise BadInput(f"cannot listen on {host}:{port}: {error.strerror or error}; name another --port") from error
    return bound


def _keep_alive(bound: socket.socket) -> None:
    """Notice who has vanished: what is accepted takes these options over."""
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):  # not every system has it
            bound.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _inherited(fd: int) -> socket.socket:
    copy = None
    try:
        copy = os.dup(fd)
        held = socket.socket(fileno=copy)
    except OSError as error:
        if copy is not None:
            os.close(copy)
        raise BadInput(f"file descriptor {fd} is no socket: {error.strerror}; whoever starts this opens it") from error
    listens = held.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    if held.family not in (socket.AF_INET, socket.AF_INET6) or held.type != socket.SOCK_STREAM or not listens:
        held.close()
        raise BadInput(f"file descriptor {fd} is no TCP socket that listens; whoever starts this makes it listen")
    _keep_alive(held)
    held.setblocking(False)
    return held


async def take_waiting(
    port: socket.socket, take: Callable[[], asyncio.BaseProtocol], tls: ssl.SSLContext | None
) -> None:
    """Take the connections that the kernel has made and nobody has taken yet, then close the port.

    Closing alone would reset them, and what their clients have sent already with them.
    """
    loop = asyncio.get_running_loop()
    found: list[socket.socket] = []
    with port:
        while len(found) < BACKLOG:
            try:
                client, _ = port.accept()
            except ConnectionAbortedError:
                continue
            except OSError:  # nobody waits any more, or there is no file left for another
                break
            client.setblocking(False)
            found.append(client)
    taken = [
        loop.connect_accepted_socket(take, client, ssl=tls, ssl_handshake_timeout=FRESH_S if tls else None)
        for client in found
    ]
    for outcome in await asyncio.gather(*taken, return_exceptions=True):
        if isinstance(outcome, BaseException) and not isinstance(outcome, OSError):  # a client that left: its own loss
            raise outcome


async def listen(
    protocol: Callable[[], asyncio.BaseProtocol], bound: socket.socket, limits: Limits, tls: ssl.SSLContext | None
) -> asyncio.Server:
    """Accept connections at a port. A TLS handshake takes as long as headers may."""
    handshake_s = None if tls is None else limits.header_s
    return await asyncio.get_running_loop().create_server(
        protocol, sock=bound, ssl=tls, ssl_handshake_timeout=handshake_s, backlog=BACKLOG
    )


def url_of(scheme: str, bound: socket.socket) -> str:
    """Give the address of a bound socket as a client on this machine writes it."""
    host, port = bound.getsockname()[:2]
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)  # noqa: S104
    return f"{scheme}://{shown}:{port}"


class HttpListener:
    """The fast HTTP transport on a port."""

    def __init__(
        self,
        server: Http1Server,
        spot: Spot,
        *,
        tls: ssl.SSLContext | None,
        access: AccessLog | None = None,
    ) -> None:
        self._server = server
        self._spot = spot
        self._tls = tls
        self._access = access
        self._listening: asyncio.Server | None = None
        self._port: socket.socket | None = None
        """A second hold on the port: it outlives the loop's, so that closing loses nobody who waits at it."""
        self._ticker: Ticker | None = None
        self._url = ""

    @property
    def url(self) -> str:
        """Its address."""
        return self._url

    async def open(self) -> None:
        """Bind and accept."""
        bound = bind(self._spot)
        self._url = url_of("https" if self._tls else "http", bound)
        self._port = bound.dup()
        self._server.tick()  # models were loaded since it was made: what time is it?
        self._listening = await listen(self._server.protocol, bound, self._server.limits, self._tls)
        self._ticker = Ticker(self._server.tick, *([] if self._access is None else [self._access.flush]))

    def drain(self) -> None:
        """Answers close their connections from now on."""
        self._server.draining = True

    async def close(self, finish_s: float) -> None:
        """Accept no more; connections close as their answers go out, the rest are cut after ``finish_s``."""
        self._server.draining = True
        if self._listening is not None and self._port is not None:
            self._listening.close()
            if self._spot.fd is None:  # else whoever waits at the port is for those who hold it still
                await take_waiting(self._port, self._server.protocol, self._tls)
        loop = asyncio.get_running_loop()
        now_s = loop.time()
        fresh_s, end_s = now_s + FRESH_S, now_s + finish_s
        while self._server.connections and loop.time() < end_s:
            self._server.close_idle(fresh=loop.time() >= fresh_s)
            await asyncio.sleep(0.01)  # connections end by themselves; this only looks
        self.abort()

    def abort(self) -> None:
        """Cut every connection and free the port."""
        if self._listening is not None:
            self._listening.close()
        if self._port is not None:
            self._port.close()
        self._server.abort()
        if self._ticker is not None:
            self._ticker.stop()
        if self._access is not None:
            self._access.flush()
