"""HTTP for blocking clients: ``http.client`` over kept connections. Any thread may send; each uses one of its own."""

from __future__ import annotations

import contextlib
import http.client
import io
import os
import select
import socket
import ssl
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from hasten.client.calls import Buffer, Call, Reply
from hasten.client.values import LARGEST_ANSWER_BYTES, Address
from hasten.errors import BadInput, DeadlineExceeded, NoAnswer

KEPT = 16
"""Connections that are kept open for the next call."""

SMALL_BYTES = 1 << 16
"""A body of up to so much is sent as one piece."""

GONE = (
    BrokenPipeError,
    ConnectionResetError,
    ConnectionAbortedError,
    http.client.RemoteDisconnected,
    ssl.SSLEOFError,
    ssl.SSLZeroReturnError,
)
"""What a kept connection says that the server had closed."""


def trusted(address: Address) -> ssl.SSLContext | None:
    """Give the TLS context of an address; None where it speaks none. Raises BadInput: the certificate is none."""
    if not address.secure:
        return None
    try:
        return ssl.create_default_context(cafile=address.certificate)
    except (OSError, ssl.SSLError) as error:
        raise BadInput(f"{address.certificate} cannot be used as a certificate to trust: {error}") from error


def headers_of(address: Address, call: Call[Any]) -> dict[str, str]:
    """Give the headers of a call, but for Host."""
    found = {**call.headers, "Accept-Encoding": "identity", "Content-Length": str(size_of(call))}
    if address.api_key is not None:
        found["Authorization"] = f"Bearer {address.api_key}"
    return found


def size_of(call: Call[Any]) -> int:
    """Give the bytes of a call's body."""
    return sum(memoryview(part).nbytes for part in call.body)


def check_size(address: Address, claimed_bytes: int) -> None:
    """Check that an answer fits. Raises NoAnswer."""
    if claimed_bytes > LARGEST_ANSWER_BYTES:
        raise NoAnswer(
            f"{address.url} answers with {claimed_bytes} bytes, more than the {LARGEST_ANSWER_BYTES} that are read"
        )


def lost(address: Address, error: BaseException, timeout_s: float) -> NoAnswer | DeadlineExceeded:
    """Say in one line what became of a call that got no answer."""
    if isinstance(error, TimeoutError):
        return DeadlineExceeded(f"{address.url} has not answered in {timeout_s:g} s")
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return NoAnswer(f"{address.url} gives no answer: {' '.join(text.split())}")


def unasked(fileno: int) -> bool:
    """Say whether an idle socket was closed by its peer, or has bytes that answer nothing."""
    poll = select.poll()
    poll.register(fileno, select.POLLIN)
    return bool(poll.poll(0))


class Wire:
    """One open socket, as ``http.client`` uses it: no wait goes past ``until_s``, of ``time.monotonic()``."""

    def __init__(self, sock: socket.socket, until_s: float) -> None:
        self.sock = sock
        self.until_s = until_s
        self.began = False
        """Something of the answer to the call under way has come."""
        self.more = False
        """Something followed an answer that nobody asked for."""

    def sendall(self, data: Buffer) -> None:
        """Send all of it. Raises TimeoutError."""
        view = memoryview(data)
        view = view.cast("B") if view.nbytes else memoryview(b"")
        while view:
            self.wait_until()
            view = view[self.sock.send(view) :]

    def makefile(self, mode: str) -> io.BufferedReader:
        """Give what reads one answer; like a socket's, it keeps the socket open until it is closed itself."""
        return _OneAnswer(_Bounded(self, self.sock.makefile("rb", buffering=0)))

    def close(self) -> None:
        """Close this process's copy; nothing is sent that a process which has another would notice."""
        self.sock.close()

    def wait_until(self) -> None:
        """Let the next wait end when the call's time is over. Raises TimeoutError: it is."""
        self.sock.settimeout(_left(self.until_s))


class _Bounded(io.RawIOBase):
    def __init__(self, wire: Wire, held: io.RawIOBase) -> None:
        self.wire, self.over = wire, False
        self._held = held

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        if self.over:
            return 0
        self.wire.wait_until()
        count = self.wire.sock.recv_into(buffer)
        self.wire.began = self.wire.began or count > 0
        return count

    def close(self) -> None:
        self._held.close()
        super().close()


class _OneAnswer(io.BufferedReader):
    raw: _Bounded

    def close(self) -> None:
        """Notice what is left in the buffer; ``http.client`` closes at the end of the answer."""
        if not self.closed:
            self.raw.over = True  # else an empty buffer would be filled first
            self.raw.wire.more = bool(self.peek(1))
        super().close()


