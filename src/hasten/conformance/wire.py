"""HTTP as a check needs it: one request on one connection, all of its answer within one deadline, nothing interpreted.

The answer is parsed by ``http.client``; time and size are bounded here, so that a server that hangs, drips or floods is
a check that is not met.
"""

from __future__ import annotations

import contextlib
import io
import json
import socket
import ssl
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.client import HTTPException, HTTPResponse
from time import monotonic
from typing import Any, overload

from hasten.errors import HastenError

LARGEST_ANSWER_BYTES = 64 * 2**20
READ_BYTES = 64 * 2**10


class NotMet(HastenError):
    """The server does otherwise than it should; says what it did."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came back: ``said`` is the request's line, for messages."""

    said: str
    status: int
    headers: Mapping[str, str]
    """By their names in lower case."""
    body: bytes

    def json(self) -> Any:
        """Give the body as JSON. Raises NotMet."""
        return parsed(self.said, self.body)

    def object(self) -> dict[str, Any]:
        """Give the body as a JSON object. Raises NotMet."""
        return typed(self.json(), dict, f"the body of {self.said}")


@dataclass(frozen=True, kw_only=True)
class Http:
    """The server's HTTP side. Every request has a connection of its own."""

    host: str
    port: int
    tls: ssl.SSLContext | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    """Sent with every request: a key."""
    timeout_s: float = 10.0
    """For all of a request and its answer."""

    def get(self, path: str) -> Answer:
        """Send a GET. Raises NotMet: no answer came."""
        return self.send("GET", path)

    def post(self, path: str, body: bytes, headers: Mapping[str, str] | None = None) -> Answer:
        """Send a POST of JSON unless ``headers`` say otherwise. Raises NotMet."""
        return self.send("POST", path, body, {"Content-Type": "application/json", **(headers or {})})

    def send(self, verb: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None) -> Answer:
        """Send a request and read its answer.

        Raises:
            NotMet: the server closed the connection, was silent for too long, or what it said is no HTTP.
        """
        return self.send_all([(verb, path, body, headers or {})])[0]

    def send_all(
        self, requests: Sequence[tuple[str, str, bytes | None, Mapping[str, str]]], *, keep: bool = False
    ) -> list[Answer]:
        """Send requests over one connection, each after the answer to the one before. Raises NotMet."""
        end_s = monotonic() + self.timeout_s
        said = f"{requests[0][0]} {requests[0][1]}"
        try:
            with self._connected() as connection:
                found = []
                for verb, path, body, headers in requests:
                    said = f"{verb} {path}"
                    head = self._head(verb, path, body, headers, keep=keep)
                    # A server may refuse before it has read everything; its answer counts all the same.
                    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                        connection.sendall(head + (body or b""))
                    found.append(_read(said, connection, end_s, verb))
                return found
        except TimeoutError as error:
            raise NotMet(f"{said}: no answer within {self.timeout_s:g} s") from error
        except (OSError, UnicodeError, HTTPException) as error:
            raise NotMet(f"{said}: no answer: {type(error).__name__}: {error}".rstrip(": ")) from error

    @contextlib.contextmanager
    def _connected(self) -> Iterator[socket.socket]:
        with socket.create_connection((self.host, self.port), self.timeout_s) as plain:
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self.tls is None:
                yield plain
            else:
                with self.tls.wrap_socket(plain, server_hostname=self.host) as wrapped:
                    yield wrapped

    def _head(self, verb: str, path: str, body: bytes | None, headers: Mapping[str, str], *, keep: bool) -> bytes:
        host = f"[{self.host}]" if ":" in self.host else self.host
        lines = {"Host": f"{host}:{self.port}", "Accept": "*/*", **self.headers, **headers}
        if body is not None:
            lines.setdefault("Content-Length", str(len(body)))
        if not keep:
            lines["Connection"] = "close"
        text = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        return f"{verb} {path} HTTP/1.1\r\n{text}\r\n".encode("latin-1")


