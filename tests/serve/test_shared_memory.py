"""Tensors in shared memory that clients name: by Triton's own client, by hand, and by those who mean no good."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from multiprocessing.shared_memory import SharedMemory as Block
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("httptools", reason="needs the extra 'serve'")
pytest.importorskip("grpc", reason="needs the extra 'serve'")

from hasten.errors import BadRequest
from hasten.protocol.shared_memory import Place
from hasten.serve.app import Listening, Open
from hasten.serve.limits import Limits
from hasten.serve.shared_memory import FOLDER, MOST_REGIONS, SharedMemory
from serve.bundles import bundle
from serve.served import CLASSES, FEATURES, call, infer_body, rows_of, served

ROOT = "/v2/systemsharedmemory"
INFER = "/v2/models/net/infer"


@pytest.fixture(scope="module", params=["fast", "library"])
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Open]:
    models = tmp_path_factory.mktemp("shared") / "models"
    bundle(models / "net")
    limits = Limits(body_bytes=2**20)
    with served(
        models, Listening(port=0, grpc_port=0, transport=request.param, shared_memory=True, limits=limits)
    ) as found:
        yield found


@pytest.fixture
def block() -> Iterator[Block]:
    made = Block(create=True, size=64 * 2**10)
    yield made
    made.close()
    made.unlink()


def ask(opened: Open, verb: str, path: str, body: Any = None) -> tuple[int, Any]:
    status, _, data = call(opened.http, verb, path, None if body is None else json.dumps(body).encode())
    return status, json.loads(data)


@pytest.fixture
def region(opened: Open, block: Block) -> Iterator[str]:
    body = {"key": f"/{block.name}", "offset": 4096, "byte_size": 32 * 2**10}
    assert ask(opened, "POST", f"{ROOT}/region/r/register", body) == (200, {})
    yield "r"
    assert ask(opened, "POST", f"{ROOT}/region/r/unregister")[0] == 200


def place(region: str, offset: int, size: int) -> dict[str, Any]:
    return {"shared_memory_region": region, "shared_memory_offset": offset, "shared_memory_byte_size": size}


def request(x: dict[str, Any], y: dict[str, Any] | None = None, **changed: Any) -> dict[str, Any]:
    given = {"name": "x", "datatype": "FP32", "shape": [2, FEATURES], "parameters": x} | changed
    return {"inputs": [given]} | ({} if y is None else {"outputs": [{"name": "y", "parameters": y}]})


def test_an_input_is_read_and_an_output_written_where_the_client_says(opened: Open, block: Block, region: str) -> None:
    x = rows_of(2)
    block.buf[4096 + 64 : 4096 + 64 + x.nbytes] = x.tobytes()
    status, told = ask(opened, "POST", INFER, request(place(region, 64, x.nbytes), place(region, 8192, 4096)))
    assert status == 200, told
    (output,) = told["outputs"]
    assert "data" not in output
    assert output["parameters"] == place(region, 8192, 2 * CLASSES * 4)
    got = np.frombuffer(bytes(block.buf[4096 + 8192 : 4096 + 8192 + 2 * CLASSES * 4]), np.float32)
    _, plain = ask(opened, "POST", INFER, json.loads(infer_body(x)))
    np.testing.assert_allclose(got, plain["outputs"][0]["data"], rtol=1e-5)


def test_what_is_registered_is_told_and_forgotten(opened: Open, block: Block, region: str) -> None:
    (told,) = ask(opened, "GET", f"{ROOT}/status")[1]
    assert told == {"name": "r", "key": f"/{block.name}", "offset": 4096, "byte_size": 32 * 2**10}
    assert ask(opened, "GET", f"{ROOT}/region/r/status") == (200, [told])
    assert "system_shared_memory" in ask(opened, "GET", "/v2")[1]["extensions"]
    assert ask(opened, "POST", f"{ROOT}/unregister")[0] == 200
    assert ask(opened, "GET", f"{ROOT}/status") == (200, [])


KEYS = ["../etc/passwd", "/../etc/passwd", "/etc/passwd", "..", "/", "", "a/b", "a\0b", "//double", "x" * 300, "ä"]


@pytest.mark.parametrize("key", KEYS)
def test_a_key_is_a_name_and_no_path(opened: Open, key: str) -> None:
    status, told = ask(opened, "POST", f"{ROOT}/region/r/register", {"key": key, "offset": 0, "byte_size": 1})
    assert status == 400
    assert "no key of shared memory" in told["error"]


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"key": "/no-such-block-here"}, "cannot be opened"),
        ({"byte_size": 2**40}, "the region ends at"),
        ({"offset": 64 * 2**10}, "the region ends at"),
        ({"offset": -1}, "offset -1"),
        ({"byte_size": 0}, "a byte or more"),
        ({"byte_size": "8"}, "is not what this call takes"),
        ({"offset": 2**63}, "offset"),
        ({"unknown": 1}, "is not what this call takes"),
    ],
)
def test_a_region_that_cannot_be_is_refused(opened: Open, block: Block, changed: dict[str, Any], says: str) -> None:
    body = {"key": block.name, "offset": 0, "byte_size": 16} | changed
    status, told = ask(opened, "POST", f"{ROOT}/region/q/register", body)
    assert status == 400
    assert says in told["error"]
    assert ask(opened, "GET", f"{ROOT}/region/q/status")[0] == 400


SIZE = 2 * FEATURES * 4
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a region that is not there": (request(place("nobody", 0, SIZE)), "no region is registered as 'nobody'"),
    "more than the region has": (request(place("r", 32 * 2**10 - 8, SIZE)), "has 32768 bytes"),
    "a size that is not the shape's": (request(place("r", 0, SIZE - 4)), "wants 128"),
    "a negative offset": (request(place("r", -4, SIZE)), "is a number of bytes"),
    "a huge size": (request(place("r", 0, 2**61), shape=[2**40, 2**20]), "the limit is"),
    "a size as text": (request(place("r", 0, SIZE) | {"shared_memory_byte_size": "128"}), "is a number of bytes"),
    "no size": (request({"shared_memory_region": "r"}), "is a number of bytes"),
    "no region": (request({"shared_memory_byte_size": SIZE}), "and no shared_memory_region"),
    "data as well": (request(place("r", 0, SIZE), data=[0.0] * 2 * FEATURES), "give one"),
    "an output that does not fit": (request(place("r", 0, SIZE), place("r", 0, 8)), "does not fit its 8 bytes"),
    "an output beyond the region": (request(place("r", 0, SIZE), place("r", 2**15, 64)), "has 32768 bytes"),
    "an input twice": (
        {"inputs": request(place("r", 0, SIZE))["inputs"] * 2},
        "is there twice",
    ),
    "many inputs of one piece": (
        {
            "inputs": [
                {"name": f"x{n}", "datatype": "UINT8", "shape": [2**15], "parameters": place("r", 0, 2**15)}
                for n in range(100)
            ]
        },
        "the limit is 1048576",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_place_that_cannot_be_is_told(opened: Open, region: str, case: str) -> None:
    body, says = WRONG[case]
    status, told = ask(opened, "POST", INFER, body)
    assert status == (413 if "the limit is" in says else 400)
    assert says in told["error"]
    assert call(opened.http, "POST", INFER, infer_body(rows_of(1)))[0] == 200


def test_a_block_that_its_client_cuts_short_harms_nobody(opened: Open, block: Block, region: str) -> None:
    os.truncate(FOLDER / block.name, 4096)
    for body in (request(place(region, 0, SIZE)), json.loads(infer_body(rows_of(2)))):
        if "data" in body["inputs"][0]:
            body["outputs"] = [{"name": "y", "parameters": place(region, 0, 4096)}]
        status, told = ask(opened, "POST", INFER, body)
        assert status == 400
        assert "smaller than it was" in told["error"]
    assert (FOLDER / block.name).stat().st_size == 4096
    os.truncate(FOLDER / block.name, 64 * 2**10)


def test_memory_that_cannot_be_written_is_told_and_the_client_does_not_wait(
    opened: Open, block: Block, region: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file with holes, and no memory left to fill them."""

    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    body = json.loads(infer_body(rows_of(2)))
    place = {"shared_memory_region": region, "shared_memory_byte_size": 1024}
    body["outputs"] = [{"name": "y", "parameters": place}]
    monkeypatch.setattr(os, "pwrite", full)
    status, said = ask(opened, "POST", INFER, body)
    assert status == 400
    assert "cannot be written: No space left on device" in said["error"]


