"""The clients: one face over REST and gRPC, blocking and with asyncio."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TypeVar

import numpy.typing as npt

from hasten.artifact import Json
from hasten.client.calls import Call, Calls, Reply
from hasten.client.rest_calls import RestCalls
from hasten.client.values import (
    Address,
    InferResult,
    ModelState,
    Wanted,
    read_address,
    request_of,
    time_of,
)
from hasten.errors import MissingDependency
from hasten.protocol.messages import ModelMetadata

T = TypeVar("T")
FIX = "pip install 'hasten[serve]'"


class Sends(Protocol):
    """What carries calls to one server."""

    def send(self, call: Call[Any], timeout_s: float) -> Reply:
        """Send one call. Raises NoAnswer, DeadlineExceeded."""

    def close(self) -> None:
        """Let go of connections."""


class SendsAsync(Protocol):
    """The same, with asyncio."""

    async def send(self, call: Call[Any], timeout_s: float) -> Reply:
        """Send one call. Raises NoAnswer, DeadlineExceeded."""

    async def close(self) -> None:
        """Let go of connections."""


class Client:
    """Calls a server of the Open Inference Protocol, and waits for each answer. Threads may share one.

        with hasten.Client("http://127.0.0.1:8000") as client:
            result = client.infer("net", {"x": rows})
            print(result.outputs, result.phases_ns)

    ``http://`` and ``https://`` speak REST, ``grpc://`` and ``grpcs://`` gRPC (extra ``serve``). Nothing is connected
    before the first call. What a server refuses is raised as the ``ServeError`` that it means, with the server's text.
    A call ends after its ``timeout_s``, by default a minute, with DeadlineExceeded. Neither protocol asks a proxy that
    the environment names.

    Raises:
        InvalidSetting: the URL is none. MissingDependency: gRPC is not installed. BadInput: an unusable certificate.
    """

    def __init__(
        self, url: str, *, binary: bool = True, api_key: str | None = None, certificate: Path | None = None
    ) -> None:
        """Make a client; ``binary`` sends tensors as bytes over REST, else as JSON."""
        self.address = read_address(url, api_key=api_key, certificate=certificate)
        self._calls = _calls(self.address, binary=binary)
        kind = ("hasten.client.grpc", "open_grpc") if self.address.is_grpc else ("hasten.client.http", "open_http")
        self._sender: Sends = _load(*kind)(self.address)

    def infer(
        self,
        model: str,
        inputs: Mapping[str, npt.ArrayLike],
        *,
        version: str | None = None,
        outputs: Sequence[str] = (),
        id: str = "",  # noqa: A002 - the protocol's word
        priority: int = 0,
        timeout_s: float | None = None,
    ) -> InferResult:
        """Send arrays, each [rows, ...], and give the answer.

        Args:
            model: The model's name.
            inputs: Arrays by the names of the model's inputs.
            version: A version; by default the one that the server routes to.
            outputs: Names of the outputs that are wanted; none: all.
            id: A word of your own that comes back.
            priority: 1 is the highest; 0: the deployment's usual one.
            timeout_s: Time after which the answer is of no use; the server is told, and the client stops waiting.

        Raises:
            ServeError: of the kind that the server's answer means; NoAnswer where it gave none that can be read.
        """
        wanted = Wanted(version=version, outputs=outputs, id=id, priority=priority, timeout_s=timeout_s)
        return self._do(self._calls.infer(request_of(model, inputs, wanted)), timeout_s)

    def ready(self, model: str | None = None, *, version: str | None = None, timeout_s: float | None = None) -> bool:
        """Say whether a model takes requests, or where none is named, the whole server. Raises ServeError."""
        return self._do(self._calls.ready(model, version), timeout_s)

    def metadata(self, model: str, *, version: str | None = None, timeout_s: float | None = None) -> ModelMetadata:
        """Give what a model takes and gives. Raises ServeError."""
        return self._do(self._calls.metadata(model, version), timeout_s)

    def statistics(self, model: str, *, version: str | None = None, timeout_s: float | None = None) -> dict[str, Json]:
        """Give what a model has done, as the protocol's extension has it. Raises ServeError."""
        return self._do(self._calls.statistics(model, version), timeout_s)

    def index(self, *, timeout_s: float | None = None) -> tuple[ModelState, ...]:
        """Give every model and version that the server knows. Raises ServeError."""
        return self._do(self._calls.index(), timeout_s)

    def load(self, model: str, *, timeout_s: float | None = None) -> None:
        """Load a model's newest version, or reload it; returns when it serves. Raises ServeError."""
        self._do(self._calls.load(model), timeout_s)

    def unload(self, model: str, *, timeout_s: float | None = None) -> None:
        """Take a model out of service; returns when what was inside is finished. Raises ServeError."""
        self._do(self._calls.unload(model), timeout_s)

    def close(self) -> None:
        """Close the connections. Closing twice is fine; afterwards REST opens new ones, gRPC raises UsageError."""
        self._sender.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _do(self, call: Call[T], timeout_s: float | None = None) -> T:
        return call.read(self._sender.send(call, time_of(timeout_s)))


