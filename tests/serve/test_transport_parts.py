"""The small parts of the transports: encodings, keys, paths, codes, sample calls, the access log."""

from __future__ import annotations

import io
import json
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten import errors
from hasten.errors import BadInput, BadRequest, ModelNotFound, NotAllowed, Overloaded, ServeError, TooLarge
from hasten.protocol.messages import ModelMetadata, TensorMetadata
from hasten.serve import encodings
from hasten.serve.access import AccessLog
from hasten.serve.codes import CODES, code_of, retry_after_s
from hasten.serve.encodings import chosen, compress, decompress
from hasten.serve.http1_request import Request
from hasten.serve.keys import read_keys
from hasten.serve.paths import Target, find_target
from hasten.serve.sample_calls import Caller, curl_line, python_line


@given(st.lists(st.binary(max_size=300), max_size=5), st.sampled_from([b"gzip", b"deflate"]), st.integers(1, 400))
def test_what_was_compressed_in_parts_comes_back_whole(parts: list[bytes], encoding: bytes, piece: int) -> None:
    whole = b"".join(parts)
    packed = compress(parts, encoding)
    with mock.patch.object(encodings, "PIECE_BYTES", piece):
        assert decompress(packed, encoding, limit_bytes=len(whole)) == whole
        with pytest.raises(BadRequest, match="cut short"):
            decompress(packed[:-1], encoding, limit_bytes=len(whole))
        with pytest.raises(BadRequest, match="something follows it"):
            decompress(packed + b"x", encoding, limit_bytes=len(whole))
        if whole:
            with pytest.raises(TooLarge):
                decompress(packed, encoding, limit_bytes=len(whole) - 1)


@given(st.binary(max_size=200), st.sampled_from([b"gzip", b"deflate", b"br", b""]))
def test_a_body_that_is_not_compressed_as_it_says_is_the_clients_fault(data: bytes, encoding: bytes) -> None:
    try:
        decompress(data, encoding, limit_bytes=1000)
    except ServeError as error:
        assert code_of(error).http in (400, 413)


@pytest.mark.parametrize(
    ("accepted", "wanted"),
    [
        (b"gzip, deflate", b"gzip"),
        (b"deflate", b"deflate"),
        (b"gzip;q=0, deflate;q=0.5", b"deflate"),
        (b"gzip;q=0.1, deflate;q=0.5", b"deflate"),
        (b"br", None),
        (b"gzip;q=nonsense", None),
        (b"", None),
    ],
)
def test_the_answers_encoding_is_the_clients_choice(accepted: bytes, wanted: bytes | None) -> None:
    assert chosen(accepted) == wanted


@pytest.mark.parametrize(
    ("target", "wanted"),
    [
        (b"/v2", Target("server")),
        (b"/v2/?x=y", Target("server")),
        (b"/v2/models/a/infer", Target("infer", "a")),
        (b"/v2/models/a/versions/3/infer", Target("infer", "a", "3")),
        (b"/v2/models/a%20b%C3%A4", Target("model", "a bä")),
        (b"/v2/models/stats", Target("stats")),
        (b"/v2/models/versions", Target("model", "versions")),
        (b"/v2/repository/models/a/load", Target("load", "a")),
        (b"http://h:8000/v2/models/a/infer?x=http://y/z", Target("infer", "a")),
        (b"HTTPS://h/v2/", Target("server")),
    ],
)
def test_a_path_means_a_call(target: bytes, wanted: Target) -> None:
    assert find_target(target) == wanted


@pytest.mark.parametrize("target", [b"http://h", b"http://h?x=/v2", b"ftp://h/v2", b"*", b"h:1", b"/http://h/v2"])
def test_what_is_no_path_of_a_call_is_not_found(target: bytes) -> None:
    with pytest.raises(ModelNotFound):
        find_target(target)


@pytest.mark.parametrize(
    "target",
    [b"/v2/models/%00", b"/v2/models/a%2Fb", b"/v2/models/%2e%2e", b"/v2/models/" + b"a" * 300, b"/v2/models//infer"],
)
def test_what_is_no_name_is_refused(target: bytes) -> None:
    with pytest.raises(BadRequest):
        find_target(target)


