"""gRPC for blocking clients: one channel of ``grpcio``, messages as bytes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import grpc

from hasten.client.calls import Call, Reply
from hasten.client.http import trusted
from hasten.client.values import LARGEST_ANSWER_BYTES, Address
from hasten.errors import BadInput, UsageError

SERVICE = "inference.GRPCInferenceService"

OPTIONS = (
    ("grpc.max_receive_message_length", LARGEST_ANSWER_BYTES),
    ("grpc.max_send_message_length", LARGEST_ANSWER_BYTES),
    ("grpc.enable_http_proxy", 0),  # as over REST
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),  # gRPC's own, 2 minutes, keeps a client away long after a restart
)


def method_of(call: Call[Any]) -> str:
    """Give the path of a call's method."""
    return f"/{SERVICE}/{call.target}"


def metadata_of(address: Address) -> tuple[tuple[str, str], ...]:
    """Give the metadata that a call brings."""
    return () if address.api_key is None else (("authorization", f"Bearer {address.api_key}"),)


def credentials_of(address: Address) -> grpc.ChannelCredentials:
    """Give what TLS trusts. Raises BadInput."""
    if address.certificate is None:
        return grpc.ssl_channel_credentials()
    trusted(address)  # gRPC itself takes any bytes, and trusts nobody then
    try:
        return grpc.ssl_channel_credentials(address.certificate.read_bytes())
    except OSError as error:
        raise BadInput(f"{address.certificate} cannot be read: {error.strerror}") from error


def headers_of(pairs: Iterable[Any] | None) -> dict[str, str]:
    """Give metadata by name; binary values are none of ours."""
    return {str(name): value for name, value in pairs or () if isinstance(value, str)}


@dataclass(frozen=True)
class Grpc:
    """Sends calls to one server."""

    address: Address
    _channel: grpc.Channel

    def send(self, call: Call[Any], timeout_s: float) -> Reply:
        """Send a call and give its answer, or the status that the server or the library ended it with.

        Raises:
            UsageError: the client was closed.
        """
        stub: grpc.UnaryUnaryMultiCallable[bytes, bytes] = self._channel.unary_unary(method_of(call))
        try:
            body, done = stub.with_call(bytes(call.body[0]), timeout=timeout_s, metadata=metadata_of(self.address))
        except grpc.RpcError as error:
            return Reply(error.code().value[0], headers_of(error.trailing_metadata()), (error.details() or "").encode())
        except ValueError as error:  # what grpcio says of a closed channel
            raise UsageError(f"the client of {self.address.url} is closed; make another for more calls") from error
        return Reply(0, headers_of(done.trailing_metadata()), body)

    def close(self) -> None:
        """Close the channel. Closing twice is fine."""
        self._channel.close()


def open_grpc(address: Address) -> Grpc:
    """Make what sends calls to an address; nothing is connected yet. Raises BadInput."""
    if address.secure:
        return Grpc(address, grpc.secure_channel(address.authority, credentials_of(address), OPTIONS))
    return Grpc(address, grpc.insecure_channel(address.authority, OPTIONS))
