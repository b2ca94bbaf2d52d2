"""JSON heads that were read or written before: clients send the same one thousands of times, and only ids differ.

A head that was read whole and found right is kept by its bytes, without its id. A body with the same head needs its
tensors cut out of what follows, and nothing else: whatever was checked of the head holds for the same bytes. Of bodies
that are JSON alone the head is what is left without the elements (``json_templates``).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeVar

import msgspec
import numpy as np
from msgspec.structs import replace

from hasten.protocol import json_templates, rest
from hasten.protocol.binary_tensors import Buffer
from hasten.protocol.messages import ITEM_BYTES, Form, InferRequest, InferResponse, ModelMetadata, Parameters, Tensor
from hasten.protocol.shared_memory import Regions
from hasten.tensors import Array

T = TypeVar("T")

KEPT_BYTES = 2**21
"""Of heads, over all the targets that share a ``Heads``. What was read of one takes up to 14 times as much memory."""

KEPT_HEADS: Final = 256
"""Heads that are kept of answers; then all are forgotten."""

LONGEST_HEAD_BYTES: Final = 8192
"""A longer one is read anew each time."""

ID = re.compile(rb'"id": ?"([ !#-\[\]-~]*)"')
"""An id of plain ASCII. In a head without escapes that has one such place it is the request's own, or a parameter's; a
head is kept without it only where what was read tells that it is the request's own."""

_JSON: Final = msgspec.json.Encoder()

_ARRAY: Final = np.ndarray


@dataclass(frozen=True, slots=True)
class _Slot:
    """Where a tensor lies behind the head."""

    name: str
    datatype: str
    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]
    offset: int
    parameters: Parameters


@dataclass(frozen=True, slots=True)
class _Known:
    """A head that was read: the request without its data and its id, and the bytes that must follow."""

    request: InferRequest
    slots: tuple[_Slot, ...]
    n_bytes: int
    takes_id: bool
    """The place that was emptied is the request's own id, since it was read from there."""


class Heads:
    """What was read of heads, in tables that are bounded together: nobody fills the memory with them."""

    def __init__(self) -> None:
        self._tables: list[dict[bytes, Any]] = []
        self._held_bytes = 0

    def table(self) -> dict[bytes, Any]:
        """Give one more table, empty. Only ``keep`` adds to it; it may be emptied at any time."""
        made: dict[bytes, Any] = {}
        self._tables.append(made)
        return made

    def keep(self, table: dict[bytes, T], head: bytes, known: T) -> None:
        """Keep what was read of a head. Where all together would be too much, the others are forgotten."""
        if head not in table:
            self._held_bytes += len(head)
        if self._held_bytes > KEPT_BYTES:
            for each in self._tables:
                each.clear()
            self._held_bytes = len(head)
        table[head] = known


class RequestTemplates:
    """Reads the requests of one target; gives what ``rest.decode_request`` gives.

    Those of several targets that are given the same ``heads`` are bounded together.
    """

    def __init__(
        self, model: str, version: str | None, *, regions: Regions | None = None, heads: Heads | None = None
    ) -> None:
        self._regions = regions
        self.model = model
        self.version = version
        self._heads = heads or Heads()
        self._known: dict[bytes, _Known] = self._heads.table()
        self._plain: dict[bytes, _Plain] = self._heads.table()
        self._numbers = json_templates.Numbers()

    def decode(
        self, body: Buffer, *, header_bytes: int | None, metadata: Callable[[str, str | None], ModelMetadata]
    ) -> InferRequest:
        """Read a request; ``metadata`` gives that of a model and version, which raw requests ask for.

        See ``rest.decode_request``. Raises BadRequest.
        """
        if header_bytes is None:
            return self._decode_plain(body, metadata)
        if not header_bytes or header_bytes > LONGEST_HEAD_BYTES:
            return self._read(body, header_bytes, metadata)
        head = bytes(body[:header_bytes])
        known, name = self._known.get(head), ""
        if known is None and b'"id"' in head:
            parted = _without_id(head)
            if parted is not None:
                head, name = parted
                known = self._known.get(head)
                if known is not None and not known.takes_id:
                    known = None
        if known is not None and len(body) == header_bytes + known.n_bytes:
            return _filled(known, body, header_bytes, name)
        request = self._read(body, header_bytes, metadata)
        if known is None and request.id == name:
            self._keep(head, request)
        return request

    def _decode_plain(self, body: Buffer, metadata: Callable[[str, str | None], ModelMetadata]) -> InferRequest:
        """Read a request that is JSON alone."""
        text = bytes(body)
        parted = json_templates.part(text)
        if parted is None or len(parted.head) > LONGEST_HEAD_BYTES:
            return self._read(text, None, metadata)
        head, name = _without_id(parted.head) or (parted.head, None)  # None: an id, if any, stays in the head
        known = self._plain.get(head)
        if known is not None:
            inputs = self._numbers.tensors(text, parted, known.slots)
            if inputs is not None:
                own = known.request.id if name is None else name
                return replace(known.request, id=own, inputs=inputs)
        request = self._read(text, None, metadata)
        if known is None and (name is None or (name and request.id == name)):
            slots = json_templates.slots_of(request, rest.said_of(parted.head))
            if slots is not None and len(slots) == len(parted.parts):
                bare = replace(request, inputs=(), form=Form())
                self._heads.keep(self._plain, head, _Plain(bare, slots))
        return request

    def _read(
        self, body: Buffer, header_bytes: int | None, metadata: Callable[[str, str | None], ModelMetadata]
    ) -> InferRequest:
        return rest.decode_request(
            body,
            header_bytes=header_bytes,
            model=self.model,
            version=self.version,
            metadata=partial(metadata, self.model, self.version),
            regions=self._regions,
        )

    def _keep(self, head: bytes, request: InferRequest) -> None:
        slots, at = [], 0
        for tensor in request.inputs:
            item = ITEM_BYTES.get(tensor.datatype)
            if item is None or tensor.datatype == "BOOL" or tensor.parameters.get(rest.SIZE) != tensor.data.nbytes:
                return  # BYTES and BOOL are looked into, and what is no bytes is in the head
            data = tensor.data
            slots.append(_Slot(tensor.name, tensor.datatype, data.dtype, data.shape, at, tensor.parameters))
            at += data.nbytes
        bare = replace(request, inputs=(), id="", form=Form())
        self._heads.keep(self._known, head, _Known(bare, tuple(slots), at, bool(request.id)))


