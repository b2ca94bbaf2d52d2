"""``hasten serve`` as a process: what it prints works when pasted, and it ends without losing a request."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import pytest

pytest.importorskip("httptools", reason="needs the extra 'serve'")
pytest.importorskip("grpc", reason="needs the extra 'serve'")

import grpc

from hasten.cli.app import run
from hasten.errors import InvalidSetting
from hasten.serve.app import Listening
from serve.bundles import bundle
from serve.certificates import certificate
from serve.served import call, infer_body, rows_of, serving

INFER = "/v2/models/net/infer"


@pytest.fixture(scope="module")
def toml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle(tmp_path_factory.mktemp("bundle") / "net")


def test_the_lines_that_it_prints_work_when_pasted(toml: Path) -> None:
    with serving(toml, "--drain", "1ms") as (process, told):
        assert told["models"] == [{"name": "net", "version": "1", "state": "READY", "reason": ""}]
        calls = told["calls"]
        assert isinstance(calls, list)
        assert [line.split()[0] for line in calls] == ["curl", "python3"]
        for line in calls:
            done = subprocess.run(["bash", "-c", line], capture_output=True, check=True, timeout=60)
            assert b'"model_name"' in done.stdout
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def test_after_the_first_signal_it_is_not_ready_but_answers_and_after_the_second_it_ends_at_once(toml: Path) -> None:
    with serving(toml, "--drain", "1h") as (process, told):
        url = str(told["http"])
        connection = HTTPConnection(urlsplit(url).netloc, timeout=30)
        connection.request("GET", "/v2/health/ready")
        first = connection.getresponse()
        assert (first.status, first.getheader("Connection"), first.read()) == (200, None, b'{"ready":true,"live":true}')
        process.send_signal(signal.SIGTERM)
        while call(url, "GET", "/v2/health/ready")[0] == 200:
            continue
        status, headers, body = call(url, "GET", "/v2/health/ready")
        assert (status, json.loads(body), headers["connection"]) == (503, {"ready": False, "live": True}, "close")
        connection.request("POST", INFER, infer_body(rows_of(1)))
        last = connection.getresponse()
        assert (last.status, last.getheader("Connection")) == (200, "close")
        last.read()
        assert call(url, "POST", INFER, infer_body(rows_of(1)))[0] == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 1
        connection.close()


def test_a_new_version_in_a_watched_folder_is_served(toml: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    shutil.copytree(toml.parent, models / "net" / "1")
    with serving(models, "--drain", "1ms", "--watch", "50ms") as (process, told):
        shutil.copytree(toml.parent, models / "net" / ".2")
        (models / "net" / ".2").rename(models / "net" / "2")
        while json.loads(call(str(told["http"]), "GET", "/v2/models/net")[2])["versions"] != ["2"]:
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def test_no_port_is_bound_where_no_model_can_be_loaded(toml: Path, tmp_path: Path) -> None:
    broken = tmp_path / "models" / "net"
    broken.mkdir(parents=True)
    (broken / "deployment.toml").write_text(toml.read_text())
    command = [sys.executable, "-m", "hasten", "serve", str(tmp_path / "models"), "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout) == (1, "")
    last = done.stderr.splitlines()[-1]
    assert last.startswith("hasten: error: no model could be loaded: net")


def test_a_port_that_is_taken_is_named(toml: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "hasten", "serve", str(toml), "--port", str(port), "--grpc-port", "0"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 1
        assert f"127.0.0.1:{port}" in done.stderr


@pytest.mark.parametrize("port", [-1, 65_536, 70_000])
def test_a_server_listens_at_ports_that_there_are(port: int) -> None:
    for ports in ({"port": port}, {"grpc_port": port}):
        with pytest.raises(InvalidSetting, match=f"port is {port}, and must be 0 to 65535"):
            Listening(**ports)


@pytest.mark.parametrize("transport", ["fast", "library"])
def test_the_access_log_is_appended_to_a_file(toml: Path, tmp_path: Path, transport: str) -> None:
    log = tmp_path / "access.jsonl"
    words = ["--drain", "1ms", "--transport", transport, "--access-log", str(log)]
    with serving(toml, *words) as (process, told):
        assert call(str(told["http"]), "GET", "/v2", None, {"X-Request-Id": "mine"})[0] == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    (line,) = log.read_text().splitlines()
    found = json.loads(line)
    assert (found["id"], found["method"], found["target"], found["status"]) == ("mine", "GET", "/v2", 200)
    assert found["sent_bytes"] > 20
    assert found["duration_ms"] > 0


def test_standard_output_has_the_document_and_the_access_log_and_nothing_that_a_step_prints(tmp_path: Path) -> None:
    code = tmp_path / "code"
    code.mkdir()
    (code / "loud.py").write_text(
        "print('imported', flush=True)\n\ndef same(values):\n    return {'x': values['raw']}\n"
    )
    tensor = {"dtype": "float32", "shape": [16]}
    step = {
        "step": "function",
        "function": "loud.py:same",
        "reads": [{"name": "raw", **tensor}],
        "makes": [{"name": "x", **tensor}],
    }
    path = bundle(tmp_path / "net", pre=(step,))
    with serving(path, "--drain", "1ms", "--allow-code", str(code), "--access-log=-") as (process, told):
        assert call(str(told["http"]), "GET", "/v2", None)[0] == 200
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert json.loads(out.partition(b"\n")[0])["target"] == "/v2"
    assert b"imported" not in out
    assert b"imported\n" in err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is full: Linux has one")
def test_an_access_log_on_a_full_disk_changes_neither_the_answers_nor_the_end(toml: Path) -> None:
    with serving(toml, "--drain", "1ms", "--access-log", "/dev/full") as (process, told):
        for _ in range(3):
            assert call(str(told["http"]), "GET", "/v2", None)[0] == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def test_calls_over_grpc_are_in_the_access_log_too(toml: Path, tmp_path: Path) -> None:
    log = tmp_path / "access.jsonl"
    with serving(toml, "--drain", "1ms", "--access-log", str(log)) as (process, told):
        with grpc.insecure_channel(str(told["grpc"]).removeprefix("grpc://")) as channel:
            for name, good in (("ServerLive", True), ("Nothing", False)):
                ask = channel.unary_unary(f"/inference.GRPCInferenceService/{name}")
                try:
                    ask(b"", metadata=[("x-request-id", name)], timeout=30)
                except grpc.RpcError as error:
                    assert not good
                    assert error.code() is grpc.StatusCode.UNIMPLEMENTED  # type: ignore[attr-defined]
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    first, second = (json.loads(line) for line in log.read_text().splitlines())
    assert (first["id"], first["target"], first["grpc_status"]) == (
        "ServerLive",
        "/inference.GRPCInferenceService/ServerLive",
        0,
    )
    assert first["sent_bytes"] == 2
    assert first["peer"] == "127.0.0.1"
    assert (second["id"], second["grpc_status"]) == ("Nothing", 12)


@pytest.mark.parametrize("transport", ["fast", "library"])
def test_over_tls_it_answers_those_who_trust_its_certificate(toml: Path, tmp_path: Path, transport: str) -> None:
    cert, key = certificate(tmp_path)
    with serving(
        toml, "--drain", "1ms", *("--tls-cert", str(cert), "--tls-key", str(key), "--transport", transport)
    ) as (process, told):
        assert str(told["http"]).startswith("https://127.0.0.1:")
        trusting = grpc.ssl_channel_credentials(cert.read_bytes())
        with grpc.secure_channel(str(told["grpc"]), trusting) as channel:
            assert channel.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=30) == b"\x08\x01"
        words = ["conformance", str(told["http"]), "--grpc", str(told["grpc"]), "--certificate", str(cert)]
        assert run([*words, "--only", "live"]) == 0, "checks go over TLS on both sides"
        calls = told["calls"]
        assert isinstance(calls, list)
        for line in calls:
            done = subprocess.run(["bash", "-c", line], capture_output=True, check=True, timeout=60)
            assert b'"model_name"' in done.stdout
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


@pytest.mark.parametrize("transport", ["fast", "library"])
def test_two_servers_on_one_port_both_answer_where_they_were_told_to_share_it(toml: Path, transport: str) -> None:
    told: dict[str, object]
    share = ("--drain", "1ms", "--reuse-port", "--transport", transport)
    with serving(toml, *share) as (first, told):
        ports = [urlsplit(f"//{str(told[key]).rpartition('//')[2]}").port for key in ("http", "grpc")]
        with serving(toml, *share, port=int(ports[0] or 0), grpc_port=int(ports[1] or 0)) as (second, again):
            assert (told["http"], told["grpc"]) == (again["http"], again["grpc"])
            for process in (first, second):  # whoever is left answers all
                for _ in range(10):
                    assert call(str(told["http"]), "POST", INFER, infer_body(rows_of(1)))[0] == 200
                    with grpc.insecure_channel(str(told["grpc"]), [("grpc.use_local_subchannel_pool", 1)]) as channel:
                        assert channel.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=30) == b"\x08\x01"
                process.send_signal(signal.SIGTERM)
                assert process.wait(60) == 0


def test_one_half_of_tls_is_a_usage_error(toml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["serve", str(toml), "--tls-cert", "cert.pem", "--port", "0", "--grpc-port", "0"]) == 2
    assert "--tls-key" in capsys.readouterr().err


def test_without_the_extra_it_says_what_to_install(toml: Path) -> None:
    code = (
        "import sys; sys.modules['httptools'] = None\n"
        f"from hasten.cli.app import run; sys.exit(run(['serve', {str(toml)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env={**os.environ})
    assert done.returncode == 1
    assert "pip install 'hasten[serve]'" in done.stderr
