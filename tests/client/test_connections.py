"""Which connection a call goes over, and until when: kept ones, forked ones, slow ones, and names that are none."""

from __future__ import annotations

import os
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("httptools", reason="needs the extra 'serve'")

import hasten
from client.blocking import Blocking
from hasten.errors import DeadlineExceeded, InvalidSetting, NoAnswer
from serve.certificates import certificate

BODY = b'{"ready":true}'
READY = b"HTTP/1.1 200 OK\r\nContent-Length: 14\r\n\r\n" + BODY
UNREADY = b"HTTP/1.1 200 OK\r\nContent-Length: 15\r\n\r\n" + b'{"ready":false}'

Peer = Callable[[socket.socket], None]


@contextmanager
def serving(*peers: Peer, tls: ssl.SSLContext | None = None) -> Iterator[int]:
    """Let the n-th peer speak over the n-th connection, each in a thread; gives the port."""
    threads: list[threading.Thread] = []

    def speak(peer: Peer, sock: socket.socket) -> None:
        with sock:
            sock.settimeout(20)
            peer(sock)

    def work() -> None:
        for peer in peers:
            try:
                sock, _ = listening.accept()
            except OSError:  # fewer came than were awaited
                return
            sock.settimeout(20)
            wrapped = sock if tls is None else tls.wrap_socket(sock, server_side=True)
            threads.append(threading.Thread(target=speak, args=(peer, wrapped)))
            threads[-1].start()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        accepting = threading.Thread(target=work)
        accepting.start()
        try:
            yield listening.getsockname()[1]
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            for thread in (accepting, *threads):
                thread.join(30)


@pytest.fixture(params=[hasten.Client, Blocking])
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


def answers(*said: bytes, then: Callable[[], object] = lambda: None) -> Peer:
    """Answer one request with each, then go."""

    def speak(sock: socket.socket) -> None:
        for answer in said:
            sock.recv(1 << 16)
            sock.sendall(answer)
        then()

    return speak


def counting(heard: list[int]) -> Peer:
    """Answer every request, and count them in a new entry."""

    def speak(sock: socket.socket) -> None:
        at = len(heard)
        heard.append(0)
        while sock.recv(1 << 16):
            heard[at] += 1
            sock.sendall(READY)

    return speak


def test_a_forked_process_opens_a_connection_of_its_own_and_leaves_its_parents_alone() -> None:
    heard: list[int] = []
    with serving(counting(heard), counting(heard)) as port, hasten.Client(f"http://127.0.0.1:{port}") as client:
        assert client.ready()
        child = os.fork()
        if child == 0:
            try:
                client.ready(timeout_s=10)
                client.close()
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        assert client.ready()
    assert heard == [2, 1]


def test_over_tls_a_call_after_the_server_closed_an_idle_connection_opens_another(kind: Any, tmp_path: Path) -> None:
    cert, key = certificate(tmp_path)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(cert, key)
    closed = threading.Event()

    def closes(sock: socket.socket) -> None:
        answers(READY)(sock)
        sock.close()
        closed.set()

    def reads_all(sock: socket.socket) -> None:
        heard = b""
        while not heard.endswith(b"{}"):
            heard += sock.recv(1 << 16)
        sock.sendall(READY)

    with (
        serving(closes, reads_all, tls=tls) as port,
        kind(f"https://127.0.0.1:{port}", certificate=cert) as client,
    ):
        assert client.ready()
        assert closed.wait(20)
        client.load("net")  # its body is written after the head: a first write alone meets no error


@pytest.mark.parametrize("turns", [False, True])
def test_bytes_that_nobody_asked_for_are_not_the_next_calls_answer(kind: Any, turns: bool) -> None:
    asked, sent, over = threading.Event(), threading.Event(), threading.Event()

    def speaks_twice(sock: socket.socket) -> None:
        answers(READY)(sock)
        asked.wait(20)
        sock.sendall(UNREADY)
        sent.set()
        over.wait(20)

    with serving(speaks_twice, answers(READY)) as port, kind(f"http://127.0.0.1:{port}") as client:
        assert client.ready()
        asked.set()
        assert sent.wait(20)
        if turns and kind is Blocking:
            client.turn()
        assert client.ready()
        over.set()


def test_a_connection_on_which_more_than_the_answer_came_is_not_kept(kind: Any) -> None:
    with (
        serving(answers(READY + UNREADY[:9], UNREADY[9:]), answers(READY)) as port,
        kind(f"http://127.0.0.1:{port}") as client,
    ):
        assert [client.ready(), client.ready()] == [True, True]


def test_a_call_whose_answer_had_begun_is_not_repeated(kind: Any) -> None:
    heard: list[int] = []
    with (
        serving(answers(READY, b"HTTP/1.1 100 Continue\r\n\r\n"), counting(heard)) as port,
        kind(f"http://127.0.0.1:{port}") as client,
    ):
        assert client.ready()
        with pytest.raises(NoAnswer):
            client.ready()
    assert heard == []


def test_a_server_that_drips_its_answer_does_not_stretch_the_time(kind: Any) -> None:
    left = threading.Event()

    def drips(sock: socket.socket) -> None:
        sock.recv(1 << 16)
        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 214\r\n\r\n")
        for byte in b" " * 200 + BODY:
            left.wait(0.02)
            try:
                sock.sendall(bytes((byte,)))
            except OSError:  # the client has gone, as it should
                return

    with serving(drips) as port, kind(f"http://127.0.0.1:{port}") as client:
        with pytest.raises(DeadlineExceeded, match=r"0\.3 s"):
            client.ready(timeout_s=0.3)
        left.set()


CALLS: dict[str, Callable[..., Any]] = {
    "ready": lambda client, **time: client.ready(**time),
    "metadata": lambda client, **time: client.metadata("net", **time),
    "statistics": lambda client, **time: client.statistics("net", **time),
    "index": lambda client, **time: client.index(**time),
    "load": lambda client, **time: client.load("net", **time),
}


@pytest.mark.parametrize("call", CALLS)
def test_every_call_ends_at_the_time_that_it_was_given(kind: Any, call: str) -> None:
    # The kernel takes the connection, and nobody answers.
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        kind(f"http://127.0.0.1:{silent.getsockname()[1]}") as client,
        pytest.raises(DeadlineExceeded),
    ):
        CALLS[call](client, timeout_s=0.05)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("timeout_s", [0.0, -1.0, float("nan"), float("inf"), 1e15])
def test_a_time_that_is_none_is_refused_by_every_call(kind: Any, call: str, timeout_s: float) -> None:
    with kind("http://127.0.0.1:1") as client, pytest.raises(InvalidSetting, match="timeout_s"):
        CALLS[call](client, timeout_s=timeout_s)


def test_what_comes_before_the_answer_is_skipped(kind: Any) -> None:
    early = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"
    with serving(answers(early + READY, READY)) as port, kind(f"http://127.0.0.1:{port}") as client:
        assert [client.ready(), client.ready()] == [True, True]


@pytest.mark.parametrize("host", ["a..b", "a" * 64 + ".b"])
def test_a_name_that_no_host_can_have_is_no_answer(kind: Any, host: str) -> None:
    with kind(f"http://{host}:8000") as client, pytest.raises(NoAnswer, match=host):
        client.ready()
