"""hasten's own server passes its suite, by both transports; the verb tells it, and tells what is wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("httptools", reason="needs the extra 'serve'")
pytest.importorskip("grpc", reason="needs the extra 'serve'")

from conformance import small_server as servers
from conformance.small_server import small
from hasten.cli.app import run
from hasten.serve.app import Listening, Open
from hasten.testing.models import convnet
from serve.bundles import bundle
from serve.photos import PRE, SIZE
from serve.served import served


@pytest.fixture(scope="module", params=["fast", "library"])
def opened(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Open]:
    models = tmp_path_factory.mktemp("conformance") / "models"
    bundle(models / "net")
    listening = Listening(port=0, grpc_port=0, transport=request.param, shared_memory=True)
    with served(models, listening) as found:
        yield found


def test_our_server_meets_every_check_even_the_recommended_ones(
    opened: Open, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    command = ["conformance", opened.http, "--grpc", str(opened.grpc), "--reload", "--strict", "--json"]
    code = run([*command, "--junit", str(tmp_path / "results.xml")])
    found = json.loads(capsys.readouterr().out)
    assert [check for check in found["checks"] if check["outcome"] == "not met"] == []
    assert code == 0
    assert found["model"] == "net"
    skipped = {check["says"] for check in found["checks"] if check["outcome"] == "skipped"}
    assert skipped == {"the model has one input"}
    offered = {check["group"] for check in found["checks"] if check["outcome"] == "met"}
    assert {"Binary tensors", "Statistics", "gRPC inference", "gRPC reflection", "Shared memory"} <= offered
    assert (tmp_path / "results.xml").read_bytes().startswith(b"<?xml")


def test_a_model_of_images_is_not_blamed_for_refusing_what_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle(tmp_path / "models" / "photos", model=convnet(size=SIZE), pre=PRE)
    with served(tmp_path / "models", Listening(port=0, grpc_port=0)) as found:
        code = run(["conformance", found.http, "--grpc", str(found.grpc), "--json"])
    checks = json.loads(capsys.readouterr().out)["checks"]
    assert [check for check in checks if check["outcome"] == "not met"] == []
    assert code == 0
    refused = [check for check in checks if "name a model of numbers: --model NAME" in check["says"]]
    assert {"REST inference", "gRPC inference", "Binary tensors"} <= {check["group"] for check in refused}
    assert all("this is no image" in check["says"] for check in refused)


def test_a_server_that_does_otherwise_is_exit_code_3_with_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    with small(servers.ForgetsTheId) as server:
        assert run(["conformance", f"http://127.0.0.1:{server.http.port}", "--model", "net"]) == 3
    text = " ".join(capsys.readouterr().out.split())
    assert "rest-infer-id id is absent, not a string" in text
    assert text.count("no gRPC address was given") == 1, "checks of which the same is said are counted in one line"
    assert "1 check counts against this server." in text


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["ftp://127.0.0.1:1"], "write http://HOST:PORT"),
        (["http://127.0.0.1:notaport"], "is no address"),
        (["http://127.0.0.1:{port}"], "name one: --model NAME"),
        (["http://127.0.0.1:{port}", "--model", "net", "--only", "metrix"], "groups are REST health"),
        (["http://127.0.0.1:{port}", "--model", "net", "--grpc", "8001"], "HOST:PORT"),
    ],
)
def test_what_cannot_be_checked_is_one_clear_line(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with small(servers.Honest) as server:
        assert run(["conformance", *[word.format(port=server.http.port) for word in words]]) in (1, 2)
    assert says in capsys.readouterr().err
