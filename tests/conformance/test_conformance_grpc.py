"""The suite over gRPC: a small honest server passes, and planted faults are each caught."""

from __future__ import annotations

import contextlib
import re
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("grpc", reason="needs the extra 'serve'")

import grpc
from google.protobuf.message import DecodeError

from conformance import small_server
from conformance.small_server import METADATA, WIDTH, small
from hasten.client.values import read_address
from hasten.conformance.grpc_wire import open_grpc
from hasten.conformance.server import Server
from hasten.conformance.suite import CHECKS, Result, run
from hasten.protocol.grpc_messages import message

GRPC = tuple(check for check in CHECKS if "gRPC" in check.group)
INVALID, NOT_FOUND = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND


class Wrong(Exception):
    """A call that is refused: status and text."""


def need(holds: bool, text: str, code: grpc.StatusCode = INVALID) -> None:
    if not holds:
        raise Wrong(code, text)


def reply(call: str, /, **fields: Any) -> Any:
    return message(f"{call}Response")(**fields)


class Honest(grpc.GenericRpcHandler):
    """The six calls of the protocol."""

    def service(self, details: Any) -> Any:
        name = details.method.rpartition("/")[2]
        method = getattr(self, re.sub("(?<!^)(?=[A-Z])", "_", name).lower(), None)
        if "inference." not in details.method or method is None:
            return None

        def answer(data: bytes, context: Any) -> bytes:
            try:
                asked = message(f"{name}Request").FromString(data)
            except DecodeError:
                context.abort(INVALID, "no message")
            try:
                done: bytes = method(asked).SerializeToString()
            except Wrong as wrong:
                return self.refuse(context, *wrong.args)
            return done

        return grpc.unary_unary_rpc_method_handler(answer)

    def refuse(self, context: Any, code: grpc.StatusCode, text: str) -> bytes:
        context.abort(code, text)
        return b""

    def server_live(self, asked: Any) -> Any:
        return reply("ServerLive", live=True)

    def server_ready(self, asked: Any) -> Any:
        return reply("ServerReady", ready=True)

    def model_ready(self, asked: Any) -> Any:
        need(asked.name == "net", "no such model", NOT_FOUND)
        return reply("ModelReady", ready=True)

    def server_metadata(self, asked: Any) -> Any:
        return reply("ServerMetadata", name="small", version="1")

    def model_metadata(self, asked: Any) -> Any:
        need(asked.name == "net", "no such model", NOT_FOUND)
        return reply("ModelMetadata", **METADATA)

    def model_infer(self, asked: Any) -> Any:
        need(asked.model_name == "net" and asked.model_version in ("", "1"), "no such model or version", NOT_FOUND)
        need(len(asked.inputs) == 1, "one input is wanted")
        (given,) = asked.inputs
        shape = list(given.shape)
        need((given.name, given.datatype) == ("x", "FP32"), "the input is x, FP32")
        need(len(shape) == 2 and shape[1] == WIDTH and 0 <= shape[0] < 100, f"no shape: {shape}")
        raw = list(asked.raw_input_contents)
        need(bool(raw) != given.HasField("contents"), "contents are raw or typed")
        need(not raw or [len(part) for part in raw] == [4 * WIDTH * shape[0]], "bytes and shape differ")
        n = shape[0] * WIDTH
        values = list(struct.unpack(f"<{n}f", raw[0]) if raw else given.contents.fp32_contents)
        need(len(values) == n, "contents and shape differ")
        rows = [values[at : at + WIDTH] for at in range(0, n, WIDTH)]
        names = [output.name for output in asked.outputs] or ["y", "n"]
        need({*names} <= {"y", "n"}, "no such output")
        return self.answer(asked, names, rows, bool(raw))

    def answer(self, asked: Any, names: list[str], rows: list[list[float]], raw: bool) -> Any:
        made: Any = reply("ModelInfer", model_name="net", model_version="1", id=asked.id)
        for name in names:
            kind = {"y": ("FP32", [len(rows), 2]), "n": ("INT64", [len(rows)])}[name]
            item = made.outputs.add(name=name, datatype=kind[0], shape=kind[1])
            values = [value for row in rows for value in (sum(row), max(row))] if name == "y" else [WIDTH] * len(rows)
            if raw:
                made.raw_output_contents.append(struct.pack(f"<{len(values)}{'f' if name == 'y' else 'q'}", *values))
            else:
                getattr(item.contents, "fp32_contents" if name == "y" else "int64_contents").extend(values)
        return made


class ForgetsTheId(Honest):
    def answer(self, asked: Any, names: list[str], rows: list[list[float]], raw: bool) -> Any:
        made = super().answer(asked, names, rows, raw)
        made.id = ""
        return made


