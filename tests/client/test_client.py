"""The clients against a real server on loopback: blocking and asyncio, REST and gRPC, one table of sentences."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("httptools", reason="needs the extra 'serve'")
pytest.importorskip("grpc", reason="needs the extra 'serve'")

import hasten
from client.blocking import Blocking
from hasten.errors import BadRequest, DeadlineExceeded, InvalidSetting, ModelNotFound, NoAnswer, NotAllowed
from hasten.serve.app import Listening, Open
from serve.bundles import bundle
from serve.served import CLASSES, rows_of, served

KEY = "0123456789abcdefghijk"
WAYS = ["http", "http-json", "grpc", "http-async", "http-json-async", "grpc-async"]


@pytest.fixture(scope="module", params=["fast", "library"])
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Open]:
    models = tmp_path_factory.mktemp("served") / "models"
    bundle(models / "net")
    with served(models, Listening(port=0, grpc_port=0, transport=request.param)) as found:
        yield found


def client_of(opened: Open, way: str, **more: Any) -> Any:
    url = f"grpc://{str(opened.grpc).rpartition('//')[2]}" if way.startswith("grpc") else opened.http
    kind = Blocking if way.endswith("async") else hasten.Client
    return kind(url, binary="json" not in way, **more)


@pytest.fixture(params=WAYS)
def client(request: pytest.FixtureRequest, opened: Open) -> Iterator[Any]:
    with client_of(opened, request.param) as made:
        yield made


def test_an_inference_comes_back_with_its_outputs_id_and_version(client: Any, opened: Open) -> None:
    x = rows_of(3)
    result = client.infer("net", {"x": x}, id="mine", priority=2, timeout_s=20.0)
    assert (result.model, result.version, result.id) == ("net", "1", "mine")
    (name,) = result.outputs
    assert result.outputs[name].shape == (3, CLASSES)
    assert result.outputs[name].dtype == np.float32
    alone = client.infer("net", {"x": x[:1]}, version="1", outputs=(name,))
    np.testing.assert_allclose(alone.outputs[name], result.outputs[name][:1], rtol=1e-5, atol=1e-6)


def test_the_calls_beside_inference_say_what_the_server_has(client: Any) -> None:
    assert client.ready() is True
    assert client.ready("net") is True
    metadata = client.metadata("net", version="1")
    assert (metadata.name, metadata.versions) == ("net", ("1",))
    assert [(spec.name, spec.datatype, spec.shape) for spec in metadata.inputs] == [("x", "FP32", (-1, 16))]
    before = client.statistics("net")["inference_count"]
    client.infer("net", {"x": rows_of(2)})
    after = client.statistics("net")
    assert (after["name"], after["inference_count"]) == ("net", before + 2)
    assert after["inference_stats"]["success"]["count"] > 0
    assert [(item.name, item.version, item.state) for item in client.index()] == [("net", "1", "READY")]


def test_a_refusal_is_the_error_of_its_kind_with_the_servers_text(client: Any) -> None:
    with pytest.raises(ModelNotFound, match="no model is called 'other'"):
        client.infer("other", {"x": rows_of(1)})
    with pytest.raises(ModelNotFound, match="other"):
        client.metadata("other")
    with pytest.raises(BadRequest, match="'x'"):
        client.infer("net", {"x": rows_of(1)[:, :3]})
    with pytest.raises(BadRequest, match="complex128"):
        client.infer("net", {"x": np.zeros((1, 16), complex)})
    with pytest.raises(BadRequest, match="one input or more"):
        client.infer("net", {})
    assert client.ready(), "and the connection goes on"


def test_a_model_is_unloaded_and_loaded_again(client: Any) -> None:
    client.unload("net", timeout_s=30.0)
    assert [item.state for item in client.index()] != ["READY"]
    client.load("net", timeout_s=60.0)
    assert client.ready("net")


def test_a_result_tells_its_phases_its_batch_and_its_instance(client: Any) -> None:
    result = client.infer("net", {"x": rows_of(3)})
    assert list(result.phases_ns)[:3] == ["receive", "decode", "queue"]
    assert result.phases_ns["infer"] > 0
    assert (result.batch_rows, result.instance) == (4, 0)


@pytest.mark.parametrize("way", WAYS)
def test_a_server_with_keys_wants_one(tmp_path: Path, way: str) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"{KEY}\n")
    with served(bundle(tmp_path / "net"), Listening(port=0, grpc_port=0, api_keys=keys)) as opened:
        with client_of(opened, way) as client, pytest.raises(NotAllowed, match="API key"):
            client.infer("net", {"x": rows_of(1)})
        with client_of(opened, way, api_key=KEY) as client:
            assert client.infer("net", {"x": rows_of(1)}).model == "net"


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("127.0.0.1:8000", "no address"),
        ("ftp://a", "no address"),
        ("http://", "no address"),
        ("http://a:99999", "no address"),
        ("http://user:secret@a", "more than a host and a port"),
        ("grpc://a:1/path", "more than a host and a port"),
        ("http://a b", "characters"),
    ],
)
def test_what_is_no_address_is_refused_at_once(url: str, said: str) -> None:
    for kind in (hasten.Client, hasten.AsyncClient):
        with pytest.raises(InvalidSetting, match=said) as refused:
            kind(url)
        assert "secret" not in str(refused.value)


@pytest.mark.parametrize("way", ["http", "http-async", "grpc", "grpc-async"])
def test_a_time_that_is_no_time_is_refused(opened: Open, way: str) -> None:
    with client_of(opened, way) as client, pytest.raises(InvalidSetting, match="timeout_s"):
        client.infer("net", {"x": rows_of(1)}, timeout_s=0.0)


def test_errors_of_a_silent_port_name_the_address(free_port: int) -> None:
    for way in ("http", "http-async", "grpc", "grpc-async"):
        url = f"{way.partition('-')[0]}://127.0.0.1:{free_port}"
        kind = Blocking if way.endswith("async") else hasten.Client
        with kind(url) as client, pytest.raises((NoAnswer, DeadlineExceeded), match=url):
            client.infer("net", {"x": rows_of(1)}, timeout_s=20.0)
