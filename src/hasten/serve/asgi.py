"""The REST side as an ASGI application, and on a port through uvicorn: ``--transport library``."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from time import perf_counter_ns
from typing import Any

import uvicorn

from hasten.errors import ServeError, TooLarge
from hasten.serve.access import AccessLog
from hasten.serve.http1_request import Request, defective
from hasten.serve.limits import Limits
from hasten.serve.listen import BACKLOG, Spot, bind, url_of
from hasten.serve.rest import Rest, fail
from hasten.serve.ticker import Ticker

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Asgi = Callable[[Message, Receive, Send], Awaitable[None]]


class _Reply:
    """The connection of one ASGI request: tells when its reply is complete."""

    def __init__(self) -> None:
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def replied(self, request: Request) -> None:
        if not self.ready.done():
            self.ready.set_result(None)


def asgi(rest: Rest, limits: Limits, log: Callable[[Request], None] | None = None) -> Asgi:
    """Make an ASGI application of the REST side. It starts and ends nothing: the service is the caller's.

    ``log`` is told of each request that was answered.
    """

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1000})
            return
        reply = _Reply()
        request = _request(scope, reply)
        try:
            body = await _body(request, receive, limits.body_bytes)
        except ServeError as error:
            fail(request, error)
        else:
            if body is None:
                return
            request.body = body
            try:
                rest.route(request)
            except Exception as error:  # noqa: BLE001 - whatever it is, the client is told
                defective(request, error)
        await _until_ready(request, reply, receive)
        if request.reply is not None:
            await _send(request, send)
            if log is not None:
                log(request)

    return app


def _request(scope: Message, reply: _Reply) -> Request:
    headers: dict[bytes, bytes] = {}
    for name, value in scope["headers"]:
        headers[name] = headers[name] + b", " + value if name in headers else value
    target = scope.get("raw_path") or scope["path"].encode()
    request = Request(reply, scope["method"].encode(), target, headers)
    request.began_ns = perf_counter_ns()
    request.peer = scope["client"][0] if scope.get("client") else ""
    return request


async def _body(request: Request, receive: Receive, limit_bytes: int) -> bytes | None:
    """Read a body whole; None: the client left before its end. Raises TooLarge as soon as it is known to be."""
    length = request.headers.get(b"content-length", b"0")
    parts, size = [], 0
    while True:
        if size > limit_bytes or (length.isdigit() and int(length[:20]) > limit_bytes):
            raise TooLarge(f"the body has more than {limit_bytes} bytes, the limit")
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        part = message.get("body", b"")
        parts.append(part)
        size += len(part)
        if not message.get("more_body"):
            return b"".join(parts) if len(parts) > 1 else parts[0]


async def _until_ready(request: Request, reply: _Reply, receive: Receive) -> None:
    """Wait for the reply, or for the client to leave."""
    if reply.ready.done():
        return
    left = asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait({reply.ready, left}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        left.cancel()
        if request.reply is None and request.leave is not None:
            request.leave()
            request.leave = None  # it refers back to the request


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue


async def _send(request: Request, send: Send) -> None:
    head, *parts = request.reply or [b""]
    lines = bytes(head).split(b"\r\n")[1:-2]
    headers = [(name.lower(), value) for name, _, value in (line.partition(b": ") for line in lines)]
    await send({"type": "http.response.start", "status": request.status, "headers": headers})
    for part in parts or [b""]:
        await send({"type": "http.response.body", "body": bytes(part), "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})
    if request.waiter is not None:
        request.waiter.sent()
    request.leave = request.waiter = None


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        kind = (await receive())["type"]
        await send({"type": f"{kind}.complete"})
        if kind == "lifespan.shutdown":
            return


class _Uvicorn(uvicorn.Server):
    """A uvicorn server that leaves the process's signals alone."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The app has handlers of its own."""
        yield


class AsgiListener:
    """uvicorn on a port."""

    def __init__(
        self,
        rest: Rest,
        limits: Limits,
        *,
        spot: Spot,
        tls: ssl.SSLContext | None,
        access: AccessLog | None = None,
    ) -> None:
        """Make one, closed."""
        self._app = asgi(rest, limits, None if access is None else access.log)
        self._access = access
        self._ticker: Ticker | None = None
        self._limits = limits
        self._spot = spot
        self._tls = tls
        self._server: _Uvicorn | None = None
        self._task: asyncio.Task[None] | None = None
        self._url = ""

    @property
    def url(self) -> str:
        """Its address."""
        return self._url

    async def open(self) -> None:
        """Bind and accept."""
        bound = bind(self._spot)
        self._url = url_of("https" if self._tls else "http", bound)
        config = uvicorn.Config(
            self._app,
            log_level="warning",
            access_log=False,
            lifespan="off",
            backlog=BACKLOG,
            limit_concurrency=self._limits.connections,
            timeout_keep_alive=round(self._limits.idle_s),
            h11_max_incomplete_event_size=self._limits.header_bytes,
            server_header=False,
        )
        config.load()
        config.ssl = self._tls
        self._server = _Uvicorn(config)
        self._task = asyncio.get_running_loop().create_task(self._server.serve(sockets=[bound]))
        while not self._server.started and not self._task.done():
            await asyncio.sleep(0.005)  # uvicorn has no event for it
        if self._access is not None:
            self._ticker = Ticker(self._access.flush)

    def drain(self) -> None:
        """Nothing to say: uvicorn closes idle connections when it ends."""

    async def close(self, finish_s: float) -> None:
        """Accept no more, finish, close."""
        if self._server is None or self._task is None:
            return
        self._server.should_exit = True
        await asyncio.wait({self._task}, timeout=finish_s)
        self.abort()

    def abort(self) -> None:
        """End at once."""
        if self._server is not None:
            self._server.should_exit = self._server.force_exit = True
        if self._ticker is not None:
            self._ticker.stop()
        if self._access is not None:
            self._access.flush()
