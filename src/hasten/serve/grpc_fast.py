"""gRPC over hasten's own HTTP/2: inference in one call stack, the small calls as tasks, health and reflection."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Coroutine
from functools import lru_cache, partial
from time import perf_counter_ns
from typing import Any, Final

import msgspec

from hasten.errors import BadRequest, HastenError, ModelNotFound, Overloaded, ServeError, ServerFault
from hasten.protocol import grpc as codec
from hasten.protocol.grpc_templates import RequestTemplates, ResponseTemplates
from hasten.protocol.http2_frames import literal
from hasten.protocol.messages import InferRequest, InferResponse
from hasten.serve import grpc_side as side
from hasten.serve.access import AccessLog
from hasten.serve.answering import Answering
from hasten.serve.codes import DEFECT, code_of, retry_after_s
from hasten.serve.grpc_calls import CALLS, OPEN_CALLS, SERVICE, answer
from hasten.serve.http2 import Http2Server
from hasten.serve.http2_messages import INTERNAL, INVALID_ARGUMENT, UNAVAILABLE, UNIMPLEMENTED
from hasten.serve.http2_stream import Call, trailers_of
from hasten.serve.keys import Keys
from hasten.serve.limits import Limits
from hasten.serve.listen import Spot, bind, listen, take_waiting, url_of
from hasten.serve.service import Service
from hasten.serve.ticker import Ticker
from hasten.serve.ticket import Marks
from hasten.serve.traces import end_trace

logger = logging.getLogger(__name__)

INFER: Final = f"/{SERVICE}/ModelInfer".encode()
SMALL: Final = {f"/{SERVICE}/{name}".encode(): name for name in CALLS}
CHECK, WATCH = (f"/{side.HEALTH}/{name}".encode() for name in ("Check", "Watch"))
REFLECT = {f"/{name}/ServerReflectionInfo".encode(): name.rpartition(".")[0] for name in side.REFLECTIONS}
OPEN_PATHS = {CHECK, WATCH, *(path for path, name in SMALL.items() if name in OPEN_CALLS)}
UNITS_US = {"H": 3.6e9, "M": 6e7, "S": 1e6, "m": 1e3, "u": 1.0, "n": 1e-3}
WATCH_S: Final = 1.0


class Calls:
    """The calls of one service: what an ``Http2Server`` tells of each."""

    def __init__(self, service: Service, keys: Keys | None) -> None:
        self._service = service
        self._keys = keys
        self._reflection = side.Reflection((codec.FILE, *side.FILES))
        self._tasks: set[asyncio.Task[None]] = set()
        self._watched: set[Call] = set()
        self._requests = RequestTemplates(service.shared_memory)
        self._answers = ResponseTemplates(service.shared_memory)

    def opened(self, call: Call) -> None:
        """Look at a call's headers: may it be made, and does it stream?"""
        path = call.path
        if path == INFER and self._keys is None:
            return
        if path in REFLECT:
            call.on_message = partial(self._reflect, call, REFLECT[path])
        elif path != INFER and path not in SMALL and path not in (CHECK, WATCH):
            call.fail(UNIMPLEMENTED, f"there is no call {path[:200].decode('latin-1')}")
            return
        if self._keys is not None and path not in OPEN_PATHS:
            try:
                self._keys.check(call.headers)
            except ServeError as error:
                fail(call, error)

    def route(self, call: Call) -> None:
        """Answer a unary call, now or later."""
        try:
            if call.path == INFER:
                self._infer(call)
            elif call.path == CHECK:
                status = side.health_of(
                    self._service.ready(), side.parse(side.HealthCheckRequest, call.message).service
                )
                if status == side.SERVICE_UNKNOWN:
                    raise ModelNotFound("the health of that service is not known here")
                call.respond(side.health_reply(status))
            elif call.path == WATCH:
                name = side.parse(side.HealthCheckRequest, call.message).service
                self._watched.add(call)
                self._later(call, self._watch(call, name))
            else:
                self._later(call, self._small(call))
        except ServeError as error:
            fail(call, error)

    def _infer(self, call: Call) -> None:
        marks = Marks()
        marks.ns[0], marks.ns[1] = call.began_ns, perf_counter_ns()
        if self._service.traces is not None:
            marks.trace = self._service.traces.start(call.headers, call.began_ns)
        try:
            wanted = self._requests.decode(call.message)
            timeout = call.headers.get(b"grpc-timeout")
            if timeout is not None:
                wanted = _with_timeout(wanted, timeout)
        except ServeError as error:
            end_trace(marks, error)
            raise
        marks.ns[2] = perf_counter_ns()
        ticket = self._service.submit(wanted, marks, _Answer(self, call, self._service, wanted, marks))
        if call.trailers is None:  # a refusal is answered before submit returns
            call.leave = ticket.cancel

    def answer(self, to: _Answer, result: InferResponse | ServeError) -> None:
        """Take what became of a request: the service's ``done``."""
        call, marks = to.call, to.marks
        if call.trailers is not None:
            return  # a defect was told, after it was taken in
        if isinstance(result, ServeError):
            fail(call, result)
            return
        try:
            encoded = self._answers.encode(result, to.wanted)
        except ServeError as error:  # a tensor that cannot be told as it was asked for
            end_trace(marks, error)
            fail(call, error)
            return
        except Exception:  # nobody else would tell the client
            logger.exception("an answer could not be written")
            end_trace(marks, ServerFault(DEFECT))
            call.fail(INTERNAL, DEFECT)
            return
        marks.ns[8] = perf_counter_ns()
        call.leave = None
        to.response = result
        call.waiter = to
        told = literal(b"server-timing", marks.timing())
        if marks.trace is not None:
            told += literal(b"traceparent", marks.trace.header)
        call.respond(encoded, told)

    async def _small(self, call: Call) -> None:
        try:
            call.respond(await answer(self._service, SMALL[call.path], call.message))
        except ServeError as error:
            fail(call, error)
        except HastenError as error:  # a bundle that is damaged, an engine that is not installed
            call.fail(INVALID_ARGUMENT, str(error))
        except Exception:
            logger.exception("a call failed")
            call.fail(INTERNAL, DEFECT)

    async def _watch(self, call: Call, name: str) -> None:
        told = None
        while call.connection is not None and call.trailers is None:
            status = side.health_of(self._service.ready(), name)
            if status != told:
                call.send(side.health_reply(status))
                told = status
            await asyncio.sleep(WATCH_S)

    def end_watches(self) -> None:
        """End the calls that would go on for as long as their clients like: the server is ending."""
        for call in list(self._watched):
            call.send(side.health_reply(side.NOT_SERVING))
            call.fail(UNAVAILABLE, "the server is ending")

    def _reflect(self, call: Call, package: str, message: bytes) -> None:
        try:
            call.send(self._reflection.answer(package, message))
        except ServeError as error:
            fail(call, error)

    def _later(self, call: Call, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        if call.path == WATCH:
            task.add_done_callback(lambda _: self._watched.discard(call))
            call.leave = task.cancel  # type: ignore[assignment]  # whether it was still running is not asked

    def cancel(self) -> None:
        """End what still runs."""
        for task in self._tasks:
            task.cancel()


class _Answer(Answering):
    """The answer of one request."""

    def __init__(self, calls: Calls, call: Call, service: Service, wanted: InferRequest, marks: Marks) -> None:
        super().__init__(service, wanted, marks)
        self._calls = calls
        self.call = call

    def answer(self, outcome: InferResponse | ServeError) -> None:
        """See ``Answering.answer``."""
        self._calls.answer(self, outcome)


def fail(call: Call, error: ServeError) -> None:
    """End a call with the status of an error, its reason, and when to come again."""
    status = code_of(error).grpc
    told = _told_again if isinstance(error, Overloaded) else _told
    call.end(status, told(status, str(error), error.reason, retry_after_s(error)))


def _told(status: int, text: str, reason: str, again_s: int | None) -> bytes:
    """Give the trailers of an error."""
    extra = {"reason": reason} | ({} if again_s is None else {"retry-after": str(again_s)})
    return trailers_of(status, text, extra)


_told_again = lru_cache(maxsize=8)(_told)
"""For those who are told the same one after the other (``gate.Shut``)."""


def _with_timeout(request: InferRequest, text: bytes) -> InferRequest:
    """Take the client's deadline over, where it is the earlier one. Raises BadRequest."""
    digits, unit = text[:-1], text[-1:].decode("latin-1")
    if not digits.isdigit() or len(digits) > 8 or unit not in UNITS_US:
        raise BadRequest(f"grpc-timeout is {text[:20].decode('latin-1')!r}, and must be digits and one of HMSmun")
    timeout_us = max(1, int(int(digits) * UNITS_US[unit]))
    if request.timeout_us and request.timeout_us <= timeout_us:
        return request
    return msgspec.structs.replace(request, timeout_us=timeout_us)


class FastGrpcListener:
    """The fast gRPC transport on a port."""

    def __init__(
        self,
        service: Service,
        limits: Limits,
        *,
        spot: Spot,
        keys: Keys | None,
        tls: ssl.SSLContext | None,
        access: AccessLog | None = None,
    ) -> None:
        """Make one, closed."""
        self._calls = Calls(service, keys)
        self._access = access
        self._cork, self._turns = service.cork, service.turns
        self._limits = limits
        self._spot = spot
        self._tls = tls
        self._server: Http2Server | None = None
        self._listening: asyncio.Server | None = None
        self._port: socket.socket | None = None
        self._ticker: Ticker | None = None
        self._url = ""

    @property
    def url(self) -> str:
        """Its address."""
        return self._url

    async def open(self) -> None:
        """Bind and accept. Raises BadInput where the port is taken."""
        loop = asyncio.get_running_loop()
        calls = self._calls
        self._server = Http2Server(
            opened=calls.opened,
            route=calls.route,
            limits=self._limits,
            clock_s=loop.time,
            cork=self._cork,
            turns=self._turns,
            log=None if self._access is None else self._access.log_call,
        )
        bound = bind(self._spot)
        self._url = url_of("grpc", bound).removeprefix("grpc://")
        self._port = bound.dup()
        self._listening = await listen(self._server.protocol, bound, self._server.limits, self._tls)
        self._ticker = Ticker(self._server.tick, *([] if self._access is None else [self._access.flush]))

    def drain(self) -> None:
        """Nothing to say yet: calls are still taken, and GOAWAY follows when it closes."""

    async def close(self, finish_s: float) -> None:
        """Accept no more; connections close as their calls are answered, the rest are cut after ``finish_s``."""
        if self._server is None or self._listening is None or self._port is None:
            return
        self._listening.close()
        if self._spot.fd is None:  # else whoever waits at the port is for those who hold it still
            await take_waiting(self._port, self._server.protocol, self._tls)
        self._calls.end_watches()
        self._server.drain()
        loop = asyncio.get_running_loop()
        end_s = loop.time() + finish_s
        while self._server.connections and loop.time() < end_s:
            await asyncio.sleep(0.01)  # connections end by themselves; this only looks
        self.abort()

    def abort(self) -> None:
        """Cut every connection and free the port."""
        if self._listening is not None:
            self._listening.close()
        if self._port is not None:
            self._port.close()
        if self._server is not None:
            self._server.abort()
        if self._ticker is not None:
            self._ticker.stop()
        if self._access is not None:
            self._access.flush()
        self._calls.cancel()
