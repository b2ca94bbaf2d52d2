"""The generator against real servers: every protocol, open and closed loops, several processes."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("httptools", reason="needs the extra 'serve'")
pytest.importorskip("grpc", reason="needs the extra 'serve'")

from hasten.errors import BadInput, BadRequest, InvalidSetting, ModelNotFound, NoAnswer
from hasten.load.arrivals import read_arrivals
from hasten.load.clock import precise_loop
from hasten.load.connect import Place
from hasten.load.figures import figures_of, why_invalid
from hasten.load.generate import generate, open_load
from hasten.load.http1 import Http1Sender
from hasten.load.objective import Objective
from hasten.load.payloads import payloads_of, payloads_of_files, probe, probe_http
from hasten.load.record import read_run, write_run
from hasten.load.run import PHASES, LoadRun
from hasten.load.target import LoadPlan, Protocol, Target
from hasten.load.worker import pack, read_target, unpack, write_target
from hasten.samples import Samples
from hasten.serve.app import Listening, Open
from load.raw_server import ANSWER, raw_server
from serve.bundles import bundle
from serve.served import rows_of, served

OK, REFUSED, TIMEOUT, ERROR, UNSENT = range(5)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle(tmp_path_factory.mktemp("load") / "net")


@pytest.fixture(scope="module")
def opened(place: Path) -> Iterator[Open]:
    with served(place, Listening(port=0, grpc_port=0)) as found:
        yield found


@pytest.fixture
def samples() -> Samples:
    return Samples({"x": rows_of(20)})


def target(opened: Open, protocol: Protocol, place: Path) -> Target:
    port = str(opened.grpc).rpartition(":")[2]
    url = {"grpc": f"grpc://127.0.0.1:{port}", "session": str(place)}.get(protocol, opened.http)
    return Target(url=url, protocol=protocol, model="net")


def plan(line: str, duration_s: float = 0.5, timeout_s: float = 20.0) -> LoadPlan:
    return LoadPlan(arrivals=read_arrivals(line), duration_s=duration_s, timeout_s=timeout_s)


def http(url: str) -> Target:
    return Target(url=url, protocol="http")


def run_raw(url: str, line: str, duration_s: float = 0.5, timeout_s: float = 20.0) -> LoadRun:
    goal = http(url)
    return generate(goal, plan(line, duration_s, timeout_s), payloads_of_files(goal, []))


@pytest.mark.parametrize("protocol", ["rest-json", "rest-binary", "grpc", "session"])
def test_every_request_of_a_plan_is_sent_and_answered(
    protocol: Protocol, opened: Open, place: Path, samples: Samples, tmp_path: Path
) -> None:
    goal = target(opened, protocol, place)
    with open_load(goal, payloads_of(goal, samples, batch=2)) as load:
        run = load.run(plan("poisson:rate=100"))
        again = load.run(plan("closed:concurrency=3"))
    requests = run.requests
    np.testing.assert_array_equal(requests.scheduled_ns, read_arrivals("poisson:rate=100").due_ns(0.5, 0))
    assert (requests.outcome == OK).all()
    assert (requests.sent_ns >= requests.scheduled_ns).all()
    assert (requests.first_ns >= requests.sent_ns).all()
    assert (requests.done_ns >= requests.first_ns).all()
    assert set(requests.rows) == {2}
    assert set(requests.sample) <= set(range(10))
    assert run.cut_short is None
    assert (again.requests.outcome == OK).all()
    assert len(again.requests.outcome) > 3
    write_run(run, tmp_path)
    assert read_run(tmp_path).arrivals == "poisson:rate=100"


@pytest.mark.parametrize("protocol", ["rest-json", "rest-binary"])
def test_the_phases_that_a_server_tells_are_kept(
    protocol: Protocol, opened: Open, place: Path, samples: Samples
) -> None:
    goal = target(opened, protocol, place)
    requests = generate(goal, plan("poisson:rate=50"), payloads_of(goal, samples)).requests
    told = requests.phases_ns[:, : len(PHASES) - 1]
    assert (told >= 0).all()
    assert (told.sum(axis=1) <= requests.done_ns - requests.sent_ns).all()


def test_statuses_are_those_of_the_protocol(opened: Open, place: Path, samples: Samples) -> None:
    for protocol, status in (("rest-json", 200), ("grpc", 0)):
        goal = target(opened, protocol, place)  # type: ignore[arg-type]
        assert set(generate(goal, plan("constant:rate=20"), payloads_of(goal, samples)).requests.status) == {status}


def test_several_processes_share_one_plan(opened: Open, place: Path, samples: Samples) -> None:
    goal = target(opened, "rest-binary", place)
    told: list[tuple[int, int, float]] = []
    with open_load(goal, payloads_of(goal, samples), processes=2) as load:
        run = load.run(plan("poisson:rate=100", 0.8), progress=lambda *args: told.append(args))
        closed = load.run(plan("closed:concurrency=3", 0.3))
        lone = load.run(plan("closed:concurrency=1", 0.3))
    np.testing.assert_array_equal(run.requests.scheduled_ns, read_arrivals("poisson:rate=100").due_ns(0.8, 0))
    assert (run.requests.outcome == OK).all()
    assert run.conditions["generator"]["processes"] == 2  # type: ignore[index, call-overload]
    assert told
    assert told[-1][0] <= len(run.requests.outcome)
    assert (closed.requests.outcome == OK).all()
    assert (np.diff(closed.requests.scheduled_ns) >= 0).all()
    assert overlap(lone) == 1


def overlap(run: LoadRun) -> int:
    """Give how many requests were under way at once, at most."""
    requests = run.requests
    edges = [(at, 1) for at in requests.scheduled_ns.tolist()] + [(at, -1) for at in requests.done_ns.tolist()]
    most = now = 0
    for _, step in sorted(edges):
        now += step
        most = max(most, now)
    return most


def test_a_closed_loop_has_as_many_under_way_as_it_says(opened: Open, place: Path, samples: Samples) -> None:
    goal = target(opened, "rest-binary", place)
    assert overlap(generate(goal, plan("closed:concurrency=4"), payloads_of(goal, samples))) == 4


def test_a_closed_loop_needs_no_more_connections_than_requests_under_way() -> None:
    with raw_server() as server:
        run = run_raw(server.url, "closed:concurrency=3", 0.3)
        assert (run.requests.outcome == OK).all()
        assert server.connections <= 3 + 1  # and the one of before the run


def test_calls_that_a_connection_has_no_room_for_open_another(opened: Open, place: Path, samples: Samples) -> None:
    goal = target(opened, "grpc", place)
    run = generate(goal, plan("closed:concurrency=300", 0.3), payloads_of(goal, samples))
    assert set(run.requests.outcome) <= {OK, REFUSED}
    assert (run.requests.outcome == OK).sum() >= 300


def test_a_large_message_goes_through_the_windows_of_http2(opened: Open, place: Path) -> None:
    samples = Samples({"x": rows_of(60_000)})  # 3.8 MB: many frames, and more than the first windows
    goal = target(opened, "grpc", place)
    run = generate(goal, plan("constant:rate=4"), payloads_of(goal, samples, batch=60_000))
    assert set(run.requests.status) <= {0, 3, 8, 14}  # answered, or refused: not lost
    assert (run.requests.done_ns > 0).all()


def test_requests_that_are_due_while_a_server_stalls_are_charged_for_it() -> None:
    """One connection stalls for good; the others are answered: an open loop goes on, and times out just that one."""
    with raw_server(lambda k: b"" if k == 5 else ANSWER) as server:
        run = run_raw(server.url, "constant:rate=40", 1.0, timeout_s=0.5)
    assert (run.requests.outcome == TIMEOUT).sum() == 1
    assert (run.requests.outcome == OK).sum() == 39
    assert run.requests.done_ns[run.requests.outcome == TIMEOUT].tolist() == [-1]


@pytest.mark.parametrize(
    ("said", "outcome", "status"),
    [
        (b"HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n", REFUSED, 503),
        (b"HTTP/1.1 429 No\r\nContent-Length: 0\r\n\r\n", REFUSED, 429),
        (b"HTTP/1.1 504 No\r\nContent-Length: 0\r\n\r\n", TIMEOUT, 504),
        (b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n", ERROR, 500),
        (b"HTTP/1.1 204 No\r\n\r\n", OK, 204),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", OK, 200),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok", OK, 200),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", OK, 200),
        (b"rubbish\r\n\r\n", ERROR, -1),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 80_000, ERROR, -1),
    ],
)
def test_what_a_server_says_is_an_outcome_and_ends_nothing(said: bytes, outcome: int, status: int) -> None:
    with raw_server(lambda k: said if k == 4 else ANSWER) as server:
        run = run_raw(server.url, "constant:rate=40")
    found = run.requests.outcome.tolist()
    assert sorted(found) == sorted([outcome] + [OK] * 19)
    assert status in run.requests.status
    assert run.cut_short is None
    assert bool(run.conditions["errors"]) == (outcome == ERROR and status == -1)


def test_a_request_on_a_kept_connection_that_closes_is_sent_once_more() -> None:
    """The server may have closed it before the request came: a client cannot know."""
    with raw_server(lambda k: None if k == 4 else ANSWER) as server:
        run = run_raw(server.url, "constant:rate=40")
        assert server.requests == 21
    assert (run.requests.outcome == OK).all()


def test_a_server_that_closes_new_connections_without_a_word_gives_errors() -> None:
    with raw_server(lambda k: None) as server:
        run = run_raw(server.url, "constant:rate=40")
    assert (run.requests.outcome == ERROR).all()
    assert "closed the connection without a word" in run.conditions["errors"]  # type: ignore[operator]


def test_the_next_address_of_a_name_is_tried_where_nobody_listens_at_the_first() -> None:
    """As of localhost, which may be ::1 and 127.0.0.1, and one of them is served."""
    with raw_server() as server:
        loop = precise_loop()

        async def found(host: str, port: int, **more: object) -> list[tuple[object, ...]]:
            kind = (socket.AF_INET, socket.SOCK_STREAM, 6, "")
            return [(*kind, ("127.0.0.2", port)), (*kind, ("127.0.0.1", port))]

        loop.getaddrinfo = found  # type: ignore[method-assign, assignment]
        sender = Http1Sender(http(f"http://somewhere:{server.port}"), payloads_of_files(http(server.url), []), loop)
        loop.run_until_complete(sender.open())
        assert sender._place == Place("127.0.0.1", server.port, socket.AF_INET)
        while not server.connections:  # it takes in what was opened, in its own thread
            loop.run_until_complete(asyncio.sleep(0))
        sender.close()
        while sender._open:
            loop.run_until_complete(asyncio.sleep(0))
        loop.close()


def test_what_waits_for_a_connection_waits_for_the_server_and_not_for_the_generator() -> None:
    """The pool is full since a server hangs: the generator was on time, and the requests are misses."""
    with raw_server(lambda k: b"") as server:
        goal = Target(url=server.url, protocol="http", connections=1)
        run = generate(goal, plan("constant:rate=40", 0.5, 0.5), payloads_of_files(goal, []))
    assert (run.requests.outcome == TIMEOUT).all()
    assert (run.requests.sent_ns >= run.requests.scheduled_ns).all()
    assert why_invalid(run, Objective(q=0.9, limit_ns=10e9)) is None


def test_an_answer_that_ends_with_its_connection_is_whole() -> None:
    with raw_server(lambda k: b"HTTP/1.1 200 OK\r\n\r\nok", closes=True) as server:
        run = run_raw(server.url, "constant:rate=20")
    assert (run.requests.outcome == OK).all()


def test_a_server_that_dies_ends_the_run_and_what_was_measured_is_kept() -> None:
    with raw_server(dies_after=30) as server:
        run = run_raw(server.url, "constant:rate=100", 30.0, timeout_s=2.0)
    assert run.cut_short is not None
    assert "nobody listens there" in run.cut_short
    counts = np.bincount(run.requests.outcome, minlength=5)
    assert counts[OK] == 30
    assert counts[UNSENT] > 2000
    assert figures_of(run).sent_rate == pytest.approx(100, rel=0.3)


def test_a_run_that_is_interrupted_keeps_what_was_measured() -> None:
    with raw_server() as server:
        goal = http(server.url)
        with open_load(goal, payloads_of_files(goal, [])) as load:
            stop = lambda *told: os.kill(load._children[0].pid, signal.SIGINT)  # noqa: E731
            run = load.run(plan("constant:rate=50", 60.0), progress=stop)
            again = load.run(plan("constant:rate=50", 0.2))
    assert run.cut_short == "it was stopped"
    assert (run.requests.outcome == OK).any()
    assert (run.requests.outcome == UNSENT).sum() > 1000
    assert (again.requests.outcome == OK).all()


def test_nobody_listening_is_one_line(free_port: int, samples: Samples) -> None:
    for protocol, scheme in (("rest-json", "http"), ("grpc", "grpc")):
        goal = Target(url=f"{scheme}://127.0.0.1:{free_port}", protocol=protocol, model="net")  # type: ignore[arg-type]
        with pytest.raises(NoAnswer, match="nobody listens there"):
            open_load(goal, payloads_of(goal, samples))


def test_grpc_load_on_a_port_that_speaks_http_1_is_one_line(opened: Open, samples: Samples) -> None:
    goal = Target(url=opened.http.replace("http", "grpc"), protocol="grpc", model="net")
    with pytest.raises(NoAnswer, match="is it a gRPC port"):
        open_load(goal, payloads_of(goal, samples))


def test_a_probe_tells_of_a_model_that_is_not_there_and_of_samples_that_do_not_fit(
    opened: Open, place: Path, samples: Samples
) -> None:
    goal = Target(url=opened.http, model="other")
    with pytest.raises(ModelNotFound, match="other"):
        probe(goal, samples)
    with pytest.raises(BadRequest):
        probe(target(opened, "rest-binary", place), Samples({"y": rows_of(3)}))


def test_a_probe_of_an_endpoint_tells_what_it_answers() -> None:
    with raw_server(lambda k: b"HTTP/1.1 404 No\r\nContent-Length: 4\r\n\r\ngone") as server:
        goal = http(server.url)
        with pytest.raises(NoAnswer, match="status 404: b'gone'"):
            probe_http(goal, payloads_of_files(goal, [])[0], timeout_s=5.0)


def test_an_endpoint_gets_each_files_bytes_by_its_method_and_path(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / name).write_bytes(name.encode() * 3)
    with raw_server() as server:
        goal = Target(url=f"{server.url}/score?x=1", protocol="http", verb="PUT", headers={"X-Word": "yes"})
        payloads = payloads_of_files(goal, sorted(tmp_path.iterdir()))
        run = generate(goal, plan("constant:rate=40"), payloads)
        assert set(server.seen) == {b"aaa", b"bbb", b"ccc"}
    assert (run.requests.outcome == OK).all()
    assert isinstance(payloads[0].data, bytes)
    assert payloads[0].data.startswith(b"PUT /score?x=1 HTTP/1.1\r\nHost: 127.0.0.1:")
    assert b"X-Word: yes\r\n" in payloads[0].data


@pytest.mark.parametrize(
    "wrong",
    [
        {"verb": "HEAD"},
        {"headers": {"X": "a\r\nY: b"}},
        {"url": "http://127.0.0.1:1/a b"},
    ],
)
def test_what_cannot_stand_in_a_request_is_refused(wrong: dict[str, object]) -> None:
    told = {"url": "http://127.0.0.1:1/", "protocol": "http", **wrong}
    with pytest.raises(InvalidSetting):
        payloads_of_files(Target(**told), [])  # type: ignore[arg-type]


def test_payloads_are_drawn_without_repeating_a_sample_before_all_were(samples: Samples) -> None:
    goal = Target(url="http://127.0.0.1:1", model="net", protocol="session")
    drawn = payloads_of(goal, samples, batch=2)
    rows = np.concatenate([payload.data["x"] for payload in drawn])  # type: ignore[index, call-overload]
    assert len(drawn) == 10
    np.testing.assert_array_equal(np.sort(rows, axis=0), np.sort(rows_of(20), axis=0))
    assert len(payloads_of(goal, samples, distinct=3)) == 3


def test_payloads_that_are_too_large_together_are_fewer_and_one_that_is_alone_is_refused(
    samples: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    goal = Target(url="http://127.0.0.1:1", model="net")
    one = len(payloads_of(goal, samples, distinct=1)[0].data)
    monkeypatch.setattr("hasten.load.payloads.LARGEST_PAYLOADS_BYTES", 3 * one + 10)
    assert len(payloads_of(goal, samples)) == 3
    with pytest.raises(BadInput, match="the limit is"):
        payloads_of(goal, samples, batch=20)


def test_payloads_and_targets_come_through_to_the_child_whole(samples: Samples) -> None:
    for protocol in ("session", "rest-json"):
        goal = Target(url="http://127.0.0.1:1", model="net", protocol=protocol, certificate=Path("a.pem"), api_key="k")  # type: ignore[arg-type]
        assert read_target(write_target(goal)) == goal
        payloads = payloads_of(goal, samples, batch=2)
        for back, there in zip(unpack(pack(payloads), 2), payloads, strict=True):
            if isinstance(there.data, bytes):
                assert back == there
            else:
                np.testing.assert_array_equal(back.data["x"], there.data["x"])  # type: ignore[index, call-overload]


@pytest.mark.parametrize("name", ["duration_s", "timeout_s"])
def test_a_time_that_is_none_is_refused(name: str) -> None:
    told = {"duration_s": 1.0, "timeout_s": 1.0, name: float("nan")}
    with pytest.raises(InvalidSetting, match=name):
        LoadPlan(arrivals=read_arrivals("poisson:rate=1"), **told)
