"""Messages of inference that were read or written before: like ``rest_templates``, for gRPC.

All that a request says before its raw contents is kept by its bytes, without its id. A message that begins with the
same bytes needs its raw contents cut out, and nothing else. Whatever is not of that shape goes to the library.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import msgspec
import numpy as np

from hasten.protocol import grpc
from hasten.protocol.messages import ITEM_BYTES, Form, InferRequest, InferResponse, Parameters, Tensor
from hasten.protocol.shared_memory import Regions
from hasten.tensors import Array

KEPT_HEADS: Final = 256
"""Beginnings that are kept; then all are forgotten, so that nobody fills the memory with them."""

LONGEST_HEAD_BYTES: Final = 8192
"""A longer one is read anew each time."""

_ID, _RAW = 0x1A, 0x3A
"""Tags of a request's ``id`` and of its ``raw_input_contents``: field numbers 3 and 7, length-delimited."""
_ANSWER_ID, _ANSWER_RAW = b"\x1a", b"\x32"
"""Tags of an answer's ``id`` and of its ``raw_output_contents``."""

Spans = list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class _Slot:
    """One tensor of a beginning: all of it but its elements."""

    name: str
    datatype: str
    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]
    n_bytes: int
    parameters: Parameters


@dataclass(frozen=True, slots=True)
class _Known:
    request: InferRequest
    slots: tuple[_Slot, ...]


class RequestTemplates:
    """Reads requests; gives what ``grpc.decode_infer`` gives."""

    def __init__(self, regions: Regions | None = None) -> None:
        self._regions = regions
        self._known: dict[bytes, _Known] = {}
        self._usual = 0
        """Bytes before the raw contents of the last message that had no id."""

    def decode(self, data: bytes) -> InferRequest:
        """Read a request; see ``grpc.decode_infer``. Raises BadRequest."""
        known = self._known.get(data[: self._usual])
        spans = None if known is None else _raw_spans(data, self._usual)
        if known is not None and spans is not None:
            filled = _filled(known, data, spans, "")
            if filled is not None:
                return filled
        parted = _parted(data)
        if parted is None:
            return grpc.decode_infer(data, regions=self._regions)
        head, name, spans = parted
        known = self._known.get(head)
        filled = None if known is None else _filled(known, data, spans, name)
        if filled is None:
            filled = grpc.decode_infer(data, regions=self._regions)
            self._keep(head, filled, len(spans))
        if not name:
            self._usual = len(head)
        return filled

    def _keep(self, head: bytes, request: InferRequest, raws: int) -> None:
        slots = []
        for tensor in request.inputs:
            if tensor.datatype not in ITEM_BYTES or tensor.datatype == "BOOL":
                return  # BYTES and BOOL are looked into
            data = tensor.data
            slots.append(_Slot(tensor.name, tensor.datatype, data.dtype, data.shape, data.nbytes, tensor.parameters))
        if len(slots) != raws:
            return  # typed contents are in the head, and what lies in shared memory is read anew each time
        if len(self._known) >= KEPT_HEADS:
            self._known.clear()
        bare = msgspec.structs.replace(request, inputs=(), id="", form=Form())
        self._known[head] = _Known(bare, tuple(slots))


def _parted(data: bytes) -> tuple[bytes, str, Spans] | None:
    """Part a message into what comes before the raw contents, without the id; the id; and where the contents lie.

    None: it is not of that shape.
    """
    at, end, of_id = 0, len(data), None
    try:
        while at < end and data[at] != _RAW:
            tag, begin = data[at], at
            if tag & 7 != 2 or tag > _RAW:
                return None
            size, at = _length(data, at + 1)
            if tag == _ID:
                if of_id is not None:
                    return None
                of_id = (begin, at, at + size)
            at += size
        if at > min(end, LONGEST_HEAD_BYTES):
            return None
        spans = _raw_spans(data, at)
        if spans is None:
            return None
        if of_id is None:
            return data[:at], "", spans
        begin, first, last = of_id
        return data[:begin] + data[last:at], data[first:last].decode(), spans
    except (IndexError, UnicodeDecodeError):
        return None  # cut short, or no text: the library says what is wrong


def _raw_spans(data: bytes, at: int) -> Spans | None:
    """Give where the raw contents lie that are all that follows ``at``; None where something else follows."""
    spans: Spans = []
    end = len(data)
    try:
        while at < end:
            if data[at] != _RAW:
                return None
            size = data[at + 1]
            at += 2
            if size > 127:
                size, at = _length(data, at - 1)
            spans.append((at, at + size))
            at += size
    except IndexError:
        return None
    return spans if at == end else None


def _length(data: bytes, at: int) -> tuple[int, int]:
    """Read a varint of at most five bytes; gives it and where it ends. A longer one counts as cut short."""
    value = shift = 0
    while shift < 35:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
    raise IndexError


def _filled(known: _Known, data: bytes, spans: Spans, name: str) -> InferRequest | None:
    """Make the request; None where the contents are not as many and as long as the beginning says."""
    slots = known.slots
    if len(spans) != len(slots):
        return None
    inputs: tuple[Tensor, ...] = ()
    for slot, (first, last) in zip(slots, spans, strict=True):
        if last - first != slot.n_bytes:
            return None
        array: Array = np.ndarray(slot.shape, slot.dtype, data, first)
        inputs += (Tensor(name=slot.name, datatype=slot.datatype, data=array, parameters=slot.parameters),)
    return msgspec.structs.replace(known.request, id=name, inputs=inputs)


class ResponseTemplates:
    """Writes answers; gives what ``grpc.encode_infer`` gives."""

    def __init__(self, regions: Regions | None = None) -> None:
        self._regions = regions
        self._known: dict[object, tuple[bytes, bytes]] = {}

    def encode(self, response: InferResponse, request: InferRequest) -> bytes:
        """Write an answer; see ``grpc.encode_infer``. Raises BadRequest."""
        outputs = response.outputs
        shared = self._regions is not None and bool(request.outputs)  # an output may belong there
        if response.parameters or shared or grpc.TYPED in request.parameters:
            return grpc.encode_infer(response, request, regions=self._regions)
        key = response.form
        known = self._known.get(key)
        if known is None:
            if not all(tensor.datatype in ITEM_BYTES and not tensor.parameters for tensor in outputs):
                return grpc.encode_infer(response, request)
            known = _written(response, request)
            if len(self._known) >= KEPT_HEADS:
                self._known.clear()
            self._known[key] = known
        parts = [known[0]]
        if response.id:
            text = response.id.encode()
            parts += (_ANSWER_ID, _varint(len(text)), text)
        parts.append(known[1])
        for tensor in outputs:
            raw = tensor.data.tobytes()  # in row-major order, whatever the array's own
            parts += (_ANSWER_RAW, _varint(len(raw)), raw)
        return b"".join(parts)


def _written(response: InferResponse, request: InferRequest) -> tuple[bytes, bytes]:
    """Give what stands before an answer's id, and between it and the raw contents."""
    named = grpc.encode_infer(msgspec.structs.replace(response, id="", outputs=()), request)
    whole = grpc.encode_infer(msgspec.structs.replace(response, id=""), request)
    raw = sum(1 + len(_varint(t.data.nbytes)) + t.data.nbytes for t in response.outputs)
    return named, whole[len(named) : len(whole) - raw]


def _varint(value: int) -> bytes:
    if value < 128:
        return value.to_bytes(1, "little")
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)
