"""The calls over REST, with tensors as bytes or as JSON."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import quote

import msgspec

from hasten.artifact import Json
from hasten.client.calls import Buffer, Call, Reply, one_model, result_of, seconds_of
from hasten.client.values import InferResult, ModelState
from hasten.errors import BadRequest, NoAnswer
from hasten.protocol import rest as codec
from hasten.protocol.codes import Said, error_of_http
from hasten.protocol.messages import InferRequest, ModelMetadata

T = TypeVar("T")
HEADER_BYTES = "inference-header-content-length"
LONGEST_TEXT = 2000


@dataclass(frozen=True, kw_only=True)
class RestCalls:
    """The calls of one server. Each reads 200 as its value, and anything else as the error that it stands for."""

    url: str
    """For messages."""
    prefix: str = ""
    binary: bool = True
    """Tensors travel as bytes behind the JSON; else in it."""

    def infer(self, request: InferRequest) -> Call[InferResult]:
        """Ask for an inference. Raises BadRequest: JSON cannot hold an input."""
        parts, header_bytes = codec.encode_request(request, binary=self.binary)
        if header_bytes is None:
            headers = {"Content-Type": "application/json"}
        else:
            headers = {"Content-Type": "application/octet-stream", HEADER_BYTES: str(header_bytes)}
        target = f"{self._model(request.model, request.version)}/infer"
        return Call(target=target, read=self._result, body=tuple(parts), headers=headers)

    def ready(self, model: str | None, version: str | None) -> Call[bool]:
        """Ask whether a model, or the whole server, is ready."""
        path = f"{self.prefix}/v2/health/ready" if model is None else f"{self._model(model, version)}/ready"
        return Call(target=path, verb="GET", read=self._readiness)

    def metadata(self, model: str, version: str | None) -> Call[ModelMetadata]:
        """Ask what a model takes and gives."""
        return self._get(self._model(model, version), codec.decode_model_metadata)

    def statistics(self, model: str, version: str | None) -> Call[dict[str, Json]]:
        """Ask what a model has done."""
        path = f"{self._model(model, version)}/stats"
        return self._get(path, lambda body: one_model(msgspec.json.decode(body), self.url))

    def index(self) -> Call[tuple[ModelState, ...]]:
        """Ask which models there are."""
        return self._post("index", lambda body: msgspec.json.decode(body, type=tuple[ModelState, ...]))

    def load(self, model: str) -> Call[None]:
        """Ask to load a model's newest version."""
        return self._post(f"models/{quote(model, safe='')}/load", _nothing)

    def unload(self, model: str) -> Call[None]:
        """Ask to take a model out of service."""
        return self._post(f"models/{quote(model, safe='')}/unload", _nothing)

    def _model(self, model: str, version: str | None) -> str:
        of_version = f"/versions/{quote(version, safe='')}" if version else ""
        return f"{self.prefix}/v2/models/{quote(model, safe='')}{of_version}"

    def _get(self, target: str, decode: Callable[[Buffer], T]) -> Call[T]:
        return Call(target=target, verb="GET", read=lambda reply: self._read(reply, decode))

    def _post(self, path: str, decode: Callable[[Buffer], T]) -> Call[T]:
        headers = {"Content-Type": "application/json"}
        return Call(
            target=f"{self.prefix}/v2/repository/{path}",
            body=(b"{}",),
            headers=headers,
            read=lambda reply: self._read(reply, decode),
        )

    def _read(self, reply: Reply, decode: Callable[[Buffer], T]) -> T:
        if reply.status != 200:
            said = _said(reply)
            if said is None:
                raise NoAnswer(
                    f"{self.url} answered with status {reply.status} and no JSON error: {_shown(reply.body)}"
                )
            raise error_of_http(reply.status, said)
        try:
            return decode(reply.body)
        except (BadRequest, msgspec.DecodeError, UnicodeDecodeError) as error:
            raise NoAnswer(f"{self.url} answered what cannot be read: {error}") from error

    def _result(self, reply: Reply) -> InferResult:
        def decode(body: Buffer) -> InferResult:
            text = reply.headers.get(HEADER_BYTES)
            if text is not None and not (text.isdecimal() and len(text) < 13):
                raise BadRequest(f"Inference-Header-Content-Length is {text[:32]!r}")
            response = codec.decode_response(body, header_bytes=None if text is None else int(text))
            return result_of(response, reply.headers.get("server-timing"))

        return self._read(reply, decode)

    def _readiness(self, reply: Reply) -> bool:
        """Read 200 or 503 with a word on readiness; some servers send an empty body, and the status is the word."""
        if reply.status not in (200, 503):
            return self._read(reply, lambda body: False)
        if reply.status == 503 and _said(reply) is None and reply.body:
            return False if _flag(reply.body) is False else self._read(reply, lambda body: False)
        return reply.status == 200 and _flag(reply.body) is not False


def _nothing(body: Buffer) -> None:
    """The status alone is the answer of a load or an unload; servers differ in what else they send."""


def _flag(body: Buffer) -> Any:
    """Give what a body says of readiness; None where it says nothing."""
    try:
        found = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    return found.get("ready") if isinstance(found, dict) else None


def _said(reply: Reply) -> Said | None:
    """Read {"error": text} and what stands beside it; None where the body is not that."""
    try:
        found = msgspec.json.decode(reply.body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    text = found.get("error") if isinstance(found, dict) else None
    if not isinstance(text, str):
        return None
    retry_after_s = seconds_of(reply.headers.get("retry-after"))
    return Said(text=text[:LONGEST_TEXT], reason=reply.headers.get("x-reason"), retry_after_s=retry_after_s)


def _shown(body: Buffer) -> str:
    """Give the beginning of a body on one line."""
    return repr(bytes(memoryview(body)[:80]))
