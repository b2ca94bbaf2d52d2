"""The REST side of the Open Inference Protocol: every call of ``openapi.CALLS``, over any transport of requests.

An inference is one call stack down to the service, and one back up from its ``done``: no task, no future.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from functools import lru_cache, partial
from time import perf_counter_ns
from typing import Any, Final, TypeVar

import msgspec

from hasten.errors import BadRequest, Cancelled, DeadlineExceeded, HastenError, Overloaded, ServeError, ServerFault
from hasten.protocol import rest as codec
from hasten.protocol.json_pieces import decode_in_pieces, encode_in_pieces
from hasten.protocol.json_templates import part
from hasten.protocol.messages import InferRequest, InferResponse
from hasten.protocol.rest_templates import Heads, RequestTemplates, ResponseTemplates, wants_binary
from hasten.serve import openapi, prometheus
from hasten.serve.answering import Answering
from hasten.serve.codes import DEFECT, code_of, retry_after_s
from hasten.serve.encodings import LEAST_BYTES, chosen, compress, compress_in_pieces, decompress, decompress_in_pieces
from hasten.serve.http1_request import JSON, Buffer, Request, defective, error_body
from hasten.serve.keys import Keys
from hasten.serve.paths import Target, find_target
from hasten.serve.rest_bodies import Index, Load, Register, Unload
from hasten.serve.service import Service
from hasten.serve.shared_memory import OFF
from hasten.serve.slices import Job, Slices, Steps
from hasten.serve.ticket import TO_COME, Marks
from hasten.serve.traces import end_trace

logger = logging.getLogger(__name__)

T = TypeVar("T")

BINARY: Final = b"application/octet-stream"
COSTLY_BYTES: Final = 4096
"""JSON of this size costs more to read than to ask whether it may come in at all."""

LARGE_BYTES: Final = 256 * 2**10
"""JSON of this size is read in pieces."""

PLAIN: Final = (None, b"", b"identity")
"""Content encodings that are none."""

LARGE_ANSWER_BYTES: Final = 64 * 2**10
"""Tensors of this size are written as JSON, or encoded, in pieces."""

VARIES: Final = b"Vary: Accept-Encoding\r\n"

Written = tuple[list[bytes | memoryview] | bytes, int | None, bytes]
"""An answer's body, the bytes of JSON where tensors follow it, and the header lines that its encoding takes."""

KEPT_TARGETS: Final = 1024
"""Targets whose meaning is remembered; then all are forgotten, so that nobody fills the memory with them."""
KEPT_TEMPLATES: Final = 32
"""Targets of inference whose requests' heads are remembered; likewise."""

OPEN_CALLS: Final = ("live", "ready")
"""Calls that need no key: probes have none."""


