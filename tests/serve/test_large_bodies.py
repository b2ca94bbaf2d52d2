"""Large bodies in JSON, and encoded ones: read in pieces, with others served in between."""

from __future__ import annotations

import gzip
import http.client
import json
import selectors
import zlib
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest

pytest.importorskip("httptools", reason="needs the extra 'serve'")
pytest.importorskip("uvloop", reason="needs the extra 'serve'")

from hasten.protocol import json_pieces
from hasten.serve import slices
from hasten.serve.app import Listening, Open
from hasten.serve.rest import LARGE_ANSWER_BYTES, LARGE_BYTES
from serve.bundles import bundle
from serve.served import call, infer_body, rows_of, served

ROWS = 2000
INFER = "/v2/models/net/infer"


@pytest.fixture(scope="module", params=["fast", "library"])
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Open]:
    path = bundle(tmp_path_factory.mktemp("large") / "net")
    with served(path, Listening(port=0, grpc_port=None, transport=request.param)) as found:
        yield found


def body_of(rows: Any, *, nested: bool) -> bytes:
    if not nested:
        return infer_body(rows)
    tensor = {"name": "x", "shape": list(rows.shape), "datatype": "FP32", "data": rows.tolist()}
    return json.dumps({"inputs": [tensor]}).encode()


def outputs(answer: tuple[int, dict[str, str], bytes]) -> list[float]:
    status, _, body = answer
    assert status == 200, body
    data: list[float] = json.loads(body)["outputs"][0]["data"]
    return data


@pytest.mark.parametrize("coding", ["", "gzip", "deflate"])
@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
def test_many_rows_in_one_body_get_the_answers_that_they_get_in_small_ones(
    opened: Open, nested: bool, coding: str
) -> None:
    x = rows_of(ROWS)
    body = body_of(x, nested=nested)
    assert len(body) > 2 * LARGE_BYTES
    headers = {"Content-Encoding": coding} if coding else {}
    encoded = {"": bytes, "gzip": gzip.compress, "deflate": zlib.compress}[coding](body)
    found = outputs(call(opened.http, "POST", INFER, encoded, headers))
    wanted = [
        value
        for at in range(0, ROWS, 500)
        for value in outputs(call(opened.http, "POST", INFER, body_of(x[at : at + 500], nested=nested)))
    ]
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda body: body[:-1], "the body is no inference request"),
        (lambda body: body.replace(b"0.", b"x", 1), "is not FP32"),
        (lambda body: body.replace(b"[2000, 16]", b"[2001, 16]"), "has 32000 elements; shape [2001, 16] wants 32016"),
        (lambda body: body.replace(b'"x"', b'"z"'), "input 'x' is missing"),
    ],
)
def test_what_is_wrong_with_a_large_body_is_told(opened: Open, change: Any, says: str) -> None:
    status, _, answer = call(opened.http, "POST", INFER, change(body_of(rows_of(ROWS), nested=False)))
    assert (status, says in json.loads(answer)["error"]) == (400, True), answer


def test_an_encoded_body_that_is_cut_short_is_told(opened: Open) -> None:
    cut = gzip.compress(body_of(rows_of(ROWS), nested=False))[:-9]
    status, _, answer = call(opened.http, "POST", INFER, cut, {"Content-Encoding": "gzip"})
    assert (status, "is cut short" in json.loads(answer)["error"]) == (400, True)


def binary_body(rows: Any, *, binary: bool) -> tuple[bytes, dict[str, str]]:
    tensor = {"name": "x", "shape": list(rows.shape), "datatype": "FP32"}
    tensor |= {"parameters": {"binary_data_size": rows.nbytes}}
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": binary}}).encode()
    return head + rows.tobytes(), {"Inference-Header-Content-Length": str(len(head))}


