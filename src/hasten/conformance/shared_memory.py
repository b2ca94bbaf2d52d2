"""REST: tensors in shared memory, the extension ``system_shared_memory``. The whole of it only on the same machine."""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import Iterator
from multiprocessing.shared_memory import SharedMemory
from typing import Any

from hasten.conformance.check import Skipped, check, some_rows
from hasten.conformance.inputs import FORMATS, fits, unpacked
from hasten.conformance.rest_infer import asking
from hasten.conformance.server import Server, encoded
from hasten.conformance.wire import error_told, met, status_is, typed

SHARED, WORD = "Shared memory", "system_shared_memory"
ROOT = "/v2/systemsharedmemory"
REGION = "conformance"


@contextlib.contextmanager
def _region(server: Server, data: bytes) -> Iterator[memoryview]:
    """Make a region with data in its first half, registered. Raises Skipped: the server is on another machine."""
    if server.http.host not in ("127.0.0.1", "::1", "localhost"):
        raise Skipped("the server is on another machine, which has other memory")
    size = max(4096, 2 * len(data))
    memory = SharedMemory(f"hasten-conformance-{secrets.token_hex(8)}", create=True, size=2 * size)
    try:
        held = memory.buf or memoryview(bytearray())
        held[: len(data)] = data
        body = {"key": f"/{memory.name.lstrip('/')}", "offset": 0, "byte_size": 2 * size}
        status_is(server.http.post(f"{ROOT}/region/{REGION}/register", encoded(body)), 200)
        try:
            yield held
        finally:
            status_is(server.http.post(f"{ROOT}/region/{REGION}/unregister", b""), 200)
    finally:
        memory.close()
        memory.unlink()


@check(SHARED, "System Shared Memory: Status", extension=WORD)
def shared_memory_status(server: Server) -> None:
    """GET /v2/systemsharedmemory/status lists the regions."""
    typed(status_is(server.http.get(f"{ROOT}/status"), 200).json(), list, "the list of regions")


@check(SHARED, "System Shared Memory: Register, Status, Unregister", extension=WORD)
def shared_memory_register(server: Server) -> None:
    """A region that is registered is told with its ``key``, ``offset`` and ``byte_size``, and gone after unregister."""

    def names() -> list[Any]:
        listed = typed(status_is(server.http.get(f"{ROOT}/status"), 200).json(), list, "the list of regions")
        return [typed(entry, dict, "a region").get("name") for entry in listed]

    with _region(server, b"\0" * 64):
        met(REGION in names(), f"the regions are {names()} after {REGION!r} was registered")
        one = typed(status_is(server.http.get(f"{ROOT}/region/{REGION}/status"), 200).json(), list, "the region")
        for word in ("key", "offset", "byte_size"):
            met(bool(one) and word in typed(one[0], dict, "the region"), f"the region is told without {word}")
    met(REGION not in names(), "the region is still there after it was unregistered")


@check(SHARED, "Shared-Memory Extension", extension=WORD)
def shared_memory_inference(server: Server) -> None:
    """An input is read from a region, and an output written there, with ``shared_memory_byte_size`` in the answer."""
    tensors = some_rows(server)
    outputs = [spec for spec in server.model.outputs if spec.datatype in FORMATS]
    if not outputs:
        raise Skipped("no output has a datatype of a fixed size")
    data = tensors[0].raw()
    with _region(server, data) as memory:
        half = len(memory) // 2
        place = {"shared_memory_region": REGION, "shared_memory_offset": 0, "shared_memory_byte_size": len(data)}
        request = asking(tensors)
        del request["inputs"][0]["data"]
        request["inputs"][0]["parameters"] = place
        there = {"shared_memory_region": REGION, "shared_memory_offset": half, "shared_memory_byte_size": half}
        request["outputs"] = [{"name": outputs[0].name, "parameters": there}]
        said = status_is(server.infer(request), 200).object()
        listed = typed(said.get("outputs"), list, "outputs")
        met(len(listed) == 1, f"there are {len(listed)} outputs; one was asked for")
        entry = typed(listed[0], dict, "an output")
        met("data" not in entry, "the output is in the body, though shared memory was asked for")
        shape = tuple(typed(n, int, "a length") for n in typed(entry.get("shape"), list, "shape"))
        met(fits(shape, outputs[0]), f"the output has the shape {list(shape)}")
        parameters = typed(entry.get("parameters"), dict, "parameters of the output")
        size = typed(parameters.get("shared_memory_byte_size"), int, "shared_memory_byte_size of the output")
        unpacked(outputs[0].name, outputs[0].datatype, shape, bytes(memory[half : half + size]))


@check(SHARED, "System Shared Memory: Register", extension=WORD)
def shared_memory_of_nothing(server: Server) -> None:
    """Registering a key under which there is no memory is an error that is told."""
    body = encoded({"key": f"/no-such-memory-{secrets.token_hex(4)}", "offset": 0, "byte_size": 64})
    error_told(server.http.post(f"{ROOT}/region/{REGION}/register", body))


@check(SHARED, "System Shared Memory: Register", extension=WORD)
def shared_memory_keys_are_no_paths(server: Server) -> None:
    """A key that leads out of shared memory is an error that is told."""
    for key in ("/../etc/passwd", "../../etc/passwd", "/etc/passwd"):
        body = encoded({"key": key, "offset": 0, "byte_size": 16})
        error_told(server.http.post(f"{ROOT}/region/{REGION}/register", body))


@check(SHARED, "Shared-Memory Extension", extension=WORD)
def shared_memory_that_is_not_registered(server: Server) -> None:
    """An input in a region that nobody registered is an error that is told."""
    tensors = some_rows(server)
    request = json.loads(encoded(asking(tensors)))
    del request["inputs"][0]["data"]
    size = len(tensors[0].raw())
    request["inputs"][0]["parameters"] = {"shared_memory_region": "nobody", "shared_memory_byte_size": size}
    error_told(server.infer(request))
