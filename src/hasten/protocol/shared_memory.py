"""Tensors in shared memory: where a message says that one lies, and what a codec asks of the regions.

The extension: Triton's "system shared memory". A client has written an input there, or wants an output there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from hasten.errors import BadRequest, TooLarge
from hasten.protocol import binary_tensors, json_tensors
from hasten.protocol.binary_tensors import Buffer
from hasten.protocol.messages import ITEM_BYTES, InferRequest, InferResponse, Parameters
from hasten.tensors import Array

REGION, OFFSET, SIZE = "shared_memory_region", "shared_memory_offset", "shared_memory_byte_size"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor lies: bytes of a registered region."""

    region: str
    offset: int
    """Bytes from the region's beginning."""
    size_bytes: int


class Regions(Protocol):
    """The regions that clients have registered with a server."""

    @property
    def largest_bytes(self) -> int:
        """The most that one message may have there."""

    def read(self, place: Place) -> memoryview:
        """Give a copy of what lies there: a client that writes on changes nothing of it. Raises BadRequest."""

    def write(self, place: Place, data: Buffer) -> None:
        """Write there. Raises BadRequest: it is too small."""


def place_of(parameters: Parameters, where: str) -> Place | None:
    """Read a tensor's place from its parameters; None: it lies in the message.

    Raises:
        BadRequest: the parameters are incomplete or no place.
    """
    region, offset, size = parameters.get(REGION), parameters.get(OFFSET, 0), parameters.get(SIZE)
    if region is None:
        if OFFSET in parameters or SIZE in parameters:
            raise BadRequest(f"{where} has {SIZE if SIZE in parameters else OFFSET}, and no {REGION}")
        return None
    if not isinstance(region, str) or not region:
        raise BadRequest(f"{where} has {REGION} = {region!r}; it is the name of a region")
    for name, value in ((SIZE, size), (OFFSET, offset)):
        if type(value) is not int or not 0 <= value < 2**62:
            raise BadRequest(f"{where} has {name} = {value!r}; it is a number of bytes")
    return Place(region, int(offset), int(size or 0))


def places_of(said: Iterable[tuple[str, Parameters]], kind: str, regions: Regions) -> dict[str, Place]:
    """Give the places of tensors, by name, before anything is read.

    Raises:
        BadRequest: a place is none, or a name is there twice. TooLarge: all of them together are over the limit.
    """
    found: dict[str, Place] = {}
    for name, parameters in said:
        place = place_of(parameters, f"{kind} {name!r}")
        if place is not None:
            if name in found:
                raise BadRequest(f"{kind} {name!r} is there twice")
            found[name] = place
    total = sum(place.size_bytes for place in found.values())
    if total > regions.largest_bytes:
        raise TooLarge(f"the {kind}s have {total} bytes in shared memory; the limit is {regions.largest_bytes}")
    return found


def read_tensor(name: str, described: tuple[str, Sequence[int]], place: Place, regions: Regions) -> Array:
    """Read a tensor of (datatype, shape); its bytes are counted before they are read. Raises BadRequest."""
    datatype, shape = described
    count = json_tensors.count_of(name, shape)
    if datatype != "BYTES" and ITEM_BYTES[datatype] * count != place.size_bytes:
        raise BadRequest(
            f"tensor {name!r} has {place.size_bytes} bytes in shared memory; {datatype} {list(shape)} wants "
            f"{ITEM_BYTES[datatype] * count}"
        )
    return binary_tensors.decode(name, datatype, shape, regions.read(place))


def put_outputs(response: InferResponse, request: InferRequest, regions: Regions) -> dict[str, Parameters]:
    """Write the outputs that were asked for there; gives the parameters that tell where each is, by name.

    Raises:
        BadRequest: a place is too small, or gone.
    """
    places = {output.name: place_of(output.parameters, f"output {output.name!r}") for output in request.outputs}
    put: dict[str, Parameters] = {}
    for tensor in response.outputs:
        place = places.get(tensor.name)
        if place is not None:
            data = binary_tensors.encode(tensor.data, tensor.datatype)
            regions.write(place, data)
            put[tensor.name] = {REGION: place.region, OFFSET: place.offset, SIZE: len(data)}
    return put