@pytest.mark.parametrize("coding", ["", "gzip", "deflate", "br"])
@pytest.mark.parametrize("binary", [False, True], ids=["json", "binary"])
def test_a_large_answer_says_what_many_small_ones_say(opened: Open, binary: bool, coding: str) -> None:
    x = rows_of(LARGE_ANSWER_BYTES // 8)
    body, headers = binary_body(x, binary=binary)
    status, told, answer = call(opened.http, "POST", INFER, body, headers | {"Accept-Encoding": coding})
    assert status == 200
    assert told.get("content-encoding", "") == coding.replace("br", "")
    unpacked = {"gzip": gzip.decompress, "deflate": zlib.decompress}.get(coding, bytes)(answer)
    if binary:
        found = np.frombuffer(unpacked[int(told["inference-header-content-length"]) :], np.float32)
    else:
        found = np.array(json.loads(unpacked)["outputs"][0]["data"], np.float32)
    wanted = np.concatenate(
        [outputs(call(opened.http, "POST", INFER, infer_body(x[at : at + 500]))) for at in range(0, len(x), 500)]
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    phases = dict(part.strip().split(";dur=") for part in told["server-timing"].split(",") if ";dur=" in part)
    assert float(phases["encode"]) > 0


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read so little at once that reading takes thousands of turns of the loop."""
    monkeypatch.setattr(slices, "SLICE_NS", 0)
    monkeypatch.setattr(json_pieces, "PIECE_BYTES", 20)
    monkeypatch.setattr(json_pieces, "PIECE_ELEMENTS", 1)


@pytest.mark.usefixtures("small_steps")
def test_others_are_served_while_a_large_body_is_read(opened: Open) -> None:
    place = urlsplit(opened.http).netloc
    large, small = http.client.HTTPConnection(place, timeout=60), http.client.HTTPConnection(place, timeout=60)
    with selectors.DefaultSelector() as selector:
        large.request("POST", INFER, body_of(rows_of(ROWS), nested=False))
        assert large.sock is not None
        selector.register(large.sock, selectors.EVENT_READ)
        for _ in range(3):
            small.request("POST", INFER, infer_body(rows_of(1)))
            assert small.getresponse().read()
        assert not selector.select(0), "the large one is still being read"
        assert large.getresponse().status == 200
    large.close()
    small.close()


@pytest.mark.usefixtures("small_steps")
def test_others_are_served_while_a_large_answer_is_written(opened: Open) -> None:
    (model,) = opened.service.models()
    rows = LARGE_ANSWER_BYTES // 8
    before, body = model.statistics.rows, binary_body(rows_of(rows), binary=False)
    place = urlsplit(opened.http).netloc
    large, small = http.client.HTTPConnection(place, timeout=60), http.client.HTTPConnection(place, timeout=60)
    with selectors.DefaultSelector() as selector:
        large.request("POST", INFER, *body)
        assert large.sock is not None
        selector.register(large.sock, selectors.EVENT_READ)
        while model.statistics.rows < before + rows:  # until its runs have ended
            small.request("GET", "/v2/health/live")
            assert small.getresponse().read()
        small.request("POST", INFER, infer_body(rows_of(1)))
        assert small.getresponse().read()
        assert not selector.select(0), "the large one is still being written"
        assert large.getresponse().status == 200
    large.close()
    small.close()


@pytest.mark.usefixtures("small_steps")
def test_a_request_whose_time_is_over_before_it_was_read_is_told_so_and_counted(opened: Open) -> None:
    (model,) = opened.service.models()
    before = model.statistics.refused.get("deadline_exceeded", 0)
    body = infer_body(rows_of(ROWS), parameters={"timeout": 1000})
    status, headers, answer = call(opened.http, "POST", INFER, body)
    assert (status, headers["x-reason"]) == (504, "deadline_exceeded"), answer
    assert "before it was read" in json.loads(answer)["error"]
    assert model.statistics.refused["deadline_exceeded"] == before + 1


def test_a_defect_in_reading_a_large_body_is_a_500_and_the_server_goes_on(
    opened: Open, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def defect(*given: Any) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr("hasten.protocol.json_pieces._elements", defect)
    assert call(opened.http, "POST", INFER, infer_body(rows_of(ROWS)))[0] == 500
    assert "a defect" in caplog.text
    assert call(opened.http, "POST", INFER, infer_body(rows_of(1)))[0] == 200


@pytest.mark.usefixtures("small_steps")
def test_a_large_body_whose_client_has_left_is_not_read_to_its_end(opened: Open) -> None:
    (model,) = opened.service.models()
    before = model.statistics.rows
    client = http.client.HTTPConnection(urlsplit(opened.http).netloc, timeout=60)
    client.request("POST", INFER, body_of(rows_of(ROWS), nested=False))
    client.close()
    after = outputs(call(opened.http, "POST", INFER, body_of(rows_of(ROWS), nested=True)))
    assert len(after) == ROWS * 4
    assert model.statistics.rows == before + ROWS
