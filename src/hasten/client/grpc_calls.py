"""The calls over gRPC: serialized messages out and in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from google.protobuf.message import DecodeError

from hasten.artifact import Json
from hasten.client.calls import Call, Reply, one_model, result_of, seconds_of
from hasten.client.values import InferResult, ModelState
from hasten.errors import BadRequest, NoAnswer
from hasten.protocol import grpc as codec
from hasten.protocol.codes import Said, error_of_grpc
from hasten.protocol.messages import InferRequest, ModelMetadata, TensorMetadata

T = TypeVar("T")
OK, UNAVAILABLE = 0, 14


@dataclass(frozen=True, kw_only=True)
class GrpcCalls:
    """The calls of one server. Each reads OK as its value, and any other status as the error that it stands for."""

    url: str
    """For messages."""

    def infer(self, request: InferRequest) -> Call[InferResult]:
        """Ask for an inference."""
        return Call(target="ModelInfer", read=self._result, body=(codec.encode_infer_request(request),))

    def ready(self, model: str | None, version: str | None) -> Call[bool]:
        """Ask whether a model, or the whole server, is ready."""
        if model is None:
            return self._call("ServerReady", lambda said: bool(said.ready))
        return self._call("ModelReady", lambda said: bool(said.ready), name=model, version=version or "")

    def metadata(self, model: str, version: str | None) -> Call[ModelMetadata]:
        """Ask what a model takes and gives."""
        return self._call("ModelMetadata", _metadata, name=model, version=version or "")

    def statistics(self, model: str, version: str | None) -> Call[dict[str, Json]]:
        """Ask what a model has done."""
        return self._call(
            "ModelStatistics", lambda said: one_model(plain(said), self.url), name=model, version=version or ""
        )

    def index(self) -> Call[tuple[ModelState, ...]]:
        """Ask which models there are."""
        return self._call("RepositoryIndex", _index)

    def load(self, model: str) -> Call[None]:
        """Ask to load a model's newest version."""
        return self._call("RepositoryModelLoad", _nothing, model_name=model)

    def unload(self, model: str) -> Call[None]:
        """Ask to take a model out of service."""
        return self._call("RepositoryModelUnload", _nothing, model_name=model)

    def _call(self, call: str, decode: Callable[[Any], T], /, **fields: Any) -> Call[T]:
        def read(reply: Reply) -> T:
            self._check(reply)
            try:
                return decode(codec.message(f"{call}Response").FromString(bytes(reply.body)))
            except DecodeError as error:
                raise NoAnswer(f"{self.url} answered {call} with what cannot be read: {error}") from error

        body: bytes = codec.message(f"{call}Request")(**fields).SerializeToString()
        return Call(target=call, read=read, body=(body,))

    def _check(self, reply: Reply) -> None:
        """Raise what a status other than OK stands for; the body is then the server's text."""
        if reply.status == OK:
            return
        text, reason = bytes(reply.body).decode(errors="replace"), reply.headers.get("reason")
        if reply.status == UNAVAILABLE and reason is None:
            text = f"{self.url} gives no answer: {text}"
        said = Said(text=text, reason=reason, retry_after_s=seconds_of(reply.headers.get("retry-after")))
        raise error_of_grpc(reply.status, said)

    def _result(self, reply: Reply) -> InferResult:
        self._check(reply)
        try:
            response = codec.decode_infer_response(bytes(reply.body))
        except BadRequest as error:
            raise NoAnswer(f"{self.url} answered what cannot be read: {error}") from error
        return result_of(response, reply.headers.get("server-timing"))


def plain(message: Any) -> Any:
    """Give a message as JSON would have it, every field named and numbers as numbers."""
    found: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if field.message_type is None:
            found[field.name] = list(value) if field.is_repeated else value
        else:
            found[field.name] = [plain(item) for item in value] if field.is_repeated else plain(value)
    return found


def _metadata(said: Any) -> ModelMetadata:
    inputs, outputs = (
        tuple(TensorMetadata(name=spec.name, datatype=spec.datatype, shape=tuple(spec.shape)) for spec in specs)
        for specs in (said.inputs, said.outputs)
    )
    return ModelMetadata(
        name=said.name, versions=tuple(said.versions), platform=said.platform, inputs=inputs, outputs=outputs
    )


def _index(said: Any) -> tuple[ModelState, ...]:
    return tuple(
        ModelState(name=item.name, version=item.version, state=item.state, reason=item.reason) for item in said.models
    )


def _nothing(said: Any) -> None:
    """The status alone is the answer."""
