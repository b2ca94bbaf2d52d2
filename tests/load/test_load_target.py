"""Where load goes, and where the generator runs."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conformance.small_server import METADATA, WIDTH, Honest, small
from hasten.cli.app import run
from hasten.cli.load_target import CANNOT_TELL
from hasten.errors import InvalidSetting
from hasten.load.cores import away_from_server, cores_for, server_cores
from hasten.load.target import Protocol, Target


@pytest.mark.parametrize(
    ("url", "path", "authority"),
    [
        ("http://host:9000/score?x=1/2", "/score?x=1/2", "host:9000"),
        ("http://host:9000", "/", "host:9000"),
        ("http://host?x=1", "/?x=1", "host:80"),
        ("https://host/a/b/", "/a/b/", "host:443"),
    ],
)
def test_an_endpoint_is_an_address_and_a_path(url: str, path: str, authority: str) -> None:
    found = Target(url=url, protocol="http")
    assert (found.path, found.address.authority) == (path, authority)


@pytest.mark.parametrize(
    ("url", "protocol"),
    [
        ("grpc://host:1", "rest-json"),
        ("http://host:1", "grpc"),
        ("ftp://host", "http"),
        ("host:80", "http"),
        ("http://user:word@host/", "http"),
    ],
)
def test_an_address_that_does_not_fit_its_protocol_is_refused(url: str, protocol: Protocol) -> None:
    with pytest.raises(InvalidSetting):
        Target(url=url, protocol=protocol, model="net").address  # noqa: B018


def test_a_key_is_in_no_text_of_a_target() -> None:
    assert "secret" not in repr(Target(url="http://host", api_key="secret"))


REMOTE = Target(url="http://192.0.2.1:80")


@pytest.mark.parametrize(
    ("cores", "processes", "found"),
    [({0, 1}, 1, (1,)), ({0, 1}, 2, None), ({3}, 1, None), (set(range(8)), 3, (5, 6, 7)), ({0, 1}, 5, None)],
)
def test_generators_have_the_last_cores_and_leave_one(
    cores: set[int], processes: int, found: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: cores)
    assert cores_for(processes, REMOTE) == found


class TellsNoInputs(Honest):
    """A server whose metadata leaves its tensors out, as KServe's does for a model of one's own."""

    def metadata(self) -> Any:
        return METADATA | {"inputs": [], "outputs": []}


@pytest.mark.parametrize("form", ["npz", "npy"])
def test_a_server_that_tells_no_inputs_gets_those_of_the_file(
    tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / f"x.{form}"
    rows = np.ones((8, WIDTH), np.float32)
    np.savez(data, x=rows) if form == "npz" else np.save(data, rows)
    with small(TellsNoInputs) as server:
        url = f"http://127.0.0.1:{server.http.port}"
        words = ["load", url, "net", "--protocol", "rest-json", "--data", str(data)]
        code = run([*words, "--arrivals", "closed:concurrency=1", "--duration", "300ms", "--home", str(tmp_path)])
    if form == "npz":
        assert code in (0, CANNOT_TELL)
    else:
        assert code == 1
        assert "the server tells no inputs of model 'net'; give --data as .npz" in capsys.readouterr().err


@pytest.fixture
def listening() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as held:
        yield held.getsockname()[1]


def test_the_cores_of_a_server_on_this_machine_are_seen_and_kept_clear(
    listening: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = Target(url=f"http://127.0.0.1:{listening}")
    own = server_cores(target)
    assert own == os.sched_getaffinity(0)
    last = max(own)
    monkeypatch.setattr("hasten.load.cores.server_cores", lambda target: {last})
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {last - 1, last, last - 2})
    assert cores_for(1, target) == (last - 1,)


def test_a_server_elsewhere_has_no_cores_here() -> None:
    assert server_cores(REMOTE) == set()
    assert away_from_server((0,), REMOTE)


def test_a_generator_is_alone_only_where_the_server_surely_runs_elsewhere(
    listening: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = Target(url=f"http://127.0.0.1:{listening}")
    core = max(os.sched_getaffinity(0))
    assert not away_from_server((core,), target)
    monkeypatch.setattr("hasten.load.cores.server_cores", lambda target: {core + 1})
    assert away_from_server((core,), target)
    monkeypatch.setattr("hasten.load.cores.server_cores", lambda target: set())
    assert not away_from_server((core,), target), "it listens here, and nobody can see where"