class Rest:
    """The calls of one service. ``route`` is what an HTTP server calls with each request."""

    def __init__(self, service: Service, *, body_bytes: int, keys: Keys | None = None) -> None:
        self._service = service
        self._body_bytes = body_bytes
        self._keys = keys
        self._targets: dict[bytes, Target] = {}
        self._templates: dict[bytes, RequestTemplates] = {}
        self._heads = Heads()
        self._answers = ResponseTemplates(service.shared_memory)
        self._tasks: set[asyncio.Task[None]] = set()
        self._slices = Slices()

    def route(self, request: Request) -> None:
        """Answer a request, now or later. Raises nothing for anything a client can send."""
        try:
            templates = self._templates.get(request.target)
            if templates is not None and self._keys is None and request.method == b"POST":
                self._infer(request, templates)
                return
            target = self._targets.get(request.target) or self._find(request.target)
            if self._keys is not None and target.call not in OPEN_CALLS:
                self._keys.check(request.headers)
            verb = openapi.CALLS[target.call].verb.encode()
            if request.method != verb and (request.method, verb) != (b"HEAD", b"GET"):
                text = f"{target.call} is called with {verb.decode()}, not {request.method.decode('latin-1')}"
                request.refuse(405, text, b"Allow: %b\r\n" % (b"GET, HEAD" if verb == b"GET" else verb))
                return
            if target.call == "infer":
                templates = self._templates.get(request.target)
                self._infer(request, templates or self._templates_of(request.target, target))
            else:
                CALLS[target.call](self, request, target)
        except ServeError as error:
            fail(request, error)

    def _find(self, raw: bytes) -> Target:
        target = find_target(raw)
        if len(self._targets) >= KEPT_TARGETS:
            self._targets.clear()
        self._targets[raw] = target
        return target

    def _templates_of(self, raw: bytes, target: Target) -> RequestTemplates:
        """Make the templates of a target. They are kept where its model takes requests, and else serve one of them."""
        name, version, regions = str(target.model), target.version, self._service.shared_memory
        try:
            ready = self._service.model_ready(name, version)
        except ServeError:  # which the request is told once it was read
            ready = False
        if not ready:
            return RequestTemplates(name, version, regions=regions)
        if len(self._templates) >= KEPT_TEMPLATES:
            self._templates.clear()
            self._heads = Heads()
        made = self._templates[raw] = RequestTemplates(name, version, regions=regions, heads=self._heads)
        return made

    # inference

    def _infer(self, request: Request, templates: RequestTemplates) -> None:
        service, headers = self._service, request.headers
        ns = [request.began_ns, perf_counter_ns(), *TO_COME]
        marks = Marks(ns)
        if service.traces is not None:
            marks.trace = service.traces.start(headers, request.began_ns)
        try:
            body, header_bytes = request.body, _header_bytes(headers)
            if b"content-encoding" in headers or (header_bytes is None and len(body) >= LARGE_BYTES):
                steps = self._steps(request, templates, header_bytes)
                self._in_slices(request, marks, steps, partial(self._was_read, request, marks), size=len(body))
                return
            if header_bytes is None and len(body) >= COSTLY_BYTES:
                self._check_room(templates, body)
            elif header_bytes is not None:
                refused = service.shut(templates.model, templates.version)
                if refused is not None and not _says_terms(body, header_bytes):
                    service.turned_away(templates.model, refused)
                    end_trace(marks, refused)
                    fail(request, refused)
                    return
            wanted = templates.decode(body, header_bytes=header_bytes, metadata=service.model_metadata)
        except ServeError as error:
            end_trace(marks, error)
            raise
        self._submit(request, wanted, marks)

    def _submit(self, request: Request, wanted: InferRequest, marks: Marks) -> None:
        marks.ns[2] = perf_counter_ns()
        ticket = self._service.submit(wanted, marks, _Answer(self, request, self._service, wanted, marks))
        if request.reply is None:  # a refusal is answered before submit returns
            request.leave = ticket.cancel

    def _steps(self, request: Request, templates: RequestTemplates, header_bytes: int | None) -> Steps[InferRequest]:
        """Read a request whose body is encoded, or is much JSON."""
        service, body = self._service, request.body
        coding = request.headers.get(b"content-encoding")
        if coding not in PLAIN:
            body = yield from decompress_in_pieces(body, coding, limit_bytes=self._body_bytes)
        if header_bytes is None and len(body) >= COSTLY_BYTES:
            self._check_room(templates, body)
        if header_bytes is not None or len(body) < LARGE_BYTES:
            return templates.decode(body, header_bytes=header_bytes, metadata=service.model_metadata)
        model, version = templates.model, templates.version
        return (
            yield from decode_in_pieces(
                bytes(body),
                model=model,
                version=version,
                metadata=partial(service.model_metadata, model, version),
                regions=service.shared_memory,
            )
        )

    def _was_read(self, request: Request, marks: Marks, wanted: InferRequest) -> None:
        """Go on with a request that was read in steps, unless that took longer than it has."""
        if wanted.timeout_us and perf_counter_ns() - request.began_ns > wanted.timeout_us * 1000:
            late = DeadlineExceeded("its time was over before it was read; give it a longer timeout")
            self._service.turned_away(wanted.model, late)
            self._failed(request, marks, late)
            return
        self._submit(request, wanted, marks)

    def _check_room(self, templates: RequestTemplates, body: Buffer) -> None:
        """Refuse before the JSON is read what would be refused after it: under overload, reading it is what costs.

        A body that says a priority or a time of its own is read. Raises Overloaded.
        """
        self._service.check_room(templates.model, templates.version, unless=partial(_has_terms, body))

    def answer(self, to: _Answer, result: InferResponse | ServeError) -> None:
        """Take what became of a request: the service's ``done``."""
        request, marks = to.request, to.marks
        if request.reply is not None:
            return  # a defect was told, after it was taken in
        if isinstance(result, ServeError):
            fail(request, result)
            return
        n_bytes = 0
        for output in result.outputs:
            n_bytes += output.data.nbytes
        if n_bytes >= LARGE_ANSWER_BYTES and (_encoding(request) is not None or not wants_binary(to.wanted)):
            steps = self._written(to, result)
            self._in_slices(request, marks, steps, partial(self._respond, to, result), size=n_bytes)
            return
        try:
            parts, header_bytes = self._answers.encode(result, to.wanted)
        except Exception as error:  # noqa: BLE001 - a value that JSON cannot hold, or a defect: nobody else tells the client
            self._failed(request, marks, error)
            return
        if b"accept-encoding" in request.headers:
            body, coding = self._encoded(request, parts)
            self._respond(to, result, (body, header_bytes, coding))
        else:
            self._respond(to, result, (parts, header_bytes, b""))

    def _written(self, to: _Answer, result: InferResponse) -> Steps[Written]:
        """Write a large answer."""
        parts, header_bytes = yield from encode_in_pieces(result, to.wanted, regions=self._service.shared_memory)
        encoding = _encoding(to.request)
        if encoding is None:
            return parts, header_bytes, VARIES if b"accept-encoding" in to.request.headers else b""
        body = yield from compress_in_pieces(parts, encoding)
        return body, header_bytes, _encoded_as(encoding)

    def _in_slices(
        self, request: Request, marks: Marks, steps: Steps[T], then: Callable[[T], None], *, size: int
    ) -> None:
        """Do a part of a request's work that may take long; ``then`` goes on with what it made."""

        def done(outcome: T | Exception) -> None:
            request.leave = None
            if request.reply is not None:
                return
            if isinstance(outcome, Exception):
                self._failed(request, marks, outcome)
                return
            try:
                then(outcome)
            except Exception as error:  # noqa: BLE001 - nobody above would tell the client
                self._failed(request, marks, error)

        job = self._slices.do(steps, done, size=size)
        if not job.over:
            request.leave = partial(_left, job, marks)

    def _failed(self, request: Request, marks: Marks, error: Exception) -> None:
        """Tell why a request could not be read, or its answer not be written."""
        if isinstance(error, ServeError):
            end_trace(marks, error)
            fail(request, error)
        else:
            end_trace(marks, ServerFault(DEFECT))
            defective(request, error)

    def _respond(self, to: _Answer, result: InferResponse, written: Written) -> None:
        request, marks, (body, header_bytes, coding) = to.request, to.marks, written
        marks.ns[8] = perf_counter_ns()
        to.response = result
        request.waiter = to
        if marks.trace is not None:
            coding += b"traceparent: %b\r\n" % marks.trace.header
        extra = b"".join([coding, b"Server-Timing: ", marks.timing(), b"\r\n"])
        if header_bytes is None:
            request.respond(200, body, extra=extra)
        else:
            length = b"Inference-Header-Content-Length: %d\r\n" % header_bytes
            request.respond(200, body, kind=BINARY, extra=length + extra)

    # bodies

    def _body(self, request: Request) -> Buffer:
        coding = request.headers.get(b"content-encoding")
        if coding in PLAIN:
            return request.body
        return decompress(request.body, coding, limit_bytes=self._body_bytes)

    def _encoded(
        self, request: Request, parts: list[bytes | memoryview]
    ) -> tuple[list[bytes | memoryview] | bytes, bytes]:
        """Give a body in the encoding that the client asked for, and the header that says so."""
        accepted = request.headers.get(b"accept-encoding")
        if accepted is None:
            return parts, b""
        size = 0
        for each in parts:
            size += len(each)
        coding = chosen(accepted) if size >= LEAST_BYTES else None
        if coding is None:
            return parts, VARIES
        return compress(parts, coding), _encoded_as(coding)

    def _parameters(self, request: Request, known: type[T]) -> T:
        """Read the small JSON body of a repository call; an empty one is {}."""
        body = self._body(request)
        try:
            return msgspec.json.decode(bytes(body) or b"{}", type=known)
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            raise BadRequest(f"the body is not what this call takes: {error}") from error

    # the other calls

    def _json(self, request: Request, value: object, *, status: int = 200) -> None:
        self._send(request, msgspec.json.encode(value), status=status)

    def _send(self, request: Request, body: bytes, *, kind: bytes = JSON, status: int = 200) -> None:
        encoded, coding = self._encoded(request, [body])
        request.respond(status, encoded, kind=kind, extra=coding)

    def _live(self, request: Request, target: Target) -> None:
        live = self._service.live()
        self._json(request, {"live": live}, status=200 if live else 503)

    def _ready(self, request: Request, target: Target) -> None:
        ready, live = self._service.ready(), self._service.live()
        self._json(request, {"ready": ready, "live": live}, status=200 if ready else 503)

    def _server(self, request: Request, target: Target) -> None:
        self._send(request, codec.encode_server_metadata(self._service.metadata()))

    def _model(self, request: Request, target: Target) -> None:
        metadata = self._service.model_metadata(str(target.model), target.version)
        self._send(request, codec.encode_model_metadata(metadata))

    def _model_ready(self, request: Request, target: Target) -> None:
        ready = self._service.model_ready(str(target.model), target.version)
        self._json(request, {"name": target.model, "ready": ready}, status=200 if ready else 503)

    def _config(self, request: Request, target: Target) -> None:
        self._json(request, self._service.config(str(target.model), target.version))

    def _stats(self, request: Request, target: Target) -> None:
        self._json(request, self._service.statistics(target.model, target.version))

    def _index(self, request: Request, target: Target) -> None:
        asked = self._parameters(request, Index)
        self._json(request, self._service.index(asked.ready))

    def _load(self, request: Request, target: Target) -> None:
        asked = self._parameters(request, Load)
        self._later(request, self._service.load(str(target.model), asked.parameters.version))

    def _unload(self, request: Request, target: Target) -> None:
        dependents = self._parameters(request, Unload).parameters.unload_dependents
        self._later(request, self._service.unload(str(target.model), dependents=dependents))

    def _later(self, request: Request, work: Awaitable[None]) -> None:
        """Answer with {} once ``work`` is done. It goes on where the client leaves."""

        async def finish() -> None:
            try:
                await work
            except ServeError as error:
                fail(request, error)
            except HastenError as error:  # a bundle that is damaged, an engine that is not installed
                request.refuse(400, str(error))
            except Exception:
                logger.exception("a call failed")
                request.refuse(500, DEFECT)
            else:
                request.respond(200, b"{}")

        task = asyncio.get_running_loop().create_task(finish())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _memory_status(self, request: Request, target: Target) -> None:
        held = self._service.shared_memory
        self._json(request, [] if held is None else [region.json() for region in held.status(target.region)])

    def _memory_register(self, request: Request, target: Target) -> None:
        if self._service.shared_memory is None:
            raise BadRequest(OFF)
        asked = self._parameters(request, Register)
        name, offset = str(target.region), asked.offset
        self._service.shared_memory.register(name, asked.key, offset=offset, size_bytes=asked.byte_size)
        self._json(request, {})

    def _memory_unregister(self, request: Request, target: Target) -> None:
        if self._service.shared_memory is not None:
            self._service.shared_memory.unregister(target.region)
        self._json(request, {})

    def _metrics(self, request: Request, target: Target) -> None:
        kind = prometheus.CONTENT_TYPE.encode()
        self._send(request, prometheus.exposition(self._service), kind=kind)

    def _openapi(self, request: Request, target: Target) -> None:
        self._json(request, openapi.document(self._service.metadata().version))

    def _docs(self, request: Request, target: Target) -> None:
        self._send(request, openapi.page(self._service.metadata().version), kind=b"text/html; charset=utf-8")


