"""A small honest server of the protocol, of nothing but the standard library, and servers that break one thing each."""

from __future__ import annotations

import contextlib
import json
import math
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from hasten.conformance.server import Server
from hasten.conformance.wire import Http

WIDTH = 4
METADATA = {
    "name": "net",
    "versions": ["1"],
    "platform": "python",
    "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, WIDTH]}],
    "outputs": [
        {"name": "y", "datatype": "FP32", "shape": [-1, 2]},
        {"name": "n", "datatype": "INT64", "shape": [-1]},
    ],
}


class Wrong(Exception):
    """A request that is refused: status and text."""


def need(holds: bool, text: str, status: int = 400) -> None:
    if not holds:
        raise Wrong(status, text)


def flat(data: Any) -> list[Any]:
    return [item for part in data for item in flat(part)] if isinstance(data, list) else [data]


def no_constant(word: str) -> None:
    raise ValueError(word)


class Honest(BaseHTTPRequestHandler):
    """What the protocol says, and nothing more."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *words: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self.told(lambda: self.got(self.path.rstrip("/")))

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        self.told(lambda: (200, self.infer(self.path, body)))

    def told(self, answer: Callable[[], tuple[int, Any]]) -> None:
        try:
            status, said = answer()
        except Wrong as wrong:
            status, text = wrong.args
            said = self.error(text)
        self.send(status, said)

    def send(self, status: int, said: Any) -> None:
        body = said if isinstance(said, bytes) else json.dumps(said).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def error(self, text: str) -> Any:
        return {"error": text}

    def got(self, path: str) -> tuple[int, Any]:
        if path in ("/v2/health/live", "/v2/health/ready"):
            return 200, {"live": True}
        if path == "/v2":
            return 200, {"name": "small", "version": "1", "extensions": []}
        need(path.startswith("/v2/models/"), "no such path", 404)
        name, *rest = path.removeprefix("/v2/models/").split("/")
        need(rest != ["infer"], "infer is a POST", 405)
        if rest == ["ready"]:
            return self.model_ready(name)
        need(name == "net", f"no model {name}", 404)
        need(rest in ([], ["versions", "1"]), "no such version", 404)
        return 200, self.metadata()

    def model_ready(self, name: str) -> tuple[int, Any]:
        need(name == "net", f"no model {name}", 404)
        return 200, {"name": name, "ready": True}

    def metadata(self) -> Any:
        return METADATA

    def infer(self, path: str, body: bytes) -> Any:
        known = ("/v2/models/net/infer", "/v2/models/net/versions/1/infer")
        need(path in known, "no such model or version", 404)
        try:
            asked = json.loads(body, parse_constant=no_constant)
            need(isinstance(asked, dict), "no object")
            (given,) = asked["inputs"]
            need(given["name"] == "x" and given["datatype"] == "FP32", "the input is x, FP32")
            shape, data = given["shape"], flat(given["data"])
            need(all(type(n) is int and n >= 0 for n in shape) and len(shape) == 2, f"no shape: {shape}")
            need(shape[1] == WIDTH and len(data) == math.prod(shape), "shape and data differ")
            need(all(type(item) in (int, float) for item in data), "no numbers")
            names = [output["name"] for output in asked.get("outputs", METADATA["outputs"])]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise Wrong(400, f"no request: {error!r}") from error
        outputs = [self.output(name, [data[at : at + WIDTH] for at in range(0, len(data), WIDTH)]) for name in names]
        said = {"model_name": "net", "model_version": "1", "outputs": outputs}
        return said | ({"id": asked["id"]} if "id" in asked else {})

    def output(self, name: str, rows: list[list[float]]) -> Any:
        need(name in ("y", "n"), f"no output {name}")
        if name == "n":
            return {"name": "n", "datatype": "INT64", "shape": [len(rows)], "data": [len(row) for row in rows]}
        data = [value for row in rows for value in (sum(row), max(row))]
        return {"name": "y", "datatype": "FP32", "shape": [len(rows), 2], "data": data}


class ErrorsAreOk(Honest):
    """Errors have the status 200."""

    def send(self, status: int, said: Any) -> None:
        super().send(200, said)


class ErrorsAreText(Honest):
    """Errors are no JSON."""

    def error(self, text: str) -> Any:
        return text.encode()


class ErrorsAreDetails(Honest):
    """Errors are JSON of another kind."""

    def error(self, text: str) -> Any:
        return {"detail": [text]}


class ForgetsTheId(Honest):
    """The id does not come back."""

    def infer(self, path: str, body: bytes) -> Any:
        said = super().infer(path, body)
        said.pop("id", None)
        return said


class WrongShape(Honest):
    """An output's shape is transposed, which its elements allow."""

    def output(self, name: str, rows: list[list[float]]) -> Any:
        said = super().output(name, rows)
        return said | {"shape": said["shape"][::-1]} if name == "y" else said


