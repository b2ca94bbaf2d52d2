"""Health and reflection, the two services that stand beside inference: their messages, in a private descriptor pool.

The definitions are those of ``grpc.health.v1`` and ``grpc.reflection.v1`` (grpc-proto), with the fields used here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from google.protobuf import descriptor_pb2
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from hasten.errors import BadRequest

INFERENCE = "inference.GRPCInferenceService"
HEALTH = "grpc.health.v1.Health"
REFLECTIONS = ("grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection")

SERVING, NOT_SERVING, SERVICE_UNKNOWN = 1, 2, 3
NOT_FOUND, UNIMPLEMENTED = 5, 12

_Field = descriptor_pb2.FieldDescriptorProto
STRING, BYTES, INT32, ENUM, MESSAGE = (
    _Field.TYPE_STRING,
    _Field.TYPE_BYTES,
    _Field.TYPE_INT32,
    _Field.TYPE_ENUM,
    _Field.TYPE_MESSAGE,
)


def parse(kind: type[Message], data: bytes) -> Any:
    """Read a message. Raises BadRequest."""
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise BadRequest(f"the message is no {kind.DESCRIPTOR.name}: {error}") from error


def _file(package: str, messages: Mapping[str, Iterable[tuple[Any, ...]]]) -> descriptor_pb2.FileDescriptorProto:
    """Write a file of messages: name -> fields of (name, number, type[, name of a message or enum[, repeated]])."""
    made = descriptor_pb2.FileDescriptorProto(
        name=f"{package.replace('.', '/')}.proto", package=package, syntax="proto3"
    )
    for name, fields in messages.items():
        message = made.message_type.add(name=name)
        for field, number, kind, *more in fields:
            added = message.field.add(name=field, number=number, type=kind, label=_Field.LABEL_OPTIONAL)
            if more:
                added.type_name = f".{package}.{more[0]}"
            if more[1:]:
                added.label = _Field.LABEL_REPEATED
    return made


def _service(
    made: descriptor_pb2.FileDescriptorProto, name: str, methods: Iterable[tuple[str, str, str, bool, bool]]
) -> None:
    service = made.service.add(name=name)
    for method, takes, gives, up, down in methods:
        service.method.add(
            name=method,
            input_type=f".{made.package}.{takes}",
            output_type=f".{made.package}.{gives}",
            client_streaming=up,
            server_streaming=down,
        )


def _health() -> descriptor_pb2.FileDescriptorProto:
    made = _file(
        "grpc.health.v1",
        {
            "HealthCheckRequest": [("service", 1, STRING)],
            "HealthCheckResponse": [("status", 1, ENUM, "HealthCheckResponse.ServingStatus")],
        },
    )
    status = made.message_type[1].enum_type.add(name="ServingStatus")
    for number, name in enumerate(("UNKNOWN", "SERVING", "NOT_SERVING", "SERVICE_UNKNOWN")):
        status.value.add(name=name, number=number)
    pair = ("HealthCheckRequest", "HealthCheckResponse")
    _service(made, "Health", [("Check", *pair, False, False), ("Watch", *pair, False, True)])
    return made


def _reflection(package: str) -> descriptor_pb2.FileDescriptorProto:
    made = _file(
        package,
        {
            "ServerReflectionRequest": [
                ("host", 1, STRING),
                ("file_by_filename", 3, STRING),
                ("file_containing_symbol", 4, STRING),
                ("file_containing_extension", 5, MESSAGE, "ExtensionRequest"),
                ("all_extension_numbers_of_type", 6, STRING),
                ("list_services", 7, STRING),
            ],
            "ExtensionRequest": [("containing_type", 1, STRING), ("extension_number", 2, INT32)],
            "ServerReflectionResponse": [
                ("valid_host", 1, STRING),
                ("original_request", 2, MESSAGE, "ServerReflectionRequest"),
                ("file_descriptor_response", 4, MESSAGE, "FileDescriptorResponse"),
                ("list_services_response", 6, MESSAGE, "ListServiceResponse"),
                ("error_response", 7, MESSAGE, "ErrorResponse"),
            ],
            "FileDescriptorResponse": [("file_descriptor_proto", 1, BYTES)],
            "ListServiceResponse": [("service", 1, MESSAGE, "ServiceResponse", True)],
            "ServiceResponse": [("name", 1, STRING)],
            "ErrorResponse": [("error_code", 1, INT32), ("error_message", 2, STRING)],
        },
    )
    made.message_type[3].field[0].label = _Field.LABEL_REPEATED
    made.message_type[0].oneof_decl.add(name="message_request")
    for field in made.message_type[0].field[1:]:
        field.oneof_index = 0
    pair = ("ServerReflectionRequest", "ServerReflectionResponse")
    _service(made, "ServerReflection", [("ServerReflectionInfo", *pair, True, True)])
    return made


FILES = (_health(), *(_reflection(name.rpartition(".")[0]) for name in REFLECTIONS))
_POOL = DescriptorPool()
for _each in FILES:
    _POOL.Add(_each)


def message(name: str) -> type[Message]:
    """Give the class of a message of these files by its full name."""
    made: type[Message] = GetMessageClass(_POOL.FindMessageTypeByName(name))
    return made


HealthCheckRequest = message("grpc.health.v1.HealthCheckRequest")


def health_of(ready: bool, service: str) -> int:
    """Give the status of a service by its name; "" is the whole server."""
    if service not in ("", INFERENCE):
        return SERVICE_UNKNOWN
    return SERVING if ready else NOT_SERVING


def health_reply(status: int) -> bytes:
    """Give a serialized HealthCheckResponse."""
    done: bytes = message("grpc.health.v1.HealthCheckResponse")(status=status).SerializeToString()
    return done


class Reflection:
    """Answers what tools like grpcurl ask: which services there are, and the files that define them."""

    def __init__(self, files: Iterable[descriptor_pb2.FileDescriptorProto]) -> None:
        self._files = {file.name: file.SerializeToString() for file in files}
        self._services: list[str] = []
        self._symbols: dict[str, str] = {}
        for file in files:
            for service in file.service:
                name = f"{file.package}.{service.name}"
                self._services.append(name)
                self._symbols[name] = file.name
                self._symbols.update({f"{name}.{method.name}": file.name for method in service.method})
            self._symbols.update({f"{file.package}.{item.name}": file.name for item in file.message_type})
            self._symbols.update({f"{file.package}.{item.name}": file.name for item in file.enum_type})

    def answer(self, package: str, data: bytes) -> bytes:
        """Answer one message of the stream; ``package`` is that of the service that was called. Raises BadRequest."""
        asked = parse(message(f"{package}.ServerReflectionRequest"), data)
        reply: Any = message(f"{package}.ServerReflectionResponse")(valid_host=asked.host, original_request=asked)
        kind = asked.WhichOneof("message_request")
        if kind == "list_services":
            for name in self._services:
                reply.list_services_response.service.add(name=name)
        elif kind in ("file_by_filename", "file_containing_symbol"):
            wanted = getattr(asked, kind)
            name = wanted if kind == "file_by_filename" else self._symbols.get(wanted, "")
            if name in self._files:
                reply.file_descriptor_response.file_descriptor_proto.append(self._files[name])
            else:
                reply.error_response.error_code = NOT_FOUND
                reply.error_response.error_message = f"nothing is called {wanted[:200]!r} here"
        else:
            reply.error_response.error_code = UNIMPLEMENTED
            reply.error_response.error_message = f"{kind} is not answered: the messages have no extensions"
        done: bytes = reply.SerializeToString()
        return done
