"""Triton's own Python clients, unchanged, against a real small deployment."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("httptools", reason="needs the extra 'serve'")
pytest.importorskip("grpc", reason="needs the extra 'serve'")
pytest.importorskip("tritonclient.http", reason="needs tritonclient[http]")
pytest.importorskip("tritonclient.grpc", reason="needs tritonclient[grpc]")

import tritonclient.grpc as over_grpc
import tritonclient.http as over_http
from tritonclient.utils import InferenceServerException

from hasten.serve.app import Listening, Open
from serve.bundles import bundle
from serve.served import CLASSES, rows_of, served


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Open]:
    models = tmp_path_factory.mktemp("served") / "models"
    bundle(models / "net")
    with served(models, Listening(port=0, grpc_port=0)) as found:
        yield found


@pytest.fixture(params=[over_http, over_grpc], ids=["http", "grpc"])
def side(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def client(opened: Open, side: Any) -> Iterator[Any]:
    place = opened.http.removeprefix("http://") if side is over_http else opened.grpc
    made = side.InferenceServerClient(place)
    yield made
    made.close()


def test_health_metadata_configuration_statistics_and_repository(client: Any, side: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("net")
    more = {} if side is over_http else {"as_json": True}
    assert client.get_server_metadata(**more)["name"] == "hasten"
    assert client.get_model_metadata("net", **more)["inputs"][0]["name"] == "x"
    config = client.get_model_config("net", **more)
    assert config.get("config", config)["name"] == "net"
    assert client.get_inference_statistics("net", **more)["model_stats"][0]["name"] == "net"
    assert client.get_model_repository_index()
    client.unload_model("net")
    client.load_model("net")


@pytest.mark.parametrize("rows", [1, 5])
def test_inference(client: Any, side: Any, rows: int) -> None:
    x = rows_of(rows)
    given = side.InferInput("x", list(x.shape), "FP32")
    given.set_data_from_numpy(x)
    y = client.infer("net", [given], request_id="r1").as_numpy("y")
    assert y.shape == (rows, CLASSES)
    named = client.infer("net", [given], outputs=[side.InferRequestedOutput("y")], timeout=5_000_000)
    np.testing.assert_allclose(named.as_numpy("y"), y, rtol=1e-5)


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_compressed_bodies_over_http(opened: Open, algorithm: str) -> None:
    client = over_http.InferenceServerClient(opened.http.removeprefix("http://"))
    given = over_http.InferInput("x", [3, 16], "FP32")
    for binary in (True, False):
        given.set_data_from_numpy(rows_of(3), binary_data=binary)
        answer = client.infer(
            "net", [given], request_compression_algorithm=algorithm, response_compression_algorithm=algorithm
        )
        assert answer.as_numpy("y").shape == (3, CLASSES)
    client.close()


def test_errors_are_told(client: Any, side: Any) -> None:
    given = side.InferInput("x", [1, 3], "FP32")
    given.set_data_from_numpy(np.zeros((1, 3), np.float32))
    with pytest.raises(InferenceServerException, match="'x'"):
        client.infer("net", [given])
    with pytest.raises(InferenceServerException, match="'nix'"):
        client.infer("nix", [given])
