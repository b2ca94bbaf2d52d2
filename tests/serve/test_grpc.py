"""gRPC through both transports, called by grpcio's own client, without any generated code."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("httptools", reason="needs the extra 'serve'")
pytest.importorskip("grpc", reason="needs the extra 'serve'")

import grpc
import grpc.aio

from hasten.protocol import grpc as codec
from hasten.serve import grpc_side as side
from hasten.serve.app import Listening, Open, Transport, open_app
from serve.bundles import bundle
from serve.served import CLASSES, rows_of, served
from serve.wire import run, within

SERVICE = "/inference.GRPCInferenceService/"


@pytest.fixture(scope="module", params=["fast", "library"])
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Open]:
    models = tmp_path_factory.mktemp("served") / "models"
    bundle(models / "net")
    with served(models, Listening(port=0, grpc_port=0, transport=request.param)) as found:
        yield found


@pytest.fixture
def channel(opened: Open) -> Iterator[Any]:
    assert opened.grpc is not None
    with grpc.insecure_channel(opened.grpc, options=[("grpc.max_receive_message_length", -1)]) as made:
        yield made


def ask(channel: Any, call: str, **fields: Any) -> Any:
    asked = codec.message(f"{call}Request")(**fields).SerializeToString()
    data = channel.unary_unary(SERVICE + call)(asked, timeout=30)
    return codec.message(f"{call}Response").FromString(data)


def test_every_small_call_answers(channel: Any) -> None:
    assert ask(channel, "ServerLive").live
    assert ask(channel, "ServerReady").ready
    assert ask(channel, "ModelReady", name="net").ready
    assert ask(channel, "ServerMetadata").name == "hasten"
    (given,) = ask(channel, "ModelMetadata", name="net").inputs
    assert (given.name, given.datatype, list(given.shape)) == ("x", "FP32", [-1, 16])
    assert ask(channel, "ModelConfig", name="net").config.name == "net"
    assert ask(channel, "ModelStatistics", name="net").model_stats[0].name == "net"
    assert [model.state for model in ask(channel, "RepositoryIndex").models] == ["READY"]
    ask(channel, "RepositoryModelLoad", model_name="net")


@pytest.mark.parametrize("rows", [1, 7])
def test_an_inference_gives_raw_contents_where_it_was_asked_in_raw_contents(channel: Any, rows: int) -> None:
    x = rows_of(rows)
    answer = ask(
        channel,
        "ModelInfer",
        model_name="net",
        id="a7",
        inputs=[{"name": "x", "datatype": "FP32", "shape": list(x.shape)}],
        raw_input_contents=[x.tobytes()],
    )
    assert (answer.model_name, answer.id, list(answer.outputs[0].shape)) == ("net", "a7", [rows, CLASSES])
    assert np.isfinite(np.frombuffer(answer.raw_output_contents[0], np.float32)).all()


REFUSED = {
    "an unknown model": ("ModelMetadata", {"name": "nix"}, grpc.StatusCode.NOT_FOUND),
    "an unknown version": ("ModelMetadata", {"name": "net", "version": "9"}, grpc.StatusCode.NOT_FOUND),
    "an inference of an unknown model": ("ModelInfer", {"model_name": "nix"}, grpc.StatusCode.NOT_FOUND),
    "an inference without inputs": ("ModelInfer", {"model_name": "net"}, grpc.StatusCode.INVALID_ARGUMENT),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_has_its_own_status(channel: Any, case: str) -> None:
    call, fields, wanted = REFUSED[case]
    with pytest.raises(grpc.RpcError) as caught:
        ask(channel, call, **fields)
    assert caught.value.code() == wanted
    assert caught.value.details()


@pytest.mark.parametrize("call", ["ModelInfer", "ModelMetadata"])
def test_bytes_that_are_no_message_are_the_clients_fault(channel: Any, call: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary(SERVICE + call)(b"\xff\xff\xff\xff", timeout=30)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


@settings(max_examples=100, deadline=None)
@given(
    st.binary(max_size=60),
    st.lists(
        st.fixed_dictionaries(
            {},
            optional={
                "name": st.sampled_from(["x", "y", ""]),
                "datatype": st.sampled_from(["FP32", "BF16", "BYTES", "INT64", "BOOL", "FP33", ""]),
                "shape": st.one_of(st.just([1, 16]), st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4)),
            },
        ),
        max_size=3,
    ),
    st.lists(st.one_of(st.binary(max_size=70), st.just(b"\x00" * 64)), max_size=3),
)
def test_no_message_at_all_brings_out_an_internal_error(
    opened: Open, noise: bytes, inputs: list[dict[str, Any]], raw: list[bytes]
) -> None:
    built = codec.message("ModelInferRequest")(model_name="net", inputs=inputs, raw_input_contents=raw)
    with grpc.insecure_channel(str(opened.grpc)) as channel:
        for data in (noise, built.SerializeToString(), built.SerializeToString() + noise):
            try:
                channel.unary_unary(SERVICE + "ModelInfer")(data, timeout=30)
            except grpc.RpcError as error:
                assert error.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND), error


@pytest.mark.parametrize("transport", ["fast", "library"])
def test_a_server_that_ends_does_not_wait_for_who_watches_its_health(tmp_path: Path, transport: Transport) -> None:
    async def test() -> None:
        bundle(tmp_path / "net")
        listening = Listening(port=0, grpc_port=0, finish_s=1000.0, transport=transport)
        async with contextlib.AsyncExitStack() as stack:
            app = await stack.enter_async_context(open_app(tmp_path / "net", listening))
            async with grpc.aio.insecure_channel(str(app.grpc)) as channel:
                watch = channel.unary_stream("/grpc.health.v1.Health/Watch")(b"", timeout=30)
                assert await within(watch.read()) == side.health_reply(side.SERVING)
                ending = asyncio.create_task(stack.pop_all().aclose())
                assert await within(watch.read()) == side.health_reply(side.NOT_SERVING)
                assert await within(watch.code()) is grpc.StatusCode.UNAVAILABLE
                await within(ending)

    run(test)


def test_an_unknown_call_is_unimplemented(channel: Any) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary(SERVICE + "Nothing")(b"", timeout=30)
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_health_is_told_once_and_watched(channel: Any) -> None:
    assert channel.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=30) == side.health_reply(side.SERVING)
    watch = channel.unary_stream("/grpc.health.v1.Health/Watch")(b"", timeout=30)
    assert next(watch) == side.health_reply(side.SERVING)
    watch.cancel()
    asked = side.HealthCheckRequest(service="nobody").SerializeToString()
    with pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary("/grpc.health.v1.Health/Check")(asked, timeout=30)
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("service", side.REFLECTIONS)
def test_reflection_lists_the_services_and_gives_their_files(channel: Any, service: str) -> None:
    package = service.rpartition(".")[0]
    kind, reply = (
        side.message(f"{package}.ServerReflectionRequest"),
        side.message(f"{package}.ServerReflectionResponse"),
    )
    questions = [
        {"list_services": ""},
        {"file_containing_symbol": "inference.GRPCInferenceService.ModelInfer"},
        {"file_by_filename": "nothing.proto"},
    ]
    stream = channel.stream_stream(f"/{service}/ServerReflectionInfo")(
        iter([kind(**question).SerializeToString() for question in questions]), timeout=30
    )
    listed, found, missing = (reply.FromString(data) for data in stream)
    names = {item.name for item in listed.list_services_response.service}
    assert names == {"inference.GRPCInferenceService", side.HEALTH, *side.REFLECTIONS}
    assert b"GRPCInferenceService" in found.file_descriptor_response.file_descriptor_proto[0]
    assert missing.error_response.error_code == side.NOT_FOUND


@pytest.mark.parametrize("transport", ["fast", "library"])
def test_a_key_is_asked_for_except_by_probes(tmp_path: Path, transport: Transport) -> None:
    key = "0123456789abcdef-key"
    (tmp_path / "keys").write_text(f"{key}\n")
    listening = Listening(port=0, grpc_port=0, transport=transport, api_keys=tmp_path / "keys")
    with served(bundle(tmp_path / "net"), listening) as opened, grpc.insecure_channel(str(opened.grpc)) as channel:
        assert ask(channel, "ServerLive").live
        call = channel.unary_unary(SERVICE + "ServerMetadata")
        with pytest.raises(grpc.RpcError) as caught:
            call(b"", timeout=30)
        assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
        assert call(b"", timeout=30, metadata=[("authorization", f"Bearer {key}")])
