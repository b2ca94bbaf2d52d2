"""SIGTERM at any moment: during the first load, during another version's, with requests in work."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

pytest.importorskip("httptools", reason="needs the extra 'serve'")
pytest.importorskip("grpc", reason="needs the extra 'serve'")

from hasten.deployment import Serving
from hasten.serve.app import Listening, Open, serve
from hasten.testing.models import mlp
from serve import faulty
from serve.bundles import bundle, rows
from serve.faulty import HANGS
from serve.served import call, infer_body, rows_of

INFER, READY, LOAD = "/v2/models/net/infer", "/v2/health/ready", "/v2/repository/models/net/load"
QUICK = Serving(instances=1, isolation="thread")


@pytest.fixture(autouse=True)
def _as_before(faulty_engine: None) -> Iterator[None]:
    before_s = sys.getswitchinterval()
    yield
    sys.setswitchinterval(before_s)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def served_until_told(path: Path, meanwhile: Callable[[Open], Any], **more: Any) -> tuple[bool, Any]:
    """Serve in this thread, and do ``meanwhile`` in another once it answers; gives what both gave."""
    with ThreadPoolExecutor(1) as pool:
        told: list[Future[Any]] = []
        listening = Listening(port=0, grpc_port=None, **more)
        finished = serve(path, listening, lambda opened: told.append(pool.submit(meanwhile, opened)))
        return finished, told[0].result(30)


def test_during_the_first_load_nothing_is_bound_and_it_ends(tmp_path: Path) -> None:
    path = bundle(tmp_path / "net", engine="faulty", serving=QUICK)
    faulty.may_open.clear()
    announced: list[Open] = []

    def end() -> None:
        assert faulty.opening.wait(30)
        terminate()

    ending = threading.Thread(target=end)
    ending.start()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]  # taken: to bind it would be an error
        assert serve(path, Listening(port=port, grpc_port=None), announced.append)
    ending.join()
    assert announced == []


def test_while_another_version_loads_the_load_is_given_up_and_the_old_one_answers(tmp_path: Path) -> None:
    home = tmp_path / "models"
    bundle(home / "net" / "1", serving=QUICK)

    def meanwhile(opened: Open) -> tuple[tuple[int, dict[str, str], bytes], str]:
        faulty.may_open.clear()
        bundle(home / "net" / "2", model=mlp(seed=1), engine="faulty", serving=QUICK)
        with ThreadPoolExecutor(1) as pool:
            loading = pool.submit(call, opened.http, "POST", LOAD, b"")
            assert faulty.opening.wait(30)
            terminate()
            given_up = loading.result(30)
            answer = call(opened.http, "POST", INFER, infer_body(rows_of(1)))
        return given_up, json.loads(answer[2])["model_version"]

    finished, ((status, _, said), version) = served_until_told(home, meanwhile, drain_s=1.0)
    assert (finished, status, version) == (True, 503, "1")
    assert "the server is ending" in json.loads(said)["error"]


def test_requests_in_work_are_answered_after_the_port_has_closed_and_it_ends_well(tmp_path: Path) -> None:
    path = bundle(tmp_path / "net", engine="faulty", serving=QUICK)
    x = rows(1)
    x[0, 0] = HANGS

    def meanwhile(opened: Open) -> list[int]:
        place = urlsplit(opened.http)
        with ThreadPoolExecutor(5) as pool:
            first = pool.submit(call, opened.http, "POST", INFER, infer_body(x))
            assert faulty.hanging.wait(30)
            waiting = [pool.submit(call, opened.http, "POST", INFER, infer_body(rows_of(1))) for _ in range(4)]
            while opened.service.models()[0].line.batcher.rows < 4:
                continue
            terminate()
            while is_open(str(place.hostname), int(place.port or 0)):
                continue
            faulty.release.set()
            return [asked.result(30)[0] for asked in (first, *waiting)]

    assert served_until_told(path, meanwhile, drain_s=0.05) == (True, [200] * 5)


def is_open(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=30).close()
    except (ConnectionRefusedError, ConnectionResetError):  # reset: it was closed while this one waited to be accepted
        return False
    return True