@dataclass(frozen=True, slots=True)
class _Plain:
    """A request in JSON alone that was read, without its elements."""

    request: InferRequest
    slots: tuple[json_templates.Slot, ...]


def _without_id(head: bytes) -> tuple[bytes, str] | None:
    """Take the id out of a head; None where there is not exactly one place for it."""
    if head.count(b'"id"') != 1 or b"\\" in head:
        return None
    found = ID.search(head)
    if found is None:
        return None
    return head[: found.start(1)] + head[found.end(1) :], found[1].decode("ascii")


def _filled(known: _Known, body: Buffer, at: int, name: str) -> InferRequest:
    inputs: tuple[Tensor, ...] = ()
    if isinstance(body, bytearray):
        body = memoryview(body)  # it keeps its length for as long as an array lies in it
    for slot in known.slots:
        data: Array = _ARRAY(slot.shape, slot.dtype, body, at + slot.offset)
        inputs += (Tensor(name=slot.name, datatype=slot.datatype, data=data, parameters=slot.parameters),)
    return replace(known.request, id=name, inputs=inputs)


class ResponseTemplates:
    """Writes answers; gives what ``rest.encode_response`` gives."""

    def __init__(self, regions: Regions | None = None) -> None:
        self._regions = regions
        self._known: dict[object, bytes] = {}

    def encode(self, response: InferResponse, request: InferRequest) -> tuple[list[bytes | memoryview], int | None]:
        """Write an answer; see ``rest.encode_response``. Raises BadRequest."""
        outputs = response.outputs
        if response.parameters or not wants_binary(request):
            return rest.encode_response(response, request, regions=self._regions)
        key = response.form
        head = self._known.get(key)
        if head is None:
            parts, header_bytes = rest.encode_response(response, request)
            if header_bytes is not None and all(t.datatype in ITEM_BYTES and not t.parameters for t in outputs):
                bare, _ = rest.encode_response(replace(response, id=""), request)
                if len(self._known) >= KEPT_HEADS:
                    self._known.clear()
                self._known[key] = bytes(bare[0])
            return parts, header_bytes
        if response.id:  # it is written last
            head = b'%b,"id":%b}' % (head[:-1], _JSON.encode(response.id))
        written: list[bytes | memoryview] = [head]
        for tensor in outputs:
            data = tensor.data
            written.append(data.tobytes() if data.nbytes <= SMALL_BYTES else _view_of(data))
        return written, len(head)


def wants_binary(request: InferRequest) -> bool:
    """Say whether every output is to be bytes behind the JSON, and nothing else is asked of any."""
    form = request.form
    if form is None:
        return _asks_binary(request)
    found = form.binary
    if found is None:
        found = form.binary = _asks_binary(request)
    return found


def _asks_binary(request: InferRequest) -> bool:
    usual = request.parameters.get(rest.ALL) is True
    for output in request.outputs:
        if output.parameters and (len(output.parameters) > 1 or rest.ASKED not in output.parameters):
            return False
        if not (usual if output.binary is None else output.binary):
            return False
    return usual if not request.outputs else True


def _view_of(data: Array) -> memoryview:
    return np.ascontiguousarray(data).reshape(-1).view(np.uint8).data


SMALL_BYTES: Final = 4096
"""Up to this a copy costs less than a view."""
