"""curl against every call: what the documentation shows, typed by hand."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("httptools", reason="needs the extra 'serve'")
pytest.importorskip("grpc", reason="needs the extra 'serve'")
if shutil.which("curl") is None:
    pytest.skip("curl is not installed here", allow_module_level=True)

from hasten.serve.app import Listening, Open
from serve.bundles import bundle
from serve.served import CLASSES, infer_body, rows_of, served

INFER = "/v2/models/net/infer"


@pytest.fixture(scope="module", params=["fast", "library"])
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Open]:
    models = tmp_path_factory.mktemp("served") / "models"
    bundle(models / "net")
    with served(models, Listening(port=0, grpc_port=None, transport=request.param)) as found:
        yield found


def curl(opened: Open, path: str, *options: str, body: bytes | None = None) -> tuple[int, dict[str, str], bytes]:
    """Give status, headers and body; ``body`` goes in by standard input."""
    command = ["curl", "-sS", "-D", "/dev/stderr", opened.http + path, *options]
    if body is not None:
        command += ["--data-binary", "@-"]
    done = subprocess.run(command, input=body, capture_output=True, check=True, timeout=60)
    last = done.stderr.decode().rstrip().split("\r\n\r\n")[-1].split("\r\n")  # behind a 100 Continue
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in last[1:])}
    return int(last[0].split()[1]), headers, done.stdout


def outputs(body: bytes) -> np.ndarray[Any, Any]:
    (y,) = json.loads(body)["outputs"]
    return np.array(y["data"], np.float32).reshape(y["shape"])


@pytest.fixture(scope="module")
def right(opened: Open) -> np.ndarray[Any, Any]:
    return outputs(curl(opened, INFER, body=infer_body(rows_of(3)))[2])


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("/v2/health/live", {"live": True}),
        ("/v2/health/ready", {"ready": True, "live": True}),
        ("/v2/models/net/ready", {"name": "net", "ready": True}),
        ("/v2/models/net/versions/1/ready", {"name": "net", "ready": True}),
    ],
)
def test_health(opened: Open, path: str, says: dict[str, Any]) -> None:
    status, _, body = curl(opened, path)
    assert (status, json.loads(body)) == (200, says)


def test_metadata_configuration_and_statistics(opened: Open) -> None:
    for path, key in (
        ("/v2", "extensions"),
        ("/v2/", "extensions"),
        ("/v2/models/net", "inputs"),
        ("/v2/models/net/versions/1", "inputs"),
        ("/v2/models/net/config", "max_batch_size"),
        ("/v2/models/net/stats", "model_stats"),
        ("/v2/models/stats", "model_stats"),
        ("/openapi.json", "paths"),
    ):
        status, _, body = curl(opened, path)
        assert (status, key in json.loads(body)) == (200, True), path
    assert b"hasten_request_seconds" in curl(opened, "/metrics")[2]


def test_json_in_and_out_with_an_id_and_a_version(opened: Open, right: np.ndarray[Any, Any]) -> None:
    body = infer_body(rows_of(3), id="mine", parameters={"priority": 1, "timeout": 5_000_000})
    status, headers, answer = curl(opened, "/v2/models/net/versions/1/infer", body=body)
    assert (status, headers["content-type"]) == (200, "application/json")
    assert json.loads(answer)["id"] == "mine"
    np.testing.assert_allclose(outputs(answer), right, rtol=1e-5)


def test_bytes_behind_the_json_both_ways(opened: Open, right: np.ndarray[Any, Any]) -> None:
    x = rows_of(3)
    head = json.dumps({
        "inputs": [{"name": "x", "shape": [3, 16], "datatype": "FP32", "parameters": {"binary_data_size": x.nbytes}}],
        "parameters": {"binary_data_output": True},
    }).encode()  # fmt: skip
    lines = ("-H", f"Inference-Header-Content-Length: {len(head)}", "-H", "Content-Type: application/octet-stream")
    status, headers, answer = curl(opened, INFER, *lines, body=head + x.tobytes())
    assert status == 200
    y = np.frombuffer(answer, np.float32, offset=int(headers["inference-header-content-length"])).reshape(3, CLASSES)
    np.testing.assert_allclose(y, right, rtol=1e-5)


def test_raw_bytes_alone(opened: Open, right: np.ndarray[Any, Any]) -> None:
    lines = ("-H", "Inference-Header-Content-Length: 0", "-H", "Content-Type: application/octet-stream")
    status, headers, answer = curl(opened, INFER, *lines, body=rows_of(3)[:1].tobytes())
    assert status == 200, answer
    y = np.frombuffer(answer, np.float32, offset=int(headers["inference-header-content-length"])).reshape(1, CLASSES)
    np.testing.assert_allclose(y, right[:1], rtol=1e-5)


def test_gzip_both_ways_and_chunks(opened: Open, right: np.ndarray[Any, Any], tmp_path: Path) -> None:
    packed = subprocess.run(["gzip", "-c"], input=infer_body(rows_of(3)), capture_output=True, check=True).stdout
    status, _, answer = curl(opened, INFER, "-H", "Content-Encoding: gzip", "--compressed", body=packed)
    assert status == 200
    np.testing.assert_allclose(outputs(answer), right, rtol=1e-5)
    status, _, answer = curl(opened, INFER, "-H", "Transfer-Encoding: chunked", body=infer_body(rows_of(3)))
    assert status == 200
    np.testing.assert_allclose(outputs(answer), right, rtol=1e-5)


def test_a_large_body_that_asks_first(opened: Open) -> None:
    body = infer_body(np.tile(rows_of(8), (400, 1)))
    status, _, answer = curl(opened, INFER, "-H", "Expect: 100-continue", body=body)
    assert status == 200
    assert outputs(answer).shape == (3200, CLASSES)


def test_the_repository(opened: Open) -> None:
    status, _, body = curl(opened, "/v2/repository/index", "-X", "POST")
    assert (status, [model["state"] for model in json.loads(body)]) == (200, ["READY"])
    assert curl(opened, "/v2/repository/models/net/unload", "-X", "POST")[0] == 200
    status, headers, body = curl(opened, INFER, body=infer_body(rows_of(1)))
    assert (status, headers["retry-after"]) == (503, "1")
    back = b'{"parameters": {"version": "1"}}'
    assert curl(opened, "/v2/repository/models/net/load", body=back)[0] == 200
    status, _, body = curl(opened, "/v2/repository/models/net/load", body=b'{"parameters": {"version": "9"}}')
    assert (status, "no version '9'" in json.loads(body)["error"]) == (404, True)
    assert curl(opened, INFER, body=infer_body(rows_of(1)))[0] == 200


@pytest.mark.parametrize(
    ("path", "options", "body", "wanted"),
    [
        ("/v2/models/nix/infer", (), infer_body(rows_of(1)), 404),
        ("/v2/nix", (), None, 404),
        (INFER, (), b"{", 400),
        (INFER, (), infer_body(np.zeros((1, 3), np.float32)), 400),
        (INFER, ("-X", "PUT"), b"{}", 405),
        (INFER, ("-H", "Inference-Header-Content-Length: 99999"), b"{}", 400),
        (INFER, ("-H", "Content-Encoding: br"), b"{}", 400),
        (INFER, (), infer_body(rows_of(1), parameters={"timeout": 1}), 504),
    ],
)
def test_errors_are_json_with_their_status(
    opened: Open, path: str, options: tuple[str, ...], body: bytes | None, wanted: int
) -> None:
    status, headers, answer = curl(opened, path, *options, body=body)
    assert (status, headers["content-type"]) == (wanted, "application/json")
    assert set(json.loads(answer)) == {"error"}
