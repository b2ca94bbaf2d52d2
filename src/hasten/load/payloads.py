"""What requests carry: samples as bytes on the wire, encoded once before a run, whatever the rate."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from hasten.client.calls import Call, Calls, Reply
from hasten.client.client import Client
from hasten.client.http import headers_of, open_http
from hasten.client.rest_calls import RestCalls
from hasten.client.values import Address, InferResult, Wanted, request_of
from hasten.errors import BadInput, InvalidSetting, MissingDependency, NoAnswer
from hasten.load.target import Target
from hasten.tensors import Array, Feed

DISTINCT = 256
"""Payloads that are made of the samples by default: enough that no cache of a server holds the answer to one."""

LARGEST_PAYLOADS_BYTES = 256 << 20
"""Of all payloads together; where samples are large, there are fewer of them."""

LARGEST_FILE_BYTES = 64 << 20
FIX = "pip install 'hasten[serve]'"


@dataclass(frozen=True)
class Payload:
    """One request: ``data`` as it goes out (HTTP: head and body; gRPC: the message with its prefix), or a feed."""

    data: bytes | Feed
    rows: int

    @property
    def n_bytes(self) -> int:
        """Bytes that go out; 0 where nothing travels."""
        return len(self.data) if isinstance(self.data, bytes) else 0


class Feedable(Protocol):
    """Rows that requests are made of: samples, or files and texts as they are."""

    @property
    def inputs(self) -> Mapping[str, Array]:
        """Tensors by name, each [n, ...]."""

    def __len__(self) -> int: ...


def payloads_of(
    target: Target, samples: Feedable, *, batch: int = 1, distinct: int = DISTINCT, seed: int = 0
) -> tuple[Payload, ...]:
    """Encode requests of ``batch`` rows each, drawn from the samples without repeating one before all were drawn.

    Raises:
        InvalidSetting: ``batch`` or ``distinct`` is below 1. BadRequest: the protocol cannot carry an input.
        BadInput: one request is larger than all may be.
    """
    if batch < 1 or distinct < 1:
        raise InvalidSetting(f"batch is {batch} and distinct is {distinct}, and both must be 1 or more")
    found: list[Payload] = []
    total_bytes = 0
    for feed in _feeds(samples, batch, distinct, seed):
        made = Payload(_encoded(target, feed), batch)
        total_bytes += made.n_bytes or sum(array.nbytes for array in feed.values())
        if total_bytes > LARGEST_PAYLOADS_BYTES:
            break
        found.append(made)
    if not found:
        raise BadInput(f"one request of {batch} rows has {total_bytes} bytes; the limit is {LARGEST_PAYLOADS_BYTES}")
    return tuple(found)


def payloads_of_files(target: Target, files: Sequence[Path]) -> tuple[Payload, ...]:
    """Make a request to an ``http`` endpoint of each file's bytes, or one without a body where there are none.

    Raises:
        BadInput: a file cannot be read, or is too large.
    """
    return tuple(Payload(_http(target, body), 1) for body in ([_body(path) for path in files] or [b""]))


def probe(target: Target, samples: Feedable, *, batch: int = 1) -> InferResult:
    """Send one request and read its whole answer, before any load. Raises ServeError as ``Client.infer`` does."""
    feed = next(_feeds(samples, batch, 1, 0))
    binary = target.protocol != "rest-json"
    with Client(target.url, binary=binary, api_key=target.api_key, certificate=target.certificate) as client:
        return client.infer(target.model, feed, version=target.version)


def probe_http(target: Target, payload: Payload, *, timeout_s: float) -> int:
    """Send one request to an ``http`` endpoint and give the status of its answer.

    Raises:
        NoAnswer: nobody listens, it speaks no HTTP, or it answers with a status outside 200 to 299.
    """
    sender = open_http(target.address)
    try:
        reply: Reply = sender.send(_call(target, _body_of(payload)), timeout_s)
    finally:
        sender.close()
    if not 200 <= reply.status < 300:
        shown = repr(bytes(memoryview(reply.body)[:80]))
        raise NoAnswer(f"{target.url} answers the first request with status {reply.status}: {shown}")
    return reply.status


def _feeds(samples: Feedable, batch: int, distinct: int, seed: int) -> Iterator[dict[str, Array]]:
    drawn = np.random.default_rng(seed).permutation(len(samples))
    count = min(distinct, -(-len(samples) // batch))
    for chosen in np.resize(drawn, (count, batch)):  # wraps around where there are too few
        yield {name: np.ascontiguousarray(array[chosen]) for name, array in samples.inputs.items()}


def _encoded(target: Target, feed: Mapping[str, Array]) -> bytes | Feed:
    if target.protocol == "session":
        return feed
    address = target.address
    call = _calls(target, address).infer(request_of(target.model, feed, Wanted(version=target.version)))
    if target.protocol == "grpc":
        message = bytes(call.body[0])
        return b"\0" + len(message).to_bytes(4, "big") + message
    return _written(address, call)


def _calls(target: Target, address: Address) -> Calls:
    if target.protocol == "http":
        raise InvalidSetting("samples cannot be sent to any http endpoint; give files with its requests' bodies")
    if target.protocol != "grpc":
        return RestCalls(url=address.url, prefix=address.prefix, binary=target.protocol == "rest-binary")
    try:
        made: Calls = importlib.import_module("hasten.client.grpc_calls").GrpcCalls(url=address.url)
    except ImportError as error:
        raise MissingDependency(f"what load over grpc needs ({error.name or error})", FIX) from error
    return made


def _call(target: Target, body: bytes) -> Call[Any]:
    """Give the call of an ``http`` endpoint."""
    if target.verb not in ("GET", "POST", "PUT", "PATCH", "DELETE"):
        raise InvalidSetting(f"the method is {target.verb!r}, and must be GET, POST, PUT, PATCH or DELETE")
    for name, value in {**target.headers, "": target.path}.items():
        if not (name + value).isascii() or not (name + value).isprintable() or (" " in target.path):
            raise InvalidSetting(f"the header or path {name + value!r} has characters that none may have")
    return Call(target=target.path, read=lambda reply: reply, verb=target.verb, body=(body,), headers=target.headers)


def _http(target: Target, body: bytes) -> bytes:
    return _written(target.address, _call(target, body))


def _written(address: Address, call: Call[Any]) -> bytes:
    lines = [f"{call.verb} {call.target} HTTP/1.1", f"Host: {address.authority}"]
    lines += [f"{name}: {value}" for name, value in headers_of(address, call).items()]
    return b"".join([("\r\n".join(lines) + "\r\n\r\n").encode("latin-1"), *call.body])


def _body(path: Path) -> bytes:
    try:
        if path.stat().st_size > LARGEST_FILE_BYTES:
            raise BadInput(f"{path} is larger than the {LARGEST_FILE_BYTES} bytes that a request's body may have")
        return path.read_bytes()
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror or error}") from error


def _body_of(payload: Payload) -> bytes:
    return payload.data.partition(b"\r\n\r\n")[2] if isinstance(payload.data, bytes) else b""