class _Timed(io.RawIOBase):
    """Reads a socket until a point in time."""

    def __init__(self, connection: socket.socket, end_s: float) -> None:
        self._connection = connection
        self._end_s = end_s

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left_s = self._end_s - monotonic()
        if left_s <= 0:
            raise TimeoutError
        self._connection.settimeout(left_s)
        return self._connection.recv_into(buffer)


@dataclass(frozen=True)
class _Readable:
    """The one method that ``HTTPResponse`` wants of a socket. What it reads ahead is lost: one request at a time."""

    connection: socket.socket
    end_s: float

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(_Timed(self.connection, self.end_s))


def _read(said: str, connection: socket.socket, end_s: float, verb: str) -> Answer:
    response = HTTPResponse(_Readable(connection, end_s), method=verb)  # type: ignore[arg-type]
    response.begin()
    body = bytearray()
    while part := response.read(READ_BYTES):
        body += part
        if len(body) > LARGEST_ANSWER_BYTES:
            raise NotMet(f"{said}: the answer has more than {LARGEST_ANSWER_BYTES} bytes")
    headers = {name.lower(): value for name, value in response.getheaders()}
    return Answer(said=said, status=response.status, headers=headers, body=bytes(body))


# what checks say of an answer


def parsed(said: str, text: bytes) -> Any:
    """Read JSON, strictly: no NaN, no name twice. Raises NotMet."""

    def refuse(word: str) -> None:
        raise NotMet(f"{said} answered JSON with {word}, which JSON has not")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        met(len({name for name, _ in pairs}) == len(pairs), f"{said} answered JSON with a name twice: {shown(text)}")
        return dict(pairs)

    try:
        return json.loads(text, parse_constant=refuse, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise NotMet(f"{said} answered what is no JSON: {shown(text)}: {error}") from error


def shown(text: bytes) -> str:
    """Give the beginning of a body for a message."""
    return repr(text[:80].decode("utf-8", "replace")) if text else "an empty body"


def met(holds: bool, otherwise: str) -> None:
    """Go on where ``holds``. Raises NotMet with what the server does instead."""
    if not holds:
        raise NotMet(otherwise)


def status_is(answer: Answer, *wanted: int) -> Answer:
    """Give the answer back where its status is one of those. Raises NotMet."""
    words = " or ".join(map(str, wanted))
    met(answer.status in wanted, f"{answer.said} answered {answer.status}, not {words}: {shown(answer.body)}")
    return answer


@overload
def typed(value: Any, kind: type[dict[str, Any]], what: str) -> dict[str, Any]: ...
@overload
def typed(value: Any, kind: type[list[Any]], what: str) -> list[Any]: ...
@overload
def typed(value: Any, kind: type[str], what: str) -> str: ...
@overload
def typed(value: Any, kind: type[bool], what: str) -> bool: ...
@overload
def typed(value: Any, kind: type[int], what: str) -> int: ...
def typed(value: Any, kind: type[Any], what: str) -> Any:
    """Give ``value`` back where JSON gave it that type. Raises NotMet."""
    fits = isinstance(value, kind) and not (kind is int and isinstance(value, bool))
    met(fits, f"{what} is {_word(value)}, not {_WORDS[kind]}")
    return value


_WORDS: dict[type[Any], str] = {
    dict: "an object",
    list: "an array",
    str: "a string",
    bool: "true or false",
    int: "a whole number",
}


def _word(value: Any) -> str:
    return "absent" if value is None else repr(value)[:60]


def error_told(answer: Answer) -> None:
    """Check that an answer is an error as the specification writes it. Raises NotMet."""
    met(
        answer.status >= 400,
        f"{answer.said} answered {answer.status}, which is no error: {shown(answer.body)}",
    )
    text = typed(answer.object().get("error"), str, f"error in the body of {answer.said} ({answer.status})")
    met(bool(text.strip()), f"error in the body of {answer.said} is empty")