class Response(http.client.HTTPResponse):
    """An answer. What comes before it with a status of 1xx is skipped, not only 100."""

    def begin(self) -> None:
        """Read the head."""
        super().begin()
        while 100 <= self.status < 200 and self.status != http.client.SWITCHING_PROTOCOLS:
            self.headers = None  # type: ignore[assignment]  # what tells begin() that no head was read
            super().begin()


class Connection(http.client.HTTPConnection):
    """One connection, of the process that made it."""

    response_class = Response
    sock: Any

    def __init__(self, address: Address, context: ssl.SSLContext | None, pid: int) -> None:
        super().__init__(address.host, address.port)
        self.default_port = http.client.HTTPS_PORT if address.secure else http.client.HTTP_PORT
        self.pid = pid
        self.until_s = 0.0
        self.wire: Wire | None = None
        self._context = context

    @property
    def usable(self) -> bool:
        """It is this process's own, and nothing has happened on it since its last answer."""
        return self.pid == os.getpid() and self.wire is not None and not unasked(self.wire.sock.fileno())

    @property
    def began(self) -> bool:
        """Something of the answer to the call under way has come."""
        return self.wire is not None and self.wire.began

    @property
    def more(self) -> bool:
        """Something followed the last answer that nobody asked for."""
        return self.wire is not None and self.wire.more

    def connect(self) -> None:
        """Open it by ``until_s``: also where the host has many addresses. Raises OSError, UnicodeError."""
        sock = _dialled(self.host, self.port, self.until_s)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._context is not None:
                sock.settimeout(_left(self.until_s))
                sock = self._context.wrap_socket(sock, server_hostname=self.host)
        except BaseException:
            sock.close()
            raise
        self.sock = self.wire = Wire(sock, self.until_s)

    def bound(self, until_s: float) -> None:
        """Begin a call that ends by then."""
        self.until_s = until_s
        if self.wire is not None:
            self.wire.until_s, self.wire.began = until_s, False


def _left(until_s: float) -> float:
    left_s = until_s - time.monotonic()
    if left_s <= 0:
        raise TimeoutError
    return left_s


def _dialled(host: str, port: int, until_s: float) -> socket.socket:
    failed: OSError = OSError(f"{host} has no address")
    for family, kind, number, _, place in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        sock = socket.socket(family, kind, number)
        try:
            sock.settimeout(_left(until_s))
            sock.connect(place)
        except OSError as error:
            sock.close()
            failed = error
        else:
            return sock
    raise failed


@dataclass(frozen=True)
class Http:
    """Sends calls to one server. A process that is forked opens connections of its own."""

    address: Address
    _context: ssl.SSLContext | None
    _free: deque[Connection] = field(default_factory=deque)

    def send(self, call: Call[Any], timeout_s: float) -> Reply:
        """Send a call and read its whole answer, all within ``timeout_s``; looking up a name may take longer.

        A call over a kept connection that the server had closed before it answered anything is sent once more.

        Raises:
            NoAnswer: nothing came, or no HTTP. DeadlineExceeded: it did not come in time.
        """
        until_s = time.monotonic() + timeout_s
        try:
            kept = self._kept()
            if kept is not None:
                with contextlib.suppress(*GONE):
                    return self._over(kept, call, until_s)
            return self._over(Connection(self.address, self._context, os.getpid()), call, until_s)
        except (OSError, UnicodeError, http.client.HTTPException) as error:
            raise lost(self.address, error, timeout_s) from error

    def close(self) -> None:
        """Close the kept connections. Closing twice is fine."""
        while (kept := self._taken()) is not None:
            kept.close()

    def _kept(self) -> Connection | None:
        while (kept := self._taken()) is not None:
            if kept.usable:
                return kept
            kept.close()
        return None

    def _taken(self) -> Connection | None:
        try:
            return self._free.pop()
        except IndexError:
            return None

    def _over(self, connection: Connection, call: Call[Any], until_s: float) -> Reply:
        kept = False
        try:
            connection.bound(until_s)
            parts = [b"".join(call.body)] if size_of(call) <= SMALL_BYTES else list(call.body)
            connection.request(call.verb, call.target, iter(parts), headers_of(self.address, call))
            answer = connection.getresponse()
            check_size(self.address, answer.length or 0)
            body = answer.read(LARGEST_ANSWER_BYTES + 1) if answer.length is None else answer.read()
            check_size(self.address, len(body))
            kept = not answer.will_close and not connection.more
            return Reply(answer.status, {name.lower(): value for name, value in answer.getheaders()}, body)
        except GONE as error:
            if not connection.began:  # nothing was answered: the call may be sent once more
                raise
            raise NoAnswer(f"{self.address.url} ended its answer early: {error}") from error
        finally:
            if kept and len(self._free) < KEPT:
                self._free.append(connection)
            else:
                connection.close()


def open_http(address: Address) -> Http:
    """Make what sends calls to an address; nothing is connected yet. Raises BadInput."""
    return Http(address, trusted(address))
