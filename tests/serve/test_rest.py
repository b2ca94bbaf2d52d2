"""Every REST call against a real small deployment, over both HTTP transports."""

from __future__ import annotations

import gc
import gzip
import json
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("httptools", reason="needs the extra 'serve'")
pytest.importorskip("grpc", reason="needs the extra 'serve'")

from hasten.errors import Overloaded
from hasten.protocol import rest
from hasten.protocol.messages import InferRequest
from hasten.protocol.phases import PHASES
from hasten.serve.app import Listening, Open
from hasten.serve.batching import NEVER
from hasten.serve.gate import Shut
from hasten.serve.limits import Limits
from hasten.serve.model import Model
from hasten.serve.openapi import CALLS
from hasten.serve.rest import CALLS as ANSWERED
from serve.bundles import bundle
from serve.served import CLASSES, call, infer_body, rows_of, served

INFER = "/v2/models/net/infer"
LIMITS = Limits(body_bytes=200_000)


@pytest.fixture(scope="module", params=["fast", "library"])
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Open]:
    models = tmp_path_factory.mktemp("served") / "models"
    bundle(models / "net")
    with served(models, Listening(port=0, grpc_port=None, transport=request.param, limits=LIMITS)) as found:
        yield found


def ask(opened: Open, verb: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, object]:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    status, _, data = call(opened.http, verb, path, body, names)
    return status, json.loads(data)


def test_health_is_told(opened: Open) -> None:
    assert ask(opened, "GET", "/v2/health/live") == (200, {"live": True})
    assert ask(opened, "GET", "/v2/health/ready") == (200, {"ready": True, "live": True})


def test_the_server_and_its_model_describe_themselves(opened: Open) -> None:
    status, server = ask(opened, "GET", "/v2/")
    assert status == 200
    assert isinstance(server, dict)
    assert server["name"] == "hasten"
    assert {"binary_tensor_data", "statistics"} <= set(server["extensions"])
    for path in ("/v2/models/net", "/v2/models/net/versions/1"):
        status, model = ask(opened, "GET", path)
        assert isinstance(model, dict)
        assert (status, model["name"], model["versions"]) == (200, "net", ["1"])
        assert model["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 16]}]
    assert ask(opened, "GET", "/v2/models/net/ready") == (200, {"name": "net", "ready": True})


def test_requests_of_models_that_are_not_there_leave_no_memory_behind(opened: Open) -> None:
    named = ",".join(f'{{"name":"y{n}"}}' for n in range(400))
    tracemalloc.start()
    try:
        for n in range(100):
            head = f'{{"inputs":[],"outputs":[{named}],"parameters":{{"k":{n}}}}}'.encode()
            path, size = f"/v2/models/nix{n % 10}/infer", str(len(head))
            assert ask(opened, "POST", path, head, Inference_Header_Content_Length=size)[0] == 404
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] < 2 * 2**20
    finally:
        tracemalloc.stop()