@given(st.binary(max_size=60))
def test_any_target_is_a_call_or_a_clear_error(target: bytes) -> None:
    try:
        find_target(b"/" + target)
    except (BadRequest, ModelNotFound) as error:
        assert str(error).isprintable() or "\\x" in repr(str(error))


def test_every_serve_error_has_its_codes() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, ServeError)]
    assert set(kinds) == CODES.keys()
    assert retry_after_s(Overloaded("full", retry_after_s=2.6)) == 3
    assert retry_after_s(BadRequest("no")) is None


def test_keys_are_read_from_a_file_and_a_useless_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# a comment\n\nabcdefghijklmnop\nqrstuvwxyz0123456789\n")
    keys = read_keys(path)
    keys.check({b"authorization": b"bearer qrstuvwxyz0123456789"})
    for headers in ({}, {b"authorization": b"Bearer abcdefghijklmno"}, {b"x-api-key": b"# a comment"}):
        with pytest.raises(NotAllowed):
            keys.check(headers)
    for text, says in (("", "no API key"), ("short\n", "5 characters")):
        path.write_text(text)
        with pytest.raises(BadInput, match=says):
            read_keys(path)


def model(*inputs: tuple[str, str, tuple[int, ...]]) -> ModelMetadata:
    specs = tuple(TensorMetadata(name=name, datatype=kind, shape=shape) for name, kind, shape in inputs)
    return ModelMetadata(name="a b", versions=("1",), platform="", inputs=specs, outputs=())


def test_sample_calls_stay_short_whatever_the_signature_is() -> None:
    caller = Caller(url="http://h:1", with_key=True, certificate="c.pem")
    for asked in (
        model(("x", "FP32", (-1, 4)), ("text", "BYTES", (1,)), ("on", "BOOL", (1,))),
        model(("x", "FP32", (-1, 3, 224, 224))),
        model(("x", "FP16", (-1, 2)), ("y", "INT64", (-1, 1))),
    ):
        for line in (curl_line(caller, asked), python_line(caller, asked)):
            if line is not None:
                assert "http://h:1/v2/models/a%20b/infer" in line
                assert "HASTEN_KEY" in line
                assert "c.pem" in line
                assert len(line) < 800
    assert curl_line(caller, model(("x", "FP16", (-1, 2)), ("y", "INT64", (-1, 1)))) is None


class Nowhere:
    def replied(self, request: Request) -> None:
        return


def answered(**headers: bytes) -> Request:
    request = Request(Nowhere(), b"GET", b"/v2", {name.replace("_", "-").encode(): at for name, at in headers.items()})
    request.respond(200, b"abc")
    return request


def test_the_access_log_is_a_line_of_json_for_each_request() -> None:
    stream = io.BytesIO()
    log = AccessLog(stream, time_s=lambda: 12.5)
    log.log(answered(x_request_id=b"r1"))
    log.log(answered())
    assert stream.getvalue() == b""
    log.flush()
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [(line["id"], line["status"], line["sent_bytes"], line["time"]) for line in lines] == [
        ("r1", 200, 3, 12.5),
        ("1", 200, 3, 12.5),
    ]


def test_an_access_log_that_cannot_be_written_loses_its_lines_and_nothing_else(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Disk(io.BytesIO):
        full = True

        def write(self, data: object) -> int:
            if self.full:
                raise OSError(28, "No space left on device")
            return super().write(data)  # type: ignore[arg-type]

    disk = Disk()
    log = AccessLog(disk, time_s=lambda: 0.0)
    for name in (b"1", b"2"):
        log.log(answered(x_request_id=name))
        log.flush()
    disk.full = False
    log.log(answered(x_request_id=b"3"))
    log.flush()
    assert [json.loads(line)["id"] for line in disk.getvalue().splitlines()] == ["3"]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "No space left on device" in caplog.text
