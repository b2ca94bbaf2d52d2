"""A tensor's elements as bytes: little-endian, row-major, views of the body; BYTES carry a length of 4 bytes each."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np

from hasten.errors import BadRequest
from hasten.protocol.json_tensors import count_of
from hasten.protocol.messages import DATATYPES, ITEM_BYTES
from hasten.tensors import DTYPES, Array

_LENGTH = struct.Struct("<I")

Buffer = bytes | bytearray | memoryview


def decode(name: str, datatype: str, shape: Sequence[int], data: memoryview) -> Array:
    """Read an array of ``shape`` from its bytes: a view of ``data``, except for BYTES.

    Raises:
        BadRequest: the bytes are more or fewer than shape and datatype say, or are no values of the datatype.
    """
    count = count_of(name, shape)
    if datatype == "BYTES":
        return _decode_bytes(name, count, data).reshape(shape)
    wanted = count * ITEM_BYTES[datatype]
    if wanted != len(data):
        raise BadRequest(f"tensor {name!r} has {len(data)} bytes; {datatype} {list(shape)} wants {wanted}")
    if datatype == "BOOL" and count and int(np.frombuffer(data, np.uint8).max()) > 1:
        raise BadRequest(f"tensor {name!r} is BOOL, and has a byte that is neither 0 nor 1")
    return np.frombuffer(data, DTYPES[DATATYPES[datatype]]).reshape(shape)


def encode(array: Array, datatype: str) -> Buffer:
    """Give an array's bytes: a view of it where it lies in row-major order."""
    if datatype == "BYTES":
        return b"".join(part for item in array.ravel().tolist() for part in (_LENGTH.pack(len(item)), item))
    if not array.size:
        return b""
    ordered = array.dtype.newbyteorder("<") if array.dtype.byteorder == ">" else array.dtype
    flat = np.ascontiguousarray(array, ordered).reshape(-1)
    return memoryview(flat.view(np.uint8).data)


def _decode_bytes(name: str, count: int, data: memoryview) -> Array:
    if len(data) < 4 * count:  # before memory is taken for so many
        raise BadRequest(
            f"tensor {name!r} has {len(data)} bytes; {count} elements of BYTES have a length of 4 bytes each"
        )
    held, at = np.empty(count, object), 0
    for index in range(count):
        if at + 4 > len(data):
            raise BadRequest(f"tensor {name!r} ends before the length of its element {index} of {count}")
        (size,) = _LENGTH.unpack_from(data, at)
        at += 4
        if at + size > len(data):
            raise BadRequest(f"element {index} of tensor {name!r} claims {size} bytes; {len(data) - at} are left")
        held[index] = bytes(data[at : at + size])
        at += size
    if at != len(data):
        raise BadRequest(f"tensor {name!r} has {len(data) - at} bytes more than its {count} elements")
    return held