class CutsRawContents(Honest):
    def answer(self, asked: Any, names: list[str], rows: list[list[float]], raw: bool) -> Any:
        made = super().answer(asked, names, rows, raw)
        for at, part in enumerate(made.raw_output_contents):
            made.raw_output_contents[at] = part[:-1]
        return made


class CutsTypedContents(Honest):
    def answer(self, asked: Any, names: list[str], rows: list[list[float]], raw: bool) -> Any:
        made = super().answer(asked, names, rows, raw)
        for item in made.outputs:
            del item.contents.fp32_contents[-1:]
        return made


class AlwaysReady(Honest):
    def model_ready(self, asked: Any) -> Any:
        return reply("ModelReady", ready=True)


class NeverReady(Honest):
    def model_ready(self, asked: Any) -> Any:
        return reply("ModelReady", ready=False)


class SaysNothingOfErrors(Honest):
    def refuse(self, context: Any, code: grpc.StatusCode, text: str) -> bytes:
        context.abort(code, "")
        return b""


class IgnoresErrors(Honest):
    def refuse(self, context: Any, code: grpc.StatusCode, text: str) -> bytes:
        return b""


class Babbles(Honest):
    def server_metadata(self, asked: Any) -> Any:
        class Noise:
            def SerializeToString(self) -> bytes:  # noqa: N802 - protobuf's name
                return b"\xff" * 9

        return Noise()


class Hangs(Honest):
    def __init__(self) -> None:
        self.over = threading.Event()

    def server_live(self, asked: Any) -> Any:
        self.over.wait(20)
        return super().server_live(asked)


class OtherMetadata(Honest):
    def model_metadata(self, asked: Any) -> Any:
        made = super().model_metadata(asked)
        made.outputs[0].shape[0] = 7
        return made


@contextlib.contextmanager
def both(handler: Honest, *, timeout_s: float = 5.0) -> Iterator[Server]:
    """Serve REST by the small honest server, and gRPC by ``handler``."""
    pool = ThreadPoolExecutor(4)
    server = grpc.server(pool, [handler])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    made = open_grpc(read_address(f"grpc://127.0.0.1:{port}"), timeout_s=timeout_s)
    try:
        with small(small_server.Honest) as rest:
            yield replace(rest, grpc=made)
    finally:
        if isinstance(handler, Hangs):
            handler.over.set()
        made.channel.close()
        server.stop(0).wait(10)
        pool.shutdown()


def not_met(results: list[Result]) -> dict[str, str]:
    return {result.check.name: result.says for result in results if result.outcome == "not met"}


def test_a_small_honest_server_passes_and_offers_neither_health_nor_reflection() -> None:
    with both(Honest()) as server:
        results = run(server, GRPC)
    assert not_met(results) == {}
    assert sum(result.outcome == "met" for result in results) > 35
    assert {result.check.group for result in results if result.outcome == "not offered"} == {
        "gRPC health service",
        "gRPC reflection",
    }


FAULTS: dict[type[Honest], tuple[str, str]] = {
    ForgetsTheId: ("grpc-infer-id", "id is ''"),
    CutsRawContents: ("grpc-infer-raw", "bytes"),
    CutsTypedContents: ("grpc-infer-typed", "elements"),
    AlwaysReady: ("grpc-unknown-model-is-not-ready", "said to be ready"),
    NeverReady: ("grpc-model-ready", "ready is false"),
    SaysNothingOfErrors: ("grpc-error-unknown-model", "no text"),
    IgnoresErrors: ("grpc-error-unknown-datatype", "ended with OK"),
    Babbles: ("grpc-server-metadata", "no ServerMetadataResponse"),
    OtherMetadata: ("grpc-model-metadata", "over gRPC"),
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_planted_fault_is_caught_by_the_check_that_is_there_for_it(fault: type[Honest]) -> None:
    name, says = FAULTS[fault]
    with both(fault()) as server:
        found = not_met(run(server, GRPC))
    assert name in found, found
    assert re.search(says, found[name]), found[name]


def test_a_call_that_hangs_is_not_met_and_the_suite_goes_on() -> None:
    some = [check for check in GRPC if check.name in ("grpc-server-live", "grpc-server-ready")]
    with both(Hangs(), timeout_s=0.3) as server:
        results = run(server, some)
    assert "no answer within 0.3 s" in not_met(results)["grpc-server-live"]
    assert results[1].outcome == "met"


def test_nobody_listening_is_told_check_by_check(free_port: int) -> None:
    made = open_grpc(read_address(f"grpc://127.0.0.1:{free_port}"), timeout_s=2.0)
    with small(small_server.Honest) as server:
        results = run(replace(server, grpc=made), [check for check in GRPC if check.name == "grpc-server-live"])
    made.channel.close()
    assert "no answer" in not_met(results)["grpc-server-live"]
