"""The unary calls of ``inference.GRPCInferenceService`` but ModelInfer: bytes in, bytes out, over any transport."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection
from typing import Any

from google.protobuf import json_format
from google.protobuf.message import Message

from hasten.errors import BadRequest
from hasten.protocol import grpc as codec
from hasten.serve.grpc_side import INFERENCE, parse
from hasten.serve.service import Service
from hasten.serve.shared_memory import OFF

SERVICE = INFERENCE

Answer = Callable[[Service, Any], "Message | Awaitable[Message]"]


def _new(kind: str, /, **fields: Any) -> Message:
    return codec.message(kind)(**fields)


def _version(asked: Any) -> str | None:
    return asked.version or None


def _parameters(asked: Any, known: Collection[str]) -> dict[str, str]:
    """Read the parameters of a repository call as text; those that mean nothing here are refused, not dropped.

    Raises:
        BadRequest: there is another than the ``known`` ones.
    """
    others = sorted(set(asked.parameters) - set(known))
    if others:
        raise BadRequest(f"this call takes the parameters {', '.join(known)}, and got {', '.join(others)[:200]!r}")
    return {name: value.string_param for name, value in asked.parameters.items()}


def _server_metadata(service: Service, asked: Any) -> Message:
    known = service.metadata()
    return _new("ServerMetadataResponse", name=known.name, version=known.version, extensions=known.extensions)


def _model_metadata(service: Service, asked: Any) -> Message:
    known = service.model_metadata(asked.name, _version(asked))
    inputs, outputs = (
        [{"name": spec.name, "datatype": spec.datatype, "shape": spec.shape} for spec in specs]
        for specs in (known.inputs, known.outputs)
    )
    of_model = {"name": known.name, "versions": known.versions, "platform": known.platform}
    return _new("ModelMetadataResponse", **of_model, inputs=inputs, outputs=outputs)


def _config(service: Service, asked: Any) -> Message:
    made = _new("ModelConfigResponse")
    known = {"config": service.config(asked.name, _version(asked))}
    return json_format.ParseDict(known, made, ignore_unknown_fields=True)


def _statistics(service: Service, asked: Any) -> Message:
    made = _new("ModelStatisticsResponse")
    known = service.statistics(asked.name or None, _version(asked))
    return json_format.ParseDict(known, made, ignore_unknown_fields=True)


def _index(service: Service, asked: Any) -> Message:
    return _new("RepositoryIndexResponse", models=service.index(ready=asked.ready))


async def _load(service: Service, asked: Any) -> Message:
    given = _parameters(asked, ("version",))
    await service.load(asked.model_name, given.get("version"))
    return _new("RepositoryModelLoadResponse")


async def _unload(service: Service, asked: Any) -> Message:
    _parameters(asked, ("unload_dependents",))
    await service.unload(asked.model_name, dependents=asked.parameters["unload_dependents"].bool_param)
    return _new("RepositoryModelUnloadResponse")


def _memory_status(service: Service, asked: Any) -> Message:
    held = service.shared_memory
    found = [] if held is None else held.status(asked.name or None)
    return _new("SystemSharedMemoryStatusResponse", regions={region.name: region.json() for region in found})


def _memory_register(service: Service, asked: Any) -> Message:
    if service.shared_memory is None:
        raise BadRequest(OFF)
    service.shared_memory.register(asked.name, asked.key, offset=asked.offset, size_bytes=asked.byte_size)
    return _new("SystemSharedMemoryRegisterResponse")


def _memory_unregister(service: Service, asked: Any) -> Message:
    if service.shared_memory is not None:
        service.shared_memory.unregister(asked.name or None)
    return _new("SystemSharedMemoryUnregisterResponse")


CALLS: dict[str, Answer] = {
    "ServerLive": lambda service, asked: _new("ServerLiveResponse", live=service.live()),
    "ServerReady": lambda service, asked: _new("ServerReadyResponse", ready=service.ready()),
    "ModelReady": lambda service, asked: _new(
        "ModelReadyResponse", ready=service.model_ready(asked.name, _version(asked))
    ),
    "ServerMetadata": _server_metadata,
    "ModelMetadata": _model_metadata,
    "ModelConfig": _config,
    "ModelStatistics": _statistics,
    "RepositoryIndex": _index,
    "RepositoryModelLoad": _load,
    "RepositoryModelUnload": _unload,
    "SystemSharedMemoryStatus": _memory_status,
    "SystemSharedMemoryRegister": _memory_register,
    "SystemSharedMemoryUnregister": _memory_unregister,
}
"""What answers each call, by its name. Each raises ServeError."""

OPEN_CALLS = ("ServerLive", "ServerReady")
"""Calls that need no key: probes have none."""


async def answer(service: Service, name: str, data: bytes) -> bytes:
    """Answer a call of ``CALLS``.

    Raises:
        ServeError: the message is malformed, or the service refuses it.
    """
    asked = parse(codec.message(f"{name}Request"), data)
    found = CALLS[name](service, asked)
    made = found if isinstance(found, Message) else await found
    done: bytes = made.SerializeToString()
    return done
