"""gRPC as a check needs it: grpcio's own channel, bytes in and out, and messages of the private descriptor pool."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from hasten.client.grpc import credentials_of, metadata_of
from hasten.client.values import Address
from hasten.conformance.server import GrpcAnswer
from hasten.conformance.wire import LARGEST_ANSWER_BYTES, NotMet
from hasten.protocol.grpc_messages import PACKAGE, SERVICE, message

OPTIONS = (
    ("grpc.max_receive_message_length", LARGEST_ANSWER_BYTES),
    ("grpc.enable_retries", 0),
)


@dataclass(frozen=True)
class Grpc:
    """The gRPC side of a server, over one channel."""

    channel: grpc.Channel
    timeout_s: float = 10.0
    metadata: tuple[tuple[str, str], ...] = ()

    def call(self, call: str, /, **fields: Any) -> GrpcAnswer:
        """Call the inference service; see ``server.GrpcCalls``. Raises NotMet."""
        request: Any = message(f"{call}Request")(**fields)
        code, details, data = self.call_raw(f"/{PACKAGE}.{SERVICE}/{call}", request.SerializeToString())
        try:
            answer = message(f"{call}Response").FromString(data)
        except DecodeError as error:
            raise NotMet(f"{call} answered what is no {call}Response: {error}") from error
        return GrpcAnswer(said=call, code=code, details=details, message=answer)

    def call_raw(self, method: str, data: bytes, *, streams: bool = False) -> tuple[int, str, bytes]:
        """Call a method with bytes; see ``server.GrpcCalls``. Raises NotMet."""
        name = method.rpartition("/")[2]
        try:
            if streams:
                stub: Any = self.channel.stream_stream(method)
                return 0, "", next(stub(iter([data]), timeout=self.timeout_s, metadata=self.metadata), b"")
            unary: Any = self.channel.unary_unary(method)
            return 0, "", unary(data, timeout=self.timeout_s, metadata=self.metadata)
        except grpc.RpcError as error:
            code, details = int(error.code().value[0]), str(error.details() or "")
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise NotMet(f"{name}: no answer within {self.timeout_s:g} s") from error
            if error.code() is grpc.StatusCode.UNAVAILABLE and _is_local(details):
                raise NotMet(f"{name}: no answer: {details[:200]}") from error
            return code, details, b""


def _is_local(details: str) -> bool:
    """Say whether the library gave a status itself, since the connection failed."""
    return any(word in details for word in ("failed to connect", "Socket closed", "Connection reset", "recvmsg"))


def open_grpc(address: Address, *, timeout_s: float) -> Grpc:
    """Make the gRPC side of a server, over TLS where its address says so; nothing is connected yet. Raises BadInput."""
    if address.secure:
        channel = grpc.secure_channel(address.authority, credentials_of(address), OPTIONS)
    else:
        channel = grpc.insecure_channel(address.authority, OPTIONS)
    return Grpc(channel, timeout_s, metadata_of(address))