class WrongCount(Honest):
    """An output has an element less than its shape."""

    def output(self, name: str, rows: list[list[float]]) -> Any:
        said = super().output(name, rows)
        return said | {"data": said["data"][:-1]}


class WrongType(Honest):
    """Whole numbers are written as text."""

    def output(self, name: str, rows: list[list[float]]) -> Any:
        said = super().output(name, rows)
        return said | {"data": [str(value) for value in said["data"]]} if name == "n" else said


class SaysNaN(Honest):
    """An output holds NaN, which JSON has not."""

    def output(self, name: str, rows: list[list[float]]) -> Any:
        said = super().output(name, rows)
        return said | {"data": [math.nan for _ in said["data"]]} if name == "y" else said


class SaysTwice(Honest):
    """An answer holds a name twice, of which each reader takes another."""

    def infer(self, path: str, body: bytes) -> Any:
        return json.dumps(super().infer(path, body)).replace("{", '{"model_name": "other", ', 1).encode()


class AlwaysReady(Honest):
    """Every model is ready, whether it is there or not."""

    def model_ready(self, name: str) -> tuple[int, Any]:
        return 200, {"name": name, "ready": True}


class IgnoresOutputs(Honest):
    """All outputs are given, whichever are asked for."""

    def infer(self, path: str, body: bytes) -> Any:
        with contextlib.suppress(ValueError, RecursionError):
            asked = json.loads(body)
            if isinstance(asked, dict) and asked.pop("outputs", None) == [{"name": "y"}]:
                body = json.dumps(asked).encode()
        return super().infer(path, body)


class TakesAnyVersion(Honest):
    """A version that is not there answers all the same."""

    def infer(self, path: str, body: bytes) -> Any:
        return super().infer(path.replace("987654321", "1"), body)


class NoBodies(Honest):
    """Health has no body."""

    def got(self, path: str) -> tuple[int, Any]:
        status, said = super().got(path)
        return status, b"" if "health" in path else said


class UnknownDatatype(Honest):
    """The metadata has a datatype of its own."""

    def metadata(self) -> Any:
        return METADATA | {"outputs": [{"name": "y", "datatype": "float", "shape": [-1, 2]}]}


class ClosesOnInference(Honest):
    """The connection ends where an answer should be."""

    def infer(self, path: str, body: bytes) -> Any:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)
        raise Wrong(500, "nobody reads this")

    def send(self, status: int, said: Any) -> None:
        with contextlib.suppress(OSError):
            super().send(status, said)


class ClaimsEverything(Honest):
    """The extensions are claimed, and none is there."""

    def got(self, path: str) -> tuple[int, Any]:
        if path == "/v2":
            words = ["binary_tensor_data", "statistics", "model_configuration", "model_repository", "schedule_policy"]
            return 200, {"name": "small", "version": "1", "extensions": words}
        return super().got(path)


@contextlib.contextmanager
def small(handler: type[BaseHTTPRequestHandler]) -> Iterator[Server]:
    """Serve in a thread; gives what checks are run on."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield at(server.server_address[1])
        finally:
            server.shutdown()
            thread.join(10)


@contextlib.contextmanager
def raw(talk: Callable[[socket.socket, threading.Event], None]) -> Iterator[Server]:
    """Let ``talk`` have every connection, in a thread each, until the block ends."""
    over = threading.Event()
    threads: list[threading.Thread] = []

    def one(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            talk(connection, over)

    def accept(listening: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listening.accept()
                threads.append(threading.Thread(target=one, args=(connection,)))
                threads[-1].start()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threads.append(threading.Thread(target=accept, args=(listening,)))
        threads[0].start()
        try:
            yield at(listening.getsockname()[1], timeout_s=0.3)
        finally:
            over.set()
            listening.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.join(10)


def at(port: int, *, timeout_s: float = 5.0) -> Server:
    return Server(http=Http(host="127.0.0.1", port=port, timeout_s=timeout_s), model_name="net")
