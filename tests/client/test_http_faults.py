"""What becomes of a call when the server behaves badly: one line with the address, and no call sent twice wrongly."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("httptools", reason="needs the extra 'serve'")

import hasten
from hasten.client import http as blocking
from hasten.client.calls import numbers_of, phases_of
from hasten.errors import (
    BadRequest,
    DeadlineExceeded,
    HastenError,
    ModelNotReady,
    NoAnswer,
    Overloaded,
    ServeError,
    ServerFault,
)
from hasten.protocol.codes import CODES, Said, error_of_grpc, error_of_http

READY = b"HTTP/1.1 200 OK\r\nContent-Length: 14\r\n\r\n" + b'{"ready":true}'
X = {"x": np.zeros((1, 4), np.float32)}


@contextmanager
def scripted(*connections: list[bytes]) -> Iterator[tuple[str, list[bytes]]]:
    """Answer the k-th request of the n-th connection with the k-th bytes of the n-th list, then close it."""
    heard: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(20)

        def work() -> None:
            for answers in connections:
                peer, _ = listening.accept()
                with peer:
                    peer.settimeout(20)
                    for answer in answers:
                        heard.append(peer.recv(1 << 16))
                        peer.sendall(answer)
                    if not answers:
                        heard.append(peer.recv(1 << 16))

        thread = threading.Thread(target=work)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}", heard
        finally:
            thread.join(30)
    assert not thread.is_alive()


def ask_blocking(url: str, *questions: Callable[[Any], Any]) -> list[Any]:
    with hasten.Client(url) as client:
        return [question(client) for question in questions]


def ask_async(url: str, *questions: Callable[[Any], Any]) -> list[Any]:
    async def work() -> list[Any]:
        async with hasten.AsyncClient(url) as client:
            return [await question(client) for question in questions]

    return asyncio.run(work())


@pytest.fixture(params=[ask_blocking, ask_async])
def ask(request: pytest.FixtureRequest) -> Any:
    return request.param


def ready(client: Any) -> Any:
    return client.ready()


def infer(client: Any) -> Any:
    return client.infer("net", X)


def test_a_connection_is_kept_for_the_next_call(ask: Any) -> None:
    with scripted([READY, READY]) as (url, heard):
        assert ask(url, ready, ready) == [True, True]
    assert len(heard) == 2


def test_a_call_over_a_connection_that_had_been_closed_is_sent_once_more(ask: Any) -> None:
    with scripted([READY], [READY]) as (url, heard):
        assert ask(url, ready, ready) == [True, True]
    assert b"".join(heard).count(b"GET /v2/health/ready") >= 2


def test_a_fresh_connection_that_closes_without_a_word_is_no_answer_and_no_second_try(ask: Any) -> None:
    with scripted([]) as (url, heard):
        with pytest.raises(NoAnswer, match=url):
            ask(url, ready)
        assert len(heard) == 1


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH_9\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{",
        b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nnot json",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999\r\n\r\n{",
        b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 6\r\n\r\n<html>",
        b"HTTP/1.1 200 OK\r\nInference-Header-Content-Length: minus\r\nContent-Length: 2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nInference-Header-Content-Length: 50\r\nContent-Length: 2\r\n\r\n{}",
    ],
)
def test_an_answer_that_cannot_be_read_is_one_line_with_the_address(ask: Any, answer: bytes) -> None:
    with scripted([answer]) as (url, _), pytest.raises(NoAnswer, match=url) as refused:
        ask(url, infer)
    assert isinstance(refused.value, HastenError)
    assert "\n" not in str(refused.value)


def test_a_server_that_says_nothing_is_left_after_the_time(ask: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # the kernel takes the connection, nobody answers
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(DeadlineExceeded, match=url):
            ask(url, lambda client: client.infer("net", X, timeout_s=0.05))


def test_an_answer_that_ends_with_its_connection_is_read(ask: Any) -> None:
    with scripted([b'HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n{"ready":false}']) as (url, _):
        assert ask(url, ready) == [False]


def test_a_refusal_carries_its_reason_and_when_to_come_again(ask: Any) -> None:
    head = b"HTTP/1.1 503 No\r\nX-Reason: queue_full\r\nRetry-After: 7\r\nContent-Length: 18\r\n\r\n"
    with scripted([head + b'{"error": "full"} ']) as (url, _), pytest.raises(Overloaded, match="full") as refused:
        ask(url, infer)
    assert (refused.value.reason, refused.value.retry_after_s) == ("queue_full", 7.0)


def test_every_error_of_a_server_comes_back_as_its_own_class() -> None:
    for kind, code in CODES.items():
        said = Said(text="why", reason=kind.reason)
        assert type(error_of_http(code.http, said)) is kind
        assert type(error_of_grpc(code.grpc, said)) is kind


@pytest.mark.parametrize("reason", ["queue_full", "predicted_wait", "server_full"])
def test_a_bound_that_was_met_is_told_alike_over_both_protocols(reason: str) -> None:
    said = Said(text="full", reason=reason, retry_after_s=2.0)
    for error in (error_of_http(503, said), error_of_grpc(14, said)):
        assert isinstance(error, Overloaded)
        assert (error.reason, error.retry_after_s) == (reason, 2.0)


def test_without_a_reason_the_status_says_which_class() -> None:
    said = Said(text="why")
    found = [type(error_of_http(status, said)) for status in (400, 418, 429, 500, 503, 599)]
    assert found == [BadRequest, BadRequest, Overloaded, ServeError, Overloaded, ServeError]
    named = [Said(text="why", reason=reason) for reason in ("model_not_ready", "server_fault")]
    assert [type(error_of_http(503, said)) for said in named] == [ModelNotReady, ServerFault]


@given(st.text(max_size=60))
def test_any_text_in_server_timing_is_read_or_left_out(text: str) -> None:
    assert all(length >= 0 for length in phases_of(text).values())
    assert phases_of(f"infer;dur=1.5,{text},").get("infer", 0) >= 0
    assert phases_of("queue;dur=0.002, infer;desc=a;dur=1.5") == {"queue": 2000, "infer": 1_500_000}
    assert all(number >= 0 for number in numbers_of(text).values())
    assert numbers_of('infer;dur=1, rows;desc="8", instance;desc="0"') == {"rows": 8, "instance": 0}


def test_connections_that_are_kept_are_closed_with_the_client() -> None:
    with scripted([READY]) as (url, _):
        client = hasten.Client(url)
        assert client.ready()
        sender = client._sender
        assert isinstance(sender, blocking.Http)
        assert len(sender._free) == 1
        client.close()
        client.close()
        assert not sender._free