def test_without_the_setting_nothing_is_registered(tmp_path: Path, block: Block) -> None:
    with served(bundle(tmp_path / "net"), Listening(port=0, grpc_port=None)) as opened:
        body = {"key": block.name, "offset": 0, "byte_size": 16}
        status, told = ask(opened, "POST", f"{ROOT}/region/r/register", body)
        assert (status, "--shared-memory" in told["error"]) == (400, True)
        assert ask(opened, "GET", f"{ROOT}/status") == (200, [])
        assert ask(opened, "POST", f"{ROOT}/unregister") == (200, {})
        assert "system_shared_memory" not in ask(opened, "GET", "/v2")[1]["extensions"]
        status, told = ask(opened, "POST", INFER, request(place("r", 0, SIZE)))
        assert (status, "shared memory is not enabled" in told["error"]) == (400, True)


def test_regions_are_bounded_and_what_is_no_plain_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "block").write_bytes(b"\0" * 64)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "block")
    (tmp_path / "folder").mkdir()
    held = SharedMemory(largest_bytes=64, folder=tmp_path)
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "socket"))
        for key in ("pipe", "link", "folder", "socket"):
            with pytest.raises(BadRequest, match=f"{key}"):
                held.register("r", key, offset=0, size_bytes=1)
    for n in range(MOST_REGIONS):
        held.register(f"r{n}", "block", offset=n % 60, size_bytes=4)
    with pytest.raises(BadRequest, match="the limit"):
        held.register("more", "block", offset=0, size_bytes=4)
    with pytest.raises(BadRequest, match="registered already"):
        held.register("r0", "block", offset=0, size_bytes=4)
    held.write(Place("r0", 0, 4), b"abcd")
    assert bytes(held.read(Place("r0", 0, 4))) == b"abcd"
    before = len([*Path("/proc/self/fd").iterdir()])
    held.unregister(None)
    assert len([*Path("/proc/self/fd").iterdir()]) == before - MOST_REGIONS
    assert held.status(None) == []


