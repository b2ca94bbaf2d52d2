"""Triton's own Python clients, unchanged, all four, against a real small deployment."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

pytest.importorskip("httptools", reason="needs the extra 'serve'")
pytest.importorskip("grpc", reason="needs the extra 'serve'")
pytest.importorskip("tritonclient.http", reason="needs tritonclient[http]")
pytest.importorskip("tritonclient.grpc", reason="needs tritonclient[grpc]")

import tritonclient.grpc as over_grpc
import tritonclient.grpc.aio as over_grpc_aio
import tritonclient.http as over_http
import tritonclient.http.aio as over_http_aio
from tritonclient.utils import InferenceServerException

from hasten.protocol import grpc as codec
from hasten.serve.app import Listening, Open
from serve.bundles import bundle
from serve.served import CLASSES, rows_of, served

SIDES = {"http": over_http, "grpc": over_grpc, "http.aio": over_http_aio, "grpc.aio": over_grpc_aio}


@dataclass(frozen=True)
class Side:
    """One of the four clients; ``calls`` makes a method of it, awaiting what has to be awaited."""

    name: str
    client: Any
    loop: asyncio.AbstractEventLoop

    @property
    def is_http(self) -> bool:
        return self.name.startswith("http")

    @property
    def module(self) -> Any:
        return SIDES[self.name]

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self.client, name)

        def called(*args: Any, **more: Any) -> Any:
            found = method(*args, **more)
            return self.loop.run_until_complete(found) if inspect.isawaitable(found) else found

        return called

    def json(self, name: str, *args: Any) -> Any:
        return getattr(self, name)(*args, **({} if self.is_http else {"as_json": True}))

    def given(self, rows: int = 1, features: int = 16, **more: Any) -> list[Any]:
        x = rows_of(rows) if features == 16 else np.zeros((rows, features), np.float32)
        tensor = self.module.InferInput("x", list(x.shape), "FP32")
        tensor.set_data_from_numpy(x, **more)
        return [tensor]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Open]:
    models = tmp_path_factory.mktemp("served") / "models"
    bundle(models / "net")
    with served(models, Listening(port=0, grpc_port=0)) as found:
        yield found


@pytest.fixture(params=list(SIDES))
def side(opened: Open, request: pytest.FixtureRequest) -> Iterator[Side]:
    name = request.param
    place = opened.http.removeprefix("http://") if name.startswith("http") else opened.grpc
    loop = asyncio.new_event_loop()

    async def made() -> Any:
        return SIDES[name].InferenceServerClient(place)

    side = Side(name, loop.run_until_complete(made()), loop)
    yield side
    side.close()
    loop.run_until_complete(asyncio.sleep(0))
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()


def test_health_metadata_configuration_and_statistics(side: Side) -> None:
    assert side.is_server_live()
    assert side.is_server_ready()
    assert side.is_model_ready("net")
    assert side.is_model_ready("net", "1")
    assert side.json("get_server_metadata")["name"] == "hasten"
    assert side.json("get_model_metadata", "net")["inputs"][0]["name"] == "x"
    assert side.json("get_model_metadata", "net", "1")["versions"] == ["1"]
    config = side.json("get_model_config", "net")
    assert config.get("config", config)["name"] == "net"
    assert side.json("get_inference_statistics", "net")["model_stats"][0]["name"] == "net"
    assert side.json("get_inference_statistics", "net", "1")["model_stats"][0]["version"] == "1"
    assert side.json("get_inference_statistics")["model_stats"][0]["name"] == "net"


def test_the_repository_is_told_and_its_models_loaded_and_unloaded(side: Side) -> None:
    index = side.json("get_model_repository_index")
    assert [model["state"] for model in (index if side.is_http else index["models"])] == ["READY"]
    side.unload_model("net")
    assert not side.is_model_ready("net")
    assert side.is_server_live()
    side.load_model("net")
    assert side.is_model_ready("net")


def test_a_configuration_that_comes_with_a_load_is_refused_not_dropped(side: Side) -> None:
    with pytest.raises(InferenceServerException, match="config"):
        side.load_model("net", config="{}")
    assert side.is_model_ready("net")


@pytest.mark.parametrize("rows", [1, 5])
def test_inference(side: Side, rows: int) -> None:
    answer = side.infer("net", side.given(rows), request_id="r1")
    y = answer.as_numpy("y")
    assert y.shape == (rows, CLASSES)
    response = answer.get_response()
    assert (response["id"] if side.is_http else response.id) == "r1"
    output = side.module.InferRequestedOutput("y")
    named = side.infer("net", side.given(rows), model_version="1", outputs=[output], priority=1, timeout=5_000_000)
    np.testing.assert_allclose(named.as_numpy("y"), y, rtol=1e-5)


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("wanted", [True, False])
def test_json_and_bytes_go_in_any_mixture_over_http(side: Side, given: bool, wanted: bool) -> None:
    if not side.is_http:
        pytest.skip("gRPC has raw contents alone in this client")
    output = side.module.InferRequestedOutput("y", binary_data=wanted)
    answer = side.infer("net", side.given(3, binary_data=given), outputs=[output])
    expected = side.infer("net", side.given(3)).as_numpy("y")
    np.testing.assert_allclose(answer.as_numpy("y"), expected, rtol=1e-5)


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
@pytest.mark.parametrize("binary", [True, False])
def test_compressed_bodies_over_http(side: Side, algorithm: str, binary: bool) -> None:
    if not side.is_http:
        pytest.skip("of HTTP")
    answer = side.infer(
        "net",
        side.given(3, binary_data=binary),
        request_compression_algorithm=algorithm,
        response_compression_algorithm=algorithm,
    )
    assert answer.as_numpy("y").shape == (3, CLASSES)


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_compressed_messages_over_grpc_are_answered_or_refused_with_what_is_taken(side: Side, algorithm: str) -> None:
    if side.is_http:
        pytest.skip("of gRPC")
    try:
        answer = side.infer("net", side.given(300), compression_algorithm=algorithm)
    except InferenceServerException as error:
        assert "UNIMPLEMENTED" in str(error.status())  # either is right, and says so
    else:
        assert answer.as_numpy("y").shape == (300, CLASSES)


def test_errors_are_told(side: Side) -> None:
    with pytest.raises(InferenceServerException, match="'x'"):
        side.infer("net", side.given(1, features=3))
    with pytest.raises(InferenceServerException, match="'nix'"):
        side.infer("nix", side.given())
    with pytest.raises(InferenceServerException, match="no version '7'"):
        side.infer("net", side.given(), model_version="7")
    with pytest.raises(InferenceServerException, match="'z'"):
        side.infer("net", side.given(), outputs=[side.module.InferRequestedOutput("z")])
    with pytest.raises(InferenceServerException, match="'nix'"):
        side.get_model_metadata("nix")


def test_a_time_limit_that_is_over_is_told(side: Side) -> None:
    with pytest.raises(InferenceServerException, match="time"):
        side.infer("net", side.given(), timeout=1)


def test_what_this_server_does_not_do_is_refused(side: Side) -> None:
    with pytest.raises(InferenceServerException):
        side.register_system_shared_memory("a", "/nix", 64)
    with pytest.raises(InferenceServerException):
        side.update_log_settings({"log_info": True})


def test_a_stream_of_requests_is_unimplemented(opened: Open) -> None:
    told: list[Any] = []
    with over_grpc.InferenceServerClient(opened.grpc) as client:
        client.start_stream(lambda result, error: told.append(error))
        given = over_grpc.InferInput("x", [1, 16], "FP32")
        given.set_data_from_numpy(rows_of(1))
        with contextlib.suppress(InferenceServerException):  # the stream may have been refused by now
            client.async_stream_infer("net", [given])
        client.stop_stream()
    assert told
    assert all("UNIMPLEMENTED" in str(error.status()) for error in told)


def test_many_calls_of_asynchronous_clients_at_once_each_get_their_own_rows(opened: Open) -> None:
    async def ask(client: Any, module: Any, n: int) -> Any:
        given = module.InferInput("x", [1, 16], "FP32")
        given.set_data_from_numpy(rows_of(1, seed=n))
        return (await client.infer("net", [given])).as_numpy("y")

    async def work() -> None:
        http = over_http_aio.InferenceServerClient(opened.http.removeprefix("http://"))
        grpc = over_grpc_aio.InferenceServerClient(opened.grpc)
        async with http, grpc:
            sides = ((http, over_http_aio), (grpc, over_grpc_aio))
            each = [await asyncio.gather(*(ask(client, module, n) for n in range(50))) for client, module in sides]
        np.testing.assert_allclose(each[0], each[1], rtol=1e-4, atol=1e-5)
        assert len({answer.tobytes() for answer in each[0]}) == 50

    asyncio.run(work())


def test_its_messages_and_ours_live_in_one_process() -> None:
    assert codec.message("ModelInferRequest") is not over_grpc.service_pb2.ModelInferRequest