def _left(job: Job[Any], marks: Marks) -> None:
    """The client has left while its request was read, or its answer written."""
    job.leave()
    end_trace(marks, Cancelled("the client has left"))


def _encoding(request: Request) -> bytes | None:
    """Give the encoding to answer in, where the client asked for one that there is."""
    accepted = request.headers.get(b"accept-encoding")
    return None if accepted is None else chosen(accepted)


def _encoded_as(coding: bytes) -> bytes:
    return b"Content-Encoding: %b\r\n%b" % (coding, VARIES)


class _Answer(Answering):
    """The answer of one request."""

    def __init__(self, rest: Rest, request: Request, service: Service, wanted: InferRequest, marks: Marks) -> None:
        super().__init__(service, wanted, marks)
        self._rest = rest
        self.request = request

    def answer(self, outcome: InferResponse | ServeError) -> None:
        """See ``Answering.answer``."""
        self._rest.answer(self, outcome)


Answer = Callable[[Rest, Request, Target], None]

CALLS: dict[str, Answer] = {
    "live": Rest._live,
    "ready": Rest._ready,
    "server": Rest._server,
    "model": Rest._model,
    "model_ready": Rest._model_ready,
    "config": Rest._config,
    "stats": Rest._stats,
    "index": Rest._index,
    "load": Rest._load,
    "unload": Rest._unload,
    "memory_status": Rest._memory_status,
    "memory_register": Rest._memory_register,
    "memory_unregister": Rest._memory_unregister,
    "metrics": Rest._metrics,
    "openapi": Rest._openapi,
    "docs": Rest._docs,
}
"""What answers each call but ``infer``, the hot one."""