@pytest.mark.parametrize("side", ["http", "grpc"])
def test_tritons_own_client_hands_tensors_over(opened: Open, side: str) -> None:
    pytest.importorskip(f"tritonclient.{side}", reason=f"needs tritonclient[{side}]")
    import importlib

    from tritonclient.utils import shared_memory as shm

    triton = importlib.import_module(f"tritonclient.{side}")
    client = triton.InferenceServerClient(opened.http.removeprefix("http://") if side == "http" else opened.grpc)
    x = rows_of(3)
    out_bytes = 3 * CLASSES * 4
    handle = shm.create_shared_memory_region("region", f"/hasten_test_{os.getpid()}", x.nbytes + out_bytes)
    try:
        shm.set_shared_memory_region(handle, [x])
        client.unregister_system_shared_memory()
        client.register_system_shared_memory("region", f"/hasten_test_{os.getpid()}", x.nbytes + out_bytes)
        status = client.get_system_shared_memory_status(**({"as_json": True} if side == "grpc" else {}))
        assert len(status["regions"] if side == "grpc" else status) == 1
        given = triton.InferInput("x", list(x.shape), "FP32")
        given.set_shared_memory("region", x.nbytes)
        wanted = triton.InferRequestedOutput("y")
        wanted.set_shared_memory("region", out_bytes, offset=x.nbytes)
        result = client.infer("net", [given], outputs=[wanted])
        output = result.get_output("y")
        shape = output["shape"] if side == "http" else list(output.shape)
        got = shm.get_contents_as_numpy(handle, np.float32, shape, offset=x.nbytes)
        given.set_data_from_numpy(x)
        plain = client.infer("net", [given]).as_numpy("y")
        np.testing.assert_allclose(got, plain, rtol=1e-5)
        del got
        client.unregister_system_shared_memory("region")
    finally:
        shm.destroy_shared_memory_region(handle)
        client.close()
