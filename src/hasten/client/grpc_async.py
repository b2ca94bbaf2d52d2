"""gRPC for asyncio clients: one channel of ``grpc.aio``, messages as bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import grpc.aio

from hasten.client.calls import Call, Reply
from hasten.client.grpc import OPTIONS, credentials_of, headers_of, metadata_of, method_of
from hasten.client.values import Address


@dataclass
class AsyncGrpc:
    """Sends calls to one server, on one event loop: that on which the first call is made."""

    address: Address
    _open: Callable[[], grpc.aio.Channel]
    _channel: grpc.aio.Channel | None = field(default=None, init=False)

    async def send(self, call: Call[Any], timeout_s: float) -> Reply:
        """Send a call and give its answer, or the status that the server or the library ended it with."""
        if self._channel is None:  # made within the loop that it belongs to
            self._channel = self._open()
        stub: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = self._channel.unary_unary(method_of(call))
        under_way = stub(bytes(call.body[0]), timeout=timeout_s, metadata=metadata_of(self.address))
        try:
            body = await under_way
            trailing = await under_way.trailing_metadata()
        except grpc.aio.AioRpcError as error:
            return Reply(error.code().value[0], headers_of(error.trailing_metadata()), (error.details() or "").encode())
        return Reply(0, headers_of(trailing), body)

    async def close(self) -> None:
        """Close the channel. Closing twice is fine."""
        if self._channel is not None:
            await self._channel.close()
            self._channel = None


def open_grpc_async(address: Address) -> AsyncGrpc:
    """Make what sends calls to an address; nothing is connected yet. Raises BadInput."""
    if address.secure:
        credentials = credentials_of(address)
        return AsyncGrpc(address, lambda: grpc.aio.secure_channel(address.authority, credentials, OPTIONS))
    return AsyncGrpc(address, lambda: grpc.aio.insecure_channel(address.authority, OPTIONS))
