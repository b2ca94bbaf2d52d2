"""The protocol's messages as values: what codecs read and write, and what a service takes and gives.

A tensor's data is an array in row-major order, a view of the body it came in where that is possible; BYTES are object
arrays of ``bytes``. Nothing here knows HTTP, gRPC or JSON. What is made for each request is a
``Struct``: a frozen value like a dataclass, made several times faster.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import msgspec
import numpy as np

from hasten.errors import BadRequest, InvalidSetting
from hasten.tensors import DTYPES, Array

Parameter = bool | int | float | str
Parameters = Mapping[str, Parameter]

DATATYPES: dict[str, str] = {
    "BOOL": "bool",
    **{f"{kind}{bits}": f"{kind.lower()}{bits}" for kind in ("INT", "UINT") for bits in (8, 16, 32, 64)},
    "FP16": "float16",
    "BF16": "bfloat16",
    "FP32": "float32",
    "FP64": "float64",
    "BYTES": "string",
}
"""The protocol's name of a datatype -> ours (a key of ``hasten.tensors.DTYPES``)."""

NAMES: dict[str, str] = {ours: theirs for theirs, ours in DATATYPES.items()}
"""The reverse of ``DATATYPES``."""

ITEM_BYTES: dict[str, int] = {name: DTYPES[ours].itemsize for name, ours in DATATYPES.items() if name != "BYTES"}
"""Bytes of one element; BYTES has no fixed size."""


class Tensor(msgspec.Struct, frozen=True, kw_only=True):
    """A named tensor of a request or a response. ``data`` has ``shape`` and the dtype of ``datatype``."""

    name: str
    datatype: str
    """A key of ``DATATYPES``."""
    data: Array
    parameters: Parameters = msgspec.field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, ...]:
        """The lengths of its axes."""
        return self.data.shape

    @classmethod
    def of(cls, name: str, data: Array, parameters: Parameters | None = None) -> Tensor:
        """Make a tensor of an array: its datatype follows from the dtype. Text becomes BYTES, in UTF-8.

        Raises:
            InvalidSetting: the protocol has no datatype for the dtype. BadRequest: an element is no bytes and no text.
        """
        if data.dtype.kind in "SU" or data.dtype == object:
            flat = [item if isinstance(item, bytes) else _bytes_of(name, item) for item in data.ravel().tolist()]
            held = np.empty(len(flat), object)
            held[:] = flat
            data, datatype = held.reshape(data.shape), "BYTES"
        elif data.dtype.name in NAMES:
            datatype = NAMES[data.dtype.name]
        else:
            raise InvalidSetting(f"tensor {name!r} has dtype {data.dtype}; the protocol has {', '.join(NAMES)}")
        return cls(name=name, datatype=datatype, data=data, parameters=parameters or {})


def _bytes_of(name: str, item: object) -> bytes:
    if isinstance(item, (bytearray, memoryview)):
        return bytes(item)
    if not isinstance(item, str):
        raise BadRequest(f"tensor {name!r} has an element {item!r:.80}; BYTES are of bytes or text, one kind or both")
    try:
        return item.encode()
    except UnicodeEncodeError as error:
        raise BadRequest(f"tensor {name!r} has text that is none in UTF-8: {error}") from error


class RequestedOutput(msgspec.Struct, frozen=True, kw_only=True):
    """An output that a client asks for. ``binary``: as bytes behind the JSON; None: as the request says for all."""

    name: str
    binary: bool | None = None
    parameters: Parameters = msgspec.field(default_factory=dict)


class Form(msgspec.Struct, eq=False):
    """What requests share whose heads are the same: all but their ids and the elements of their inputs.

    What somebody found out about one of them may be noted here, and holds for the next.
    """

    fits: tuple[object, tuple[int, Hashable, int]] | None = None
    """Who found that they fit a model, and their rows, their key and their bytes (``serve.intake``)."""
    binary: bool | None = None
    """Every output is to be bytes behind the JSON, and nothing else is asked of any (``rest_templates``)."""


class InferRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One inference request. Rows are axis 0 of the inputs."""

    model: str
    inputs: tuple[Tensor, ...]
    version: str | None = None
    id: str = ""
    outputs: tuple[RequestedOutput, ...] = ()
    """None given: all."""
    parameters: Parameters = msgspec.field(default_factory=dict)
    priority: int = 0
    """1 is the highest; 0: the deployment's usual one."""
    timeout_us: int = 0
    """Microseconds after its arrival from which its answer is of no use; 0: never."""
    form: Form | None = None
    """Of a head that was read before; whoever changes inputs or outputs leaves it out."""


class InferResponse(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to one request."""

    model: str
    version: str
    outputs: tuple[Tensor, ...]
    id: str = ""
    parameters: Parameters = msgspec.field(default_factory=dict)

    @property
    def form(self) -> Hashable:
        """All but its id, its parameters and the elements of its outputs: answers with the same have the same head."""
        outputs = self.outputs
        if len(outputs) == 1:  # the usual case, made faster
            (only,) = outputs
            return self.model, self.version, only.name, only.datatype, only.data.shape
        return self.model, self.version, tuple([(each.name, each.datatype, each.data.shape) for each in outputs])


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorMetadata:
    """What a model takes or gives: a name, a datatype, and a shape in which -1 is any length."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelMetadata:
    """What a client may know of a model."""

    name: str
    versions: tuple[str, ...]
    """Of servers that tell none: ()."""
    platform: str
    inputs: tuple[TensorMetadata, ...]
    outputs: tuple[TensorMetadata, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerMetadata:
    """What a client may know of a server."""

    name: str
    version: str
    extensions: tuple[str, ...]