def test_a_head_is_read_once_where_the_model_is_there(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    decode = rest.decode_request

    def counted(body: bytes, *, model: str, **named: Any) -> InferRequest:
        read.append(model)
        return decode(body, model=model, **named)

    monkeypatch.setattr(rest, "decode_request", counted)
    for seed in range(3):
        assert ask(opened, "POST", INFER, infer_body(rows_of(2, seed), parameters={"told": "once"}))[0] == 200
    assert read == ["net"]


@pytest.mark.parametrize("path", [INFER, "/v2/models/net/versions/1/infer"])
def test_an_inference_gives_what_its_rows_give_alone_with_its_id_and_its_phases(opened: Open, path: str) -> None:
    rows = rows_of(3)
    status, headers, body = call(opened.http, "POST", path, infer_body(rows, id="a7"))
    answer = json.loads(body)
    assert (status, answer["model_name"], answer["id"]) == (200, "net", "a7")
    whole = np.array(answer["outputs"][0]["data"]).reshape(answer["outputs"][0]["shape"])
    assert whole.shape == (3, CLASSES)
    for row, wanted in zip(rows, whole, strict=True):
        alone = json.loads(call(opened.http, "POST", path, infer_body(row[None]))[2])
        np.testing.assert_allclose(alone["outputs"][0]["data"], wanted, rtol=1e-4, atol=1e-6)
    told = [item.partition(";")[0] for item in headers["server-timing"].split(", ")]
    assert told == [*PHASES[:-1], "rows", "instance"]
    assert headers["server-timing"].endswith(', rows;desc="4", instance;desc="0"')


def test_tensors_go_both_ways_as_bytes(opened: Open) -> None:
    rows = rows_of(2)
    head = {
        "inputs": [{"name": "x", "shape": [2, 16], "datatype": "FP32", "parameters": {"binary_data_size": 128}}],
        "outputs": [{"name": "y", "parameters": {"binary_data": True}}],
    }
    json_bytes = json.dumps(head).encode()
    size = {"Inference-Header-Content-Length": str(len(json_bytes))}
    status, headers, body = call(opened.http, "POST", INFER, json_bytes + rows.tobytes(), size)
    assert status == 200
    at = int(headers["inference-header-content-length"])
    got = np.frombuffer(body[at:], np.float32).reshape(2, CLASSES)
    as_json = json.loads(call(opened.http, "POST", INFER, infer_body(rows))[2])
    np.testing.assert_allclose(got.ravel(), as_json["outputs"][0]["data"], rtol=1e-5)


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_bodies_are_compressed_both_ways_where_the_client_says_so(opened: Open, encoding: str) -> None:
    pack, unpack = {"gzip": (gzip.compress, gzip.decompress), "deflate": (zlib.compress, zlib.decompress)}[encoding]
    plain = infer_body(rows_of(40))
    status, headers, body = call(
        opened.http, "POST", INFER, pack(plain), {"Content-Encoding": encoding, "Accept-Encoding": encoding}
    )
    assert (status, headers["content-encoding"]) == (200, encoding)
    assert json.loads(unpack(body))["outputs"][0]["shape"] == [40, CLASSES]
    small = call(opened.http, "POST", INFER, infer_body(rows_of(1)), {"Accept-Encoding": encoding})
    assert "content-encoding" not in small[1], "it is one packet either way"
    assert small[1]["vary"] == "Accept-Encoding"
    assert json.loads(small[2])["outputs"][0]["shape"] == [1, CLASSES]


WRONG: dict[str, tuple[str, str, bytes | None, dict[str, str], int]] = {
    "no JSON": ("POST", INFER, b"nope", {}, 400),
    "an empty body": ("POST", INFER, b"", {}, 400),
    "an unknown model": ("POST", "/v2/models/nix/infer", infer_body(rows_of(1)), {}, 404),
    "an unknown version": ("POST", "/v2/models/net/versions/9/infer", infer_body(rows_of(1)), {}, 404),
    "an unknown path": ("GET", "/v3", None, {}, 404),
    "a path out of the models": ("GET", "/v2/models/..%2F..%2Fetc%2Fpasswd", None, {}, 400),
    "a name that is no UTF-8": ("GET", "/v2/models/%ff%fe", None, {}, 400),
    "the wrong verb": ("GET", INFER, None, {}, 405),
    "a wrong width": ("POST", INFER, infer_body(rows_of(1)[:, :5]), {}, 400),
    "a body that is too large": ("POST", INFER, b"x" * 200_001, {}, 413),
    "a body that grows too large": (
        "POST",
        INFER,
        gzip.compress(b" " * 10_000_000),
        {"Content-Encoding": "gzip"},
        413,
    ),
    "a body that is not compressed as it says": ("POST", INFER, b"{}", {"Content-Encoding": "gzip"}, 400),
    "a compressed body that is cut": (
        "POST",
        INFER,
        gzip.compress(infer_body(rows_of(4)))[:-10],
        {"Content-Encoding": "gzip"},
        400,
    ),
    "an unknown encoding": ("POST", INFER, b"{}", {"Content-Encoding": "br"}, 400),
    "a header length that is no number": ("POST", INFER, b"{}", {"Inference-Header-Content-Length": "-1"}, 400),
    "a header length beyond the body": ("POST", INFER, b"{}", {"Inference-Header-Content-Length": "900"}, 400),
    "a configuration in a load": (
        "POST",
        "/v2/repository/models/net/load",
        b'{"parameters": {"config": "{}"}}',
        {},
        400,
    ),
    "an unload of nothing": ("POST", "/v2/repository/models/nix/unload", b"", {}, 404),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_an_error_in_json_with_its_own_status(opened: Open, case: str) -> None:
    verb, path, body, headers, wanted = WRONG[case]
    status, _, data = call(opened.http, verb, path, body, headers)
    assert status == wanted, data
    assert list(json.loads(data)) == ["error"]


SHAPES = st.lists(st.one_of(st.integers(-3, 40), st.integers(), st.floats(), st.none()), max_size=4)
TENSORS = st.fixed_dictionaries(
    {},
    optional={
        "name": st.sampled_from(["x", "y", "", 3, None]),
        "datatype": st.sampled_from(["FP32", "FP16", "BF16", "BYTES", "INT64", "BOOL", "FP33", None]),
        "shape": st.one_of(st.just([1, 16]), SHAPES, st.integers()),
        "data": st.one_of(
            st.lists(st.one_of(st.floats(), st.integers(), st.booleans(), st.text(max_size=3)), max_size=20),
            st.just([0.5] * 16),
            st.just([[float("nan")] * 16]),
            st.recursive(st.just([]), lambda inner: st.lists(inner, max_size=3), max_leaves=5),
        ),
        "parameters": st.dictionaries(
            st.sampled_from(["binary_data_size", "shared_memory_region", "a"]),
            st.one_of(st.integers(-5, 100), st.integers(), st.text(max_size=3), st.booleans()),
            max_size=2,
        ),
    },
)
REQUESTS = st.fixed_dictionaries(
    {},
    optional={
        "inputs": st.lists(TENSORS, max_size=3),
        "outputs": st.lists(
            st.fixed_dictionaries(
                {}, optional={"name": st.sampled_from(["y", "y", "z", 1]), "parameters": st.just({})}
            ),
            max_size=3,
        ),
        "id": st.one_of(st.text(max_size=5), st.integers()),
        "parameters": st.dictionaries(
            st.sampled_from(["priority", "timeout", "binary_data_output"]), st.one_of(st.integers(), st.booleans())
        ),
    },
)


@settings(max_examples=150, deadline=None)
@given(
    st.one_of(REQUESTS.map(lambda value: json.dumps(value).encode()), st.binary(max_size=80)), st.binary(max_size=80)
)
def test_no_body_at_all_brings_out_a_500(opened: Open, head: bytes, tail: bytes) -> None:
    for headers in ({}, {"Inference-Header-Content-Length": str(len(head))}):
        status, _, data = call(opened.http, "POST", INFER, head + tail if headers else head, headers)
        assert status in (200, 400, 413, 504), (status, data)
        if status != 200:
            assert list(json.loads(data)) == ["error"]


@pytest.mark.parametrize("depth", [100, 100_000])
def test_json_that_is_nested_too_deep_is_refused(opened: Open, depth: int) -> None:
    body = b'{"inputs":[{"name":"x","shape":[1,16],"datatype":"FP32","data":' + b"[" * depth + b"]" * depth + b"}]}"
    assert call(opened.http, "POST", INFER, body[:200_000])[0] == 400


def test_statistics_and_metrics_count_what_was_answered(opened: Open) -> None:
    before = _count(opened)
    for _ in range(3):
        assert call(opened.http, "POST", INFER, infer_body(rows_of(1)))[0] == 200
    assert _count(opened) == before + 3
    status, headers, body = call(opened.http, "GET", "/metrics")
    assert (status, headers["content-type"].split(";")[0]) == (200, "text/plain")
    assert b"hasten_phase_seconds" in body


def _count(opened: Open) -> int:
    _, stats = ask(opened, "GET", "/v2/models/net/stats")
    assert isinstance(stats, dict)
    return int(stats["model_stats"][0]["inference_stats"]["success"]["count"])


def test_a_model_is_unloaded_and_loaded_again(opened: Open) -> None:
    assert ask(opened, "POST", "/v2/repository/models/net/unload", b'{"parameters":{"unload_dependents":false}}') == (
        200,
        {},
    )
    status, _ = ask(opened, "POST", INFER, infer_body(rows_of(1)))
    assert status in (404, 503)
    assert ask(opened, "POST", "/v2/repository/models/net/load", b"") == (200, {})
    assert ask(opened, "POST", INFER, infer_body(rows_of(1)))[0] == 200
    status, index = ask(opened, "POST", "/v2/repository/index", b'{"ready": true}')
    assert (status, [item["name"] for item in index]) == (200, ["net"])  # type: ignore[attr-defined]


def test_every_call_is_described_and_answered() -> None:
    assert CALLS.keys() == ANSWERED.keys() | {"infer"}


def test_the_description_names_every_path(opened: Open) -> None:
    _, document = ask(opened, "GET", "/openapi.json")
    assert isinstance(document, dict)
    assert set(document["paths"]) == {path for each in CALLS.values() for path in each.paths}
    status, headers, page = call(opened.http, "GET", "/docs")
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert b"/v2/models/{model}/infer" in page


def test_head_answers_as_get_without_a_body(opened: Open) -> None:
    status, headers, body = call(opened.http, "HEAD", "/v2")
    assert (status, body) == (200, b"")
    assert int(headers["content-length"]) > 0


def test_a_key_is_asked_for_except_by_probes(tmp_path: Path) -> None:
    key = "0123456789abcdef-key"
    (tmp_path / "keys").write_text(f"# ours\n{key}\n")
    toml = bundle(tmp_path / "net")
    with served(toml, Listening(port=0, grpc_port=None, api_keys=tmp_path / "keys")) as opened:
        assert call(opened.http, "GET", "/v2/health/ready")[0] == 200
        assert call(opened.http, "GET", "/v2")[0] == 401
        assert call(opened.http, "GET", "/v2", None, {"Authorization": "Bearer wrong"})[0] == 401
        assert call(opened.http, "GET", "/v2", None, {"Authorization": f"Bearer {key}"})[0] == 200
        assert call(opened.http, "GET", "/v2", None, {"X-Api-Key": key})[0] == 200


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{" + b" " * 5000, 503),
        (b'{"parameters": {"priority": 1}, "inputs": 1,' + b" " * 5000, 400),
        (b'{"parameters": {"timeout": 1}, "inputs": 1,' + b" " * 5000, 400),
        (b'{"parameters": {"timeout": 1}, "inputs": [{"data": [1' + b" " * 5000 + b"]}, 1]}", 400),
        (b'{"inputs": [{"data": [1' + b" " * 5000 + b"]}, 1]}", 503),
        (b"{", 400),
    ],
)
def test_json_that_would_be_refused_is_refused_unread_unless_it_may_have_a_priority(
    opened: Open, body: bytes, status: int, inside: pytest.MonkeyPatch
) -> None:
    """Under overload reading is what costs; here even nonsense is refused for the room that it lacks."""

    def full(self: Model, unless: Callable[[], bool]) -> None:
        if not unless():
            raise Overloaded("no room", reason="queue_full", retry_after_s=1.0)

    inside.setattr(Model, "check_room", full)
    assert ask(opened, "POST", INFER, body)[0] == status


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"{", 503),
        (b'{"parameters": {"priority": 1}, "inputs": 1', 400),
        (b'{"parameters": {"timeout": 1}, "inputs": 1', 400),
        (b"", 503),
    ],
)
def test_a_binary_request_is_refused_unread_where_the_last_one_was_unless_it_may_have_a_priority(
    opened: Open, head: bytes, status: int
) -> None:
    (model,) = opened.service.models()
    gate, refused = model.pool.gate, model.statistics.refused
    before = refused.get("predicted_wait", 0)
    headers = {"Inference-Header-Content-Length": str(len(head))}
    body = head + b'"priority"'  # in the bytes of a tensor it says nothing
    gate._shut = Shut("it would take too long", 1.0, 1, NEVER, 0, 0)
    found = call(opened.http, "POST", INFER, body, headers)
    gate._shut = None
    assert found[0] == status
    assert refused.get("predicted_wait", 0) - before == (status == 503), "it is counted, once"
    assert ("it would take too long" in found[2].decode()) == (status == 503)
    assert call(opened.http, "POST", INFER, body, headers)[0] == 400