class AsyncClient:
    """Calls a server of the Open Inference Protocol from asyncio: ``Client``, with every call to be awaited.

    Any number of calls may be under way at once, on one event loop. Needs the extra ``serve``. Cancelling a call drops
    its connection, so that a server which watches for that withdraws the request.

    Raises:
        InvalidSetting: the URL is none. MissingDependency: the extra. BadInput: an unusable certificate.
    """

    def __init__(
        self, url: str, *, binary: bool = True, api_key: str | None = None, certificate: Path | None = None
    ) -> None:
        """Make a client; ``binary`` sends tensors as bytes over REST, else as JSON."""
        self.address = read_address(url, api_key=api_key, certificate=certificate)
        self._calls = _calls(self.address, binary=binary)
        kind = "grpc_async" if self.address.is_grpc else "http_async"
        self._sender: SendsAsync = _load(f"hasten.client.{kind}", f"open_{kind}")(self.address)

    async def infer(
        self,
        model: str,
        inputs: Mapping[str, npt.ArrayLike],
        *,
        version: str | None = None,
        outputs: Sequence[str] = (),
        id: str = "",  # noqa: A002 - the protocol's word
        priority: int = 0,
        timeout_s: float | None = None,
    ) -> InferResult:
        """Send arrays and give the answer; see ``Client.infer``."""
        wanted = Wanted(version=version, outputs=outputs, id=id, priority=priority, timeout_s=timeout_s)
        return await self._do(self._calls.infer(request_of(model, inputs, wanted)), timeout_s)

    async def ready(
        self, model: str | None = None, *, version: str | None = None, timeout_s: float | None = None
    ) -> bool:
        """Say whether a model takes requests, or where none is named, the whole server. Raises ServeError."""
        return await self._do(self._calls.ready(model, version), timeout_s)

    async def metadata(
        self, model: str, *, version: str | None = None, timeout_s: float | None = None
    ) -> ModelMetadata:
        """Give what a model takes and gives. Raises ServeError."""
        return await self._do(self._calls.metadata(model, version), timeout_s)

    async def statistics(
        self, model: str, *, version: str | None = None, timeout_s: float | None = None
    ) -> dict[str, Json]:
        """Give what a model has done, as the protocol's extension has it. Raises ServeError."""
        return await self._do(self._calls.statistics(model, version), timeout_s)

    async def index(self, *, timeout_s: float | None = None) -> tuple[ModelState, ...]:
        """Give every model and version that the server knows. Raises ServeError."""
        return await self._do(self._calls.index(), timeout_s)

    async def load(self, model: str, *, timeout_s: float | None = None) -> None:
        """Load a model's newest version, or reload it; returns when it serves. Raises ServeError."""
        await self._do(self._calls.load(model), timeout_s)

    async def unload(self, model: str, *, timeout_s: float | None = None) -> None:
        """Take a model out of service; returns when what was inside is finished. Raises ServeError."""
        await self._do(self._calls.unload(model), timeout_s)

    async def close(self) -> None:
        """Close the connections. Closing twice is fine."""
        await self._sender.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _do(self, call: Call[T], timeout_s: float | None = None) -> T:
        return call.read(await self._sender.send(call, time_of(timeout_s)))


def _calls(address: Address, *, binary: bool) -> Calls:
    if address.is_grpc:
        made: Calls = _load("hasten.client.grpc_calls", "GrpcCalls")(url=address.url)
        return made
    return RestCalls(url=address.url, prefix=address.prefix, binary=binary)


def _load(module: str, name: str) -> Callable[..., Any]:
    """Import what a scheme needs. Raises MissingDependency."""
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise MissingDependency(f"what this client needs ({error.name or error})", FIX) from error
    return found
