"""Requests as OpenTelemetry spans: over every transport, with their phases, in the client's own trace."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest

pytest.importorskip("httptools", reason="needs the extra 'serve'")
pytest.importorskip("grpc", reason="needs the extra 'serve'")
pytest.importorskip("opentelemetry.sdk.trace", reason="needs the extra 'otel'")

import grpc
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from hasten.cli.app import run as hasten
from hasten.errors import ServeError
from hasten.protocol.grpc_messages import message
from hasten.protocol.messages import InferResponse
from hasten.protocol.phases import PHASES
from hasten.serve.app import Listening, Open
from hasten.serve.otel import OtelTraces
from hasten.serve.repository import open_repository
from hasten.serve.service import Service
from hasten.serve.ticket import Marks
from serve.bundles import bundle, request, rows, run
from serve.process import process
from serve.served import FEATURES, call, infer_body, rows_of, served

INFER = "/v2/models/net/infer"
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"
METHOD = "/inference.GRPCInferenceService/ModelInfer"


@pytest.fixture(scope="module", params=["fast", "library"])
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Open]:
    models = tmp_path_factory.mktemp("otel") / "models"
    bundle(models / "net")
    with served(models, Listening(port=0, grpc_port=0, transport=request.param)) as found:
        yield found


class Exporter(InMemorySpanExporter):
    """Keeps spans, and tells when that of a request has come: it ends after its children."""

    def __init__(self) -> None:
        super().__init__()
        self.ended = Event()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = super().export(spans)
        if any(span.kind is SpanKind.SERVER for span in spans):
            self.ended.set()
        return result


@pytest.fixture
def spans(opened: Open) -> Iterator[Exporter]:
    exporter = Exporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    opened.service.traces = OtelTraces(provider)
    yield exporter
    opened.service.traces = None
    provider.shutdown()


def finished(exporter: Exporter) -> tuple[Any, list[Any]]:
    """Give the request's span and its children, once it has ended: its answer may be read before that."""
    assert exporter.ended.wait(30)
    found = exporter.get_finished_spans()
    (root,) = [span for span in found if span.kind is SpanKind.SERVER]
    return root, [span for span in found if span is not root]


def over_rest(opened: Open, body: bytes) -> tuple[int, str | None]:
    status, headers, _ = call(opened.http, "POST", INFER, body, {"traceparent": TRACEPARENT, "tracestate": "a=b"})
    return status, headers.get("traceparent")


def over_grpc(opened: Open, **changed: Any) -> str | None:
    given = {"name": "x", "datatype": "FP32", "shape": [1, FEATURES]}
    fields = {"model_name": "net", "inputs": [given], "raw_input_contents": [rows_of(1).tobytes()]} | changed
    with grpc.insecure_channel(str(opened.grpc)) as channel:
        _, done = channel.unary_unary(METHOD).with_call(
            message("ModelInferRequest")(**fields).SerializeToString(),
            timeout=30,
            metadata=[("traceparent", TRACEPARENT)],
        )
    return dict(done.trailing_metadata()).get("traceparent")


@pytest.mark.parametrize("protocol", ["rest", "grpc"])
def test_a_request_is_a_span_of_its_clients_trace_with_its_phases_below(
    opened: Open, spans: Exporter, protocol: str
) -> None:
    told = over_rest(opened, infer_body(rows_of(1), id="r7"))[1] if protocol == "rest" else over_grpc(opened, id="r7")
    root, phases = finished(spans)
    assert root.name == "inference net"
    assert (f"{root.context.trace_id:032x}", f"{root.parent.span_id:016x}") == (TRACE, PARENT)
    assert told == f"00-{TRACE}-{root.context.span_id:016x}-01"
    assert {"hasten.model": "net", "hasten.version": "1", "hasten.request_id": "r7"}.items() <= root.attributes.items()
    assert root.attributes["hasten.batch_rows"] >= 1
    assert root.status.status_code is StatusCode.UNSET
    assert [span.name for span in phases] == list(PHASES)
    assert all(span.parent.span_id == root.context.span_id for span in phases)
    assert (phases[0].start_time, phases[-1].end_time) == (root.start_time, root.end_time)
    assert sum(span.end_time - span.start_time for span in phases) == root.end_time - root.start_time


