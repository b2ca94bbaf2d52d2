"""``hasten load``, ``gate`` and ``compare`` on live services, and what they say of bad input."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("httptools", reason="needs the extra 'serve'")
pytest.importorskip("grpc", reason="needs the extra 'serve'")

from hasten.cli.app import run as hasten
from hasten.load.record import read_run
from hasten.serve.app import Listening, Open
from load.raw_server import ANSWER, raw_server
from serve.bundles import bundle
from serve.served import rows_of, served


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle(tmp_path_factory.mktemp("cli-load") / "net")


@pytest.fixture(scope="module")
def opened(place: Path) -> Iterator[Open]:
    with served(place, Listening(port=0, grpc_port=0)) as found:
        yield found


@pytest.fixture
def data(tmp_path: Path) -> str:
    np.savez(tmp_path / "data.npz", x=rows_of(20))
    return str(tmp_path / "data.npz")


SHORT = ["--arrivals", "constant:rate=50", "--duration", "1s"]


def test_load_says_what_came_back_and_keeps_the_run(
    opened: Open, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["load", opened.http, "net", "--data", data, *SHORT, "-o", str(tmp_path / "run")]
    assert hasten([*words, "--json"]) in (0, 4)  # 4: on a busy machine the generator may be late
    found = json.loads(capsys.readouterr().out)
    assert found["figures"]["ok"] == 50
    assert found["arrivals"] == "constant:rate=50"
    run = read_run(Path(found["record"]))
    assert (run.requests.outcome == 0).all()
    assert hasten(words) in (0, 4)
    shown = capsys.readouterr().out
    for word in ("answered/s", "p50", "p99.9", "459 are needed", "generator's own delay", str(tmp_path / "run")[-20:]):
        assert word in re.sub(r"\s+", " ", shown) or word in shown.replace("\n", "")


def test_load_runs_over_grpc_and_on_a_deployment_in_its_own_process(
    opened: Open, place: Path, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    port = str(opened.grpc).rpartition(":")[2]
    for url, protocol in ((f"grpc://127.0.0.1:{port}", "grpc"), (str(place.parent), "session")):
        assert hasten(["load", url, "net", "--data", data, *SHORT, "--json", "--home", str(tmp_path)]) in (0, 4)
        found = json.loads(capsys.readouterr().out)
        assert (found["protocol"], found["figures"]["ok"]) == (protocol, 50)
        assert Path(found["record"]).parent == tmp_path / "load"


def test_an_objective_gives_the_exit_code(
    opened: Open, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--arrivals", "constant:rate=100", "--duration", "1s", "--home", str(tmp_path), "--json"]
    assert hasten(["load", opened.http, "net", "--data", data, *more, "--slo", "p90 <= 9s"]) == 0
    assert json.loads(capsys.readouterr().out)["figures"]["verdict"]["state"] == "MEETS"


def test_a_server_that_dies_in_the_middle_is_exit_code_1_and_its_run_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with raw_server(dies_after=20) as server:
        words = ["load", server.url, "--protocol", "http", "--arrivals", "constant:rate=100", "--timeout", "2s"]
        assert hasten([*words, "--duration", "20s", "-o", str(tmp_path / "run")]) == 1
    shown = capsys.readouterr().out
    assert "CUT SHORT" in shown
    assert "nobody listens there" in shown
    assert read_run(tmp_path / "run").cut_short is not None


def test_a_scenario_says_which_of_its_rules_a_short_run_breaks(
    opened: Open, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["load", opened.http, "net", "--data", data, "--duration", "500ms", "--home", str(tmp_path)]
    assert hasten([*words, "--scenario", "multi-stream", "--json"]) == 4
    found = json.loads(capsys.readouterr().out)
    assert (found["arrivals"], found["scenario"]["valid"]) == ("closed:concurrency=1", False)
    assert found["figures"]["rows_rate"] >= 7 * found["figures"]["ok_rate"]
    assert hasten([*words, "--scenario", "offline"]) == 4
    assert "at least 600 s" in capsys.readouterr().out
    assert hasten([*words, "--scenario", "server", "--arrivals", "poisson:rate=100"]) == 2
    assert "--slo" in capsys.readouterr().err


def bad(tmp_path: Path) -> str:
    np.savez(tmp_path / "bad.npz", x=np.zeros((4, 3), np.float32))
    return str(tmp_path / "bad.npz")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["{url}", "other", "--data", "{data}"], 1, "no model is called 'other'"),
        (["{url}", "net", "--data", "{bad}"], 2, r"\[batch, 16\]|16"),
        (["{url}", "net"], 2, "needs samples; give them with --data"),
        (["{url}", "--data", "{data}"], 2, "needs the model's name"),
        (["{url}", "net", "--data", "{data}", "--arrivals", "poisson:rat=3"], 2, "write it as poisson:rate=200"),
        (["{url}", "net", "--data", "{data}", "--arrivals", "posson:rate=3"], 2, "did you mean 'poisson'"),
        (["{url}", "net", "--data", "{data}", "--slo", "fast"], 2, "'p99 <= 20ms'"),
        (["{url}", "net", "--data", "{data}", "--batch", "0"], 2, "--batch is 0"),
        (["{url}", "net", "--data", "{data}", "--protocol", "grpc"], 2, "write grpc://HOST:PORT"),
        (["{url}/nothing", "--protocol", "http"], 1, "answers the first request with status 404"),
        (["{url}", "--protocol", "http", "--data", "{data}.none"], 1, "there is no file or folder"),
        (["http://127.0.0.1:{free}", "net", "--data", "{data}"], 1, "gives no answer"),
        (["http://127.0.0.1:{free}", "--protocol", "http"], 1, "gives no answer"),
        (["{rubbish}", "net", "--data", "{data}"], 1, "cannot be read|no answer|no JSON error"),
        (["nonsense", "net", "--data", "{data}"], 2, "no address of a server"),
        (
            ["{url}", "net", "--data", "{data}", "--slo", "p99 <= 20ms", *SHORT],
            1,
            "are 50 requests, and p99 needs 459; use --duration 10s",
        ),
    ],
)
def test_bad_input_is_one_line(
    words: list[str],
    code: int,
    said: str,
    opened: Open,
    data: str,
    free_port: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with raw_server(lambda k: ANSWER) as rubbish:
        told = {"url": opened.http, "data": data, "bad": bad(tmp_path), "free": free_port, "rubbish": rubbish.url}
        typed = [word.format(**told) for word in words]
        assert hasten(["load", *typed, "--home", str(tmp_path)]) == code
    shown = capsys.readouterr().err
    assert re.search(said, shown)
    assert len(shown.strip().splitlines()) == 1
    assert not (tmp_path / "load").exists(), "nothing was measured"


def test_a_gate_puts_load_on_and_judges_it(
    opened: Open, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["gate", opened.http, "net", "--data", data, *SHORT, "--home", str(tmp_path), "--max-errors", "0"]
    assert hasten([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["state"] == "MEETS"
    assert read_run(Path(found["record"])).model == "net"
    assert hasten([*words, "--min-throughput", "5000"]) == 3


def test_two_live_services_are_compared_in_turns(opened: Open, data: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["compare", opened.http, opened.http, "--model", "net", "--data", data, "--blocks", "6", "--block", "200ms"]
    assert hasten([*words, "--arrivals", "constant:rate=50", "--json"]) in (0, 4)
    found = json.loads(capsys.readouterr().out)
    assert found["interleaved"] is True
    names = {item["name"]: item for item in found["compared"]}
    assert names["throughput"]["ratio"]["low"] < 1.1
    assert names["throughput"]["ratio"]["high"] > 0.9


def test_a_service_that_goes_away_ends_a_comparison_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with raw_server() as good, raw_server(dies_after=30) as dying:
        words = ["compare", good.url, dying.url, "--protocol", "http", "--blocks", "6", "--block", "5s"]
        assert hasten([*words, "--arrivals", "constant:rate=50", "--timeout", "1s"]) == 1
    assert "was cut short in block 1" in capsys.readouterr().err
