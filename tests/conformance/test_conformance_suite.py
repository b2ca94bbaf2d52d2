"""The suite lets honest servers through and catches each planted fault by the check that is there for it."""

from __future__ import annotations

import re
import socket
import threading
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from conformance import small_server as servers
from conformance.small_server import raw, small
from hasten.conformance.junit import junit
from hasten.conformance.suite import CHECKS, Result, counts, failures, run

REST = tuple(check for check in CHECKS if "gRPC" not in check.group)


def not_met(results: list[Result]) -> dict[str, str]:
    return {result.check.name: result.says for result in results if result.outcome == "not met"}


def test_checks_have_names_of_their_own_and_say_what_they_check() -> None:
    assert len({check.name for check in CHECKS}) == len(CHECKS)
    assert all(check.text.endswith(".") and check.source for check in CHECKS)
    assert all((check.level == "extension") >= (check.extension is not None) for check in CHECKS)


def test_a_small_honest_server_passes_with_nothing_recommended_missing() -> None:
    with small(servers.Honest) as server:
        results = run(server, REST)
    assert not_met(results) == {}
    assert counts(results)["required"]["met"] > 35
    assert counts(results)["extension"] == {"not offered": sum(check.level == "extension" for check in REST)}


FAULTS = {
    "ErrorsAreOk": ("rest-error-malformed-json", "which is no error"),
    "ErrorsAreText": ("rest-error-malformed-json", "no JSON"),
    "ErrorsAreDetails": ("rest-error-missing-inputs", "error in the body"),
    "ForgetsTheId": ("rest-infer-id", "id is absent"),
    "WrongShape": ("rest-infer", r"shape \[2, 1\]"),
    "WrongCount": ("rest-infer", "elements"),
    "WrongType": ("rest-infer", "INT64, and holds '4'"),
    "SaysNaN": ("rest-infer", "NaN, which JSON has not"),
    "SaysTwice": ("rest-infer", "a name twice"),
    "AlwaysReady": ("rest-unknown-model-is-not-ready", "not that it is not ready"),
    "IgnoresOutputs": ("rest-infer-named-outputs", "asked for is"),
    "TakesAnyVersion": ("rest-error-unknown-version", "which is no error"),
    "NoBodies": ("rest-server-live-body", "an empty body"),
    "UnknownDatatype": ("rest-model-metadata-tensors", "'float'"),
    "ClosesOnInference": ("rest-infer", "no answer"),
    "ClaimsEverything": ("statistics-of-the-model", "answered 404"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught_by_the_check_that_is_there_for_it(fault: str) -> None:
    name, says = FAULTS[fault]
    with small(getattr(servers, fault)) as server:
        results = run(server, REST)
    found = not_met(results)
    assert name in found, found
    assert re.search(says, found[name]), found[name]
    assert name in {result.check.name for result in failures(results)}


@pytest.mark.parametrize("fault", ["ForgetsTheId", "AlwaysReady", "IgnoresOutputs", "TakesAnyVersion"])
def test_a_fault_in_one_thing_leaves_the_other_checks_alone(fault: str) -> None:
    with small(getattr(servers, fault)) as server:
        found = not_met(run(server, REST))
    name = FAULTS[fault][0]
    assert all(other.startswith(name) for other in found), found


def silent(connection: socket.socket, over: threading.Event) -> None:
    over.wait(10)


def closing(connection: socket.socket, over: threading.Event) -> None:
    connection.recv(1)


def dripping(connection: socket.socket, over: threading.Event) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    while not over.wait(0.05):
        connection.sendall(b" ")


def babbling(connection: socket.socket, over: threading.Event) -> None:
    connection.sendall(b"\x00\xff no HTTP at all\r\n\r\n")
    over.wait(10)


def endless_headers(connection: socket.socket, over: threading.Event) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\n")
    while not over.is_set():
        connection.sendall(b"x: y\r\n" * 1000)


def odd_json(connection: socket.socket, over: threading.Event) -> None:
    connection.recv(65536)
    body = b"[" * 100_000
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    over.wait(10)


@pytest.mark.parametrize("talk", [silent, closing, dripping, babbling, endless_headers, odd_json])
def test_a_server_that_hangs_closes_or_babbles_fails_checks_and_stops_nothing(talk) -> None:
    some = [check for check in REST if check.group in ("REST health", "REST")]
    with raw(talk) as server:
        results = run(server, some)
    assert len(results) == len(some)
    assert "rest-server-live-body" in not_met(results)


def test_nobody_listening_is_told_check_by_check(free_port: int) -> None:
    results = run(servers.at(free_port), REST)
    assert all(result.outcome in ("not met", "skipped") for result in results)
    assert "ConnectionRefusedError" in not_met(results)["rest-server-live"]


def test_a_junit_file_has_every_check_and_fails_on_what_counts(tmp_path: Path) -> None:
    with small(servers.ForgetsTheId) as server:
        results = run(server, REST)
    root = ET.fromstring(junit(results))  # noqa: S314 - our own
    assert len(root.findall("testsuite/testcase")) == len(results)
    failed = [case.get("name") for case in root.findall("testsuite/testcase[failure]")]
    assert failed == ["rest-infer-id"]
    assert sum(int(suite.get("failures", "0")) for suite in root) == 1
