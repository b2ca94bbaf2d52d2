"""gRPC through ``grpc.aio``: generic handlers that take and give bytes, so that no message is registered anywhere."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from time import perf_counter_ns
from typing import Any, NoReturn

import grpc
import grpc.aio

from hasten.errors import BadInput, HastenError, ModelNotFound, ServeError
from hasten.protocol import grpc as codec
from hasten.protocol.messages import InferResponse
from hasten.serve import grpc_side as side
from hasten.serve.certificate import Certificate
from hasten.serve.codes import LONGEST_TEXT, code_of, retry_after_s
from hasten.serve.grpc_calls import CALLS, OPEN_CALLS, SERVICE, answer
from hasten.serve.keys import Keys
from hasten.serve.limits import Limits
from hasten.serve.listen import Spot
from hasten.serve.service import Service
from hasten.serve.ticket import Marks
from hasten.serve.traces import end_trace

logger = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[bytes, bytes]
Unary = Callable[[bytes, Context], Awaitable[bytes]]

STATUS = {status.value[0]: status for status in grpc.StatusCode}
WATCH_S = 1.0
"""How often a health watch looks."""


class InferenceHandlers(grpc.GenericRpcHandler):
    """Inference, health and reflection of one service."""

    def __init__(self, service: Service, keys: Keys | None) -> None:
        self._service = service
        self._keys = keys
        self._reflection = side.Reflection((codec.FILE, *side.FILES))
        self._ending = asyncio.Event()

    def end_watches(self) -> None:
        """End the calls that would go on for as long as their clients like: the server is ending."""
        self._ending.set()

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Find what answers a call; None: it is not known (UNIMPLEMENTED)."""
        service, _, method = handler_call_details.method.lstrip("/").rpartition("/")
        if service == SERVICE and method == "ModelInfer":
            return grpc.unary_unary_rpc_method_handler(self._guarded(self._infer))
        if service == SERVICE and method in CALLS:
            return grpc.unary_unary_rpc_method_handler(self._small(method))
        if service == side.HEALTH and method == "Check":
            return grpc.unary_unary_rpc_method_handler(self._guarded(self._check, is_open=True))
        if service == side.HEALTH and method == "Watch":
            return grpc.unary_stream_rpc_method_handler(self._watch)
        if service in side.REFLECTIONS and method == "ServerReflectionInfo":
            return grpc.stream_stream_rpc_method_handler(self._reflect(service.rpartition(".")[0]))
        return None

    def _guarded(self, call: Unary, *, is_open: bool = False) -> Unary:
        """Check the key, and turn errors into statuses."""

        async def guarded(data: bytes, context: Context) -> bytes:
            try:
                self._check_key(context, is_open=is_open)
                return await call(data, context)
            except ServeError as error:
                await fail(context, error)
            except HastenError as error:  # a bundle that is damaged, an engine that is not installed
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
            except grpc.aio.AbortError:
                raise
            except Exception:
                logger.exception("a gRPC call failed")
                await context.abort(grpc.StatusCode.INTERNAL, "the server has a defect; its log says more")

        return guarded

    def _check_key(self, context: Context, *, is_open: bool) -> None:
        if self._keys is not None and not is_open:
            self._keys.check(_headers(context))

    def _small(self, method: str) -> Unary:
        async def call(data: bytes, context: Context) -> bytes:
            return await answer(self._service, method, data)

        return self._guarded(call, is_open=method in OPEN_CALLS)

    async def _infer(self, data: bytes, context: Context) -> bytes:
        """Answer ModelInfer. A client that leaves cancels this coroutine, and so its ticket."""
        marks = Marks()
        marks.ns[0] = marks.ns[1] = perf_counter_ns()
        if self._service.traces is not None:
            marks.trace = self._service.traces.start(_headers(context), marks.ns[0])
        try:
            wanted = codec.decode_infer(data, regions=self._service.shared_memory)
        except ServeError as error:
            end_trace(marks, error)
            raise
        marks.ns[2] = perf_counter_ns()
        ready: asyncio.Future[InferResponse | ServeError] = asyncio.get_running_loop().create_future()

        def done(result: InferResponse | ServeError) -> None:
            if not ready.done():
                ready.set_result(result)

        ticket = self._service.submit(wanted, marks, done)
        try:
            result = await ready
        except asyncio.CancelledError:
            ticket.cancel()
            raise
        if isinstance(result, ServeError):
            raise result
        try:
            encoded = codec.encode_infer(result, wanted, regions=self._service.shared_memory)
        except ServeError as error:
            end_trace(marks, error)
            raise
        marks.ns[8] = marks.ns[9] = perf_counter_ns()  # the library sends it later, and tells nobody when
        self._service.sent(result, marks)
        told: tuple[tuple[str, str], ...] = (("server-timing", marks.timing().decode()),)
        if marks.trace is not None:
            told += (("traceparent", marks.trace.header.decode()),)
        context.set_trailing_metadata(told)
        return encoded

    async def _check(self, data: bytes, context: Context) -> bytes:
        status = side.health_of(self._service.ready(), side.parse(side.HealthCheckRequest, data).service)
        if status == side.SERVICE_UNKNOWN:
            raise ModelNotFound("the health of that service is not known here")
        return side.health_reply(status)

    async def _watch(self, data: bytes, context: Context) -> AsyncIterator[bytes]:
        try:
            name = side.parse(side.HealthCheckRequest, data).service
        except ServeError as error:
            await fail(context, error)
        told = None
        while not self._ending.is_set():
            status = side.health_of(self._service.ready(), name)
            if status != told:
                yield side.health_reply(status)
                told = status
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ending.wait(), WATCH_S)
        yield side.health_reply(side.NOT_SERVING)
        await context.abort(grpc.StatusCode.UNAVAILABLE, "the server is ending")

    def _reflect(self, package: str) -> Callable[[AsyncIterator[bytes], Context], AsyncIterator[bytes]]:
        async def reflect(asked: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
            try:
                self._check_key(context, is_open=False)
                async for data in asked:
                    yield self._reflection.answer(package, data)
            except ServeError as error:
                await fail(context, error)

        return reflect


def _headers(context: Context) -> dict[bytes, bytes]:
    pairs = context.invocation_metadata() or ()
    return {name.encode(): value.encode() if isinstance(value, str) else value for name, value in pairs}


async def fail(context: Context, error: ServeError) -> NoReturn:
    """End a call with the status of an error, its reason, and when to come again."""
    again_s = retry_after_s(error)
    trailing: tuple[tuple[str, str], ...] = (("reason", error.reason),)
    if again_s is not None:
        trailing += (("retry-after", str(again_s)),)
    await context.abort(STATUS[code_of(error).grpc], str(error)[:LONGEST_TEXT], trailing)


class GrpcListener:
    """``grpc.aio`` on a port."""

    def __init__(
        self,
        service: Service,
        limits: Limits,
        *,
        spot: Spot,
        keys: Keys | None,
        tls: Certificate | None,
    ) -> None:
        """Make one, closed."""
        self._handlers = InferenceHandlers(service, keys)
        self._limits = limits
        self._spot = spot
        self._tls = tls
        self._server: grpc.aio.Server | None = None
        self._url = ""

    @property
    def url(self) -> str:
        """Its address."""
        return self._url

    async def open(self) -> None:
        """Bind and accept. Raises BadInput where the port is taken."""
        limits = self._limits
        server = grpc.aio.server(
            options=(
                ("grpc.max_receive_message_length", limits.body_bytes),
                ("grpc.max_send_message_length", -1),
                ("grpc.max_metadata_size", limits.header_bytes),
                ("grpc.max_concurrent_streams", limits.requests),
                ("grpc.so_reuseport", int(self._spot.reuse_port)),
                ("grpc.keepalive_time_ms", 60_000),
                ("grpc.keepalive_timeout_ms", 20_000),
                ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
                ("grpc.http2.max_ping_strikes", 2),
            ),
            maximum_concurrent_rpcs=limits.requests,
        )
        server.add_generic_rpc_handlers((self._handlers,))
        host, port = self._spot.host, self._spot.port
        shown = f"[{host}]" if ":" in host else host
        try:
            bound = self._bind(server, f"{shown}:{port}")
        except RuntimeError as error:
            raise BadInput(f"cannot listen on {shown}:{port}: {error}; name another --grpc-port") from error
        await server.start()
        self._server = server
        self._url = f"{shown.replace('0.0.0.0', '127.0.0.1')}:{bound}"  # noqa: S104 - shown, not bound

    def _bind(self, server: grpc.aio.Server, place: str) -> int:
        if self._tls is None:
            return server.add_insecure_port(place)
        return server.add_secure_port(place, _credentials(self._tls))

    def drain(self) -> None:
        """Nothing to say: GOAWAY follows when it closes."""

    async def close(self, finish_s: float) -> None:
        """Accept no more, finish, close."""
        if self._server is not None:
            self._handlers.end_watches()
            await self._server.stop(finish_s)
            self._server = None

    def abort(self) -> None:
        """End at once: what is in work is cut when the loop goes."""
        if self._server is not None:
            self._aborting = asyncio.get_running_loop().create_task(self._server.stop(None))
            self._server = None


def _credentials(tls: Certificate) -> grpc.ServerCredentials:
    """Give credentials that follow a certificate: grpcio asks at each handshake whether there is another one."""
    given = [tls.pem]

    def newer() -> grpc.ServerCertificateConfiguration | None:
        if tls.pem is given[0]:
            return None
        given[0] = tls.pem
        return grpc.ssl_server_certificate_configuration([given[0]])

    first = grpc.ssl_server_certificate_configuration([given[0]])
    return grpc.dynamic_ssl_server_credentials(first, newer)  # type: ignore[arg-type] # None says: no other one