def fail(request: Request, error: ServeError) -> None:
    """Answer with an error, and say when to come again where that helps."""
    status, text = code_of(error).http, str(error)
    told = _told_again if isinstance(error, Overloaded) else _told
    body, extra = told(status, text, error.reason, retry_after_s(error))
    request.respond(status, body, extra=extra)


def _told(status: int, text: str, reason: str, again_s: int | None) -> tuple[bytes, bytes]:
    """Give the body of an error's answer, and its headers."""
    extra = b"X-Reason: %b\r\n" % reason.encode()
    if again_s is not None:
        extra = b"Retry-After: %d\r\n%b" % (again_s, extra)
    if status == 401:
        extra += b"WWW-Authenticate: Bearer\r\n"
    return error_body(text), extra


_told_again = lru_cache(maxsize=8)(_told)
"""For those who are told the same one after the other (``gate.Shut``)."""


def _has_terms(body: Buffer) -> bool:
    text = bytes(body)
    parted = part(text)
    return _says_terms(text if parted is None else parted.head)  # elements are most of it, and no words


def _says_terms(head: Buffer, n_bytes: int | None = None) -> bool:
    """Say whether a head, the first ``n_bytes`` of what is given, may say a priority or a time of its own."""
    head = bytes(head[:n_bytes])
    return b'"priority"' in head or b'"timeout"' in head


def _header_bytes(headers: Mapping[bytes, bytes]) -> int | None:
    """Read Inference-Header-Content-Length; None where it is absent."""
    text = headers.get(b"inference-header-content-length")
    if text is None:
        return None
    if not text.isdigit() or len(text) > 12:
        shown = text[:32].decode("latin-1")
        raise BadRequest(f"Inference-Header-Content-Length is {shown!r}, and must be a number of bytes")
    return int(text)