WRONG = {
    "no JSON": b"nope",
    "an input that does not fit": infer_body(rows_of(1)[:, :5]),
    "an output that is not there": infer_body(rows_of(1), outputs=[{"name": "nix"}]),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_request_that_is_refused_is_a_span_that_failed(opened: Open, spans: Exporter, case: str) -> None:
    assert over_rest(opened, WRONG[case])[0] == 400
    root, _ = finished(spans)
    assert (root.status.status_code, root.attributes["error.type"]) == (StatusCode.ERROR, "bad_request")
    assert f"{root.context.trace_id:032x}" == TRACE
    assert root.end_time >= root.start_time


def test_a_call_that_is_refused_is_a_span_that_failed(opened: Open, spans: Exporter) -> None:
    with pytest.raises(grpc.RpcError):
        over_grpc(opened, model_name="nix")
    root, _ = finished(spans)
    assert (root.status.status_code, root.attributes["error.type"]) == (StatusCode.ERROR, "model_not_found")


@pytest.mark.parametrize("header", ["", "nonsense", "00-0-0-01", f"00-{'0' * 32}-{PARENT}-01", "ff-" + "é" * 40])
def test_a_traceparent_that_is_none_begins_a_trace_of_its_own(opened: Open, spans: Exporter, header: str) -> None:
    status, headers, _ = call(opened.http, "POST", INFER, infer_body(rows_of(1)), {"traceparent": header})
    assert status == 200
    root, _ = finished(spans)
    assert root.parent is None
    assert headers["traceparent"].split("-")[1] == f"{root.context.trace_id:032x}"


def test_a_client_that_did_not_sample_gets_no_spans_and_its_trace_back(opened: Open, spans: Exporter) -> None:
    asked = TRACEPARENT.removesuffix("01") + "00"
    _, headers, _ = call(opened.http, "POST", INFER, infer_body(rows_of(1)), {"traceparent": asked})
    assert headers["traceparent"].startswith(f"00-{TRACE}-")
    assert headers["traceparent"].endswith("-00")
    assert spans.get_finished_spans() == ()


def test_without_it_nothing_is_told(opened: Open) -> None:
    assert over_rest(opened, infer_body(rows_of(1))) == (200, None)
    assert over_grpc(opened) is None


def test_a_request_that_is_cancelled_ends_its_span(tmp_path: Path) -> None:
    exporter = Exporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))

    async def cancelled() -> None:
        service = Service(open_repository(bundle(tmp_path / "net")), traces=OtelTraces(provider))
        await service.start()
        marks = Marks()
        marks.ns[0] = marks.ns[1] = marks.ns[2] = 1
        assert service.traces is not None
        marks.trace = service.traces.start({}, 1)

        def done(outcome: InferResponse | ServeError) -> None:
            pytest.fail("it was cancelled")

        service.submit(request(rows(1)), marks, done).cancel()
        await service.stop()

    run(cancelled())
    (root,) = [span for span in exporter.get_finished_spans() if span.kind is SpanKind.SERVER]
    assert root.attributes["error.type"] == "cancelled"


def test_a_client_that_leaves_while_its_large_body_is_read_ends_its_span(
    opened: Open, spans: Exporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hasten.serve.slices.SLICE_NS", 0)
    monkeypatch.setattr("hasten.protocol.json_pieces.PIECE_BYTES", 20)  # thousands of turns of the loop
    client = HTTPConnection(opened.http.removeprefix("http://"), timeout=60)
    client.request("POST", INFER, infer_body(rows_of(4000)))
    assert call(opened.http, "GET", "/v2/health/live")[0] == 200
    client.close()
    assert spans.ended.wait(30)
    (root,) = [span for span in spans.get_finished_spans() if span.kind is SpanKind.SERVER]
    assert root.attributes["error.type"] == "cancelled"


def test_the_command_sends_spans_to_a_collector_and_flushes_them_at_its_end(tmp_path: Path) -> None:
    taken: list[tuple[str, bytes]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            taken.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *words: Any) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as collector:
        thread = Thread(target=collector.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        endpoint = f"http://127.0.0.1:{collector.server_address[1]}"
        with process(bundle(tmp_path / "net"), "--otel", endpoint) as server:
            url = f"http://{server.http[0]}:{server.http[1]}"
            assert call(url, "POST", INFER, infer_body(rows_of(1)), {"traceparent": TRACEPARENT})[0] == 200
            server.popen.terminate()
            assert server.popen.wait(60) == 0
        collector.shutdown()
        thread.join(10)
    (path, data), *_ = taken
    assert path == "/v1/traces"
    if data[:2] == b"\x1f\x8b":
        data = gzip.decompress(data)
    assert bytes.fromhex(TRACE) in data
    assert b"inference net" in data
    assert b"batch_wait" in data


def test_an_address_that_is_none_is_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["serve", str(bundle(tmp_path / "net")), "--port", "0", "--grpc-port", "-1", "--otel", "collector"]
    assert hasten(command) == 1
    assert "--otel 'collector' is no address of a collector" in capsys.readouterr().err


def test_serving_without_it_imports_none_of_it() -> None:
    code = "import sys, json, hasten.serve.app; print(json.dumps([m for m in sys.modules if 'opentelemetry' in m]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
