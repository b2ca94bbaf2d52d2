"""HTTP for blocking clients: ``http.client`` over kept connections. Any thread may send; each uses one of its own."""

from __future__ import annotations

import http.client
import ssl
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from hasten.client.calls import Call, Reply
from hasten.client.values import LARGEST_ANSWER_BYTES, Address
from hasten.errors import BadInput, DeadlineExceeded, NoAnswer

KEPT = 16
"""Connections that are kept open for the next call."""

SMALL_BYTES = 1 << 16
"""A body of up to so much is sent as one piece."""

GONE = (BrokenPipeError, ConnectionResetError, ConnectionAbortedError, http.client.RemoteDisconnected)
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


@dataclass(frozen=True)
class Http:
    """Sends calls to one server."""

    address: Address
    _context: ssl.SSLContext | None
    _free: deque[http.client.HTTPConnection] = field(default_factory=lambda: deque(maxlen=None))

    def send(self, call: Call[Any], timeout_s: float) -> Reply:
        """Send a call and read its whole answer. ``timeout_s`` bounds each wait for the server.

        A call over a kept connection that the server had closed before it answered anything is sent once more.

        Raises:
            NoAnswer: nothing came, or no HTTP. DeadlineExceeded: nothing came in time.
        """
        while self._free:
            try:
                kept = self._free.pop()
            except IndexError:  # another thread took it
                break
            try:
                return self._over(kept, call, timeout_s)
            except GONE:
                break
            except (OSError, http.client.HTTPException) as error:
                raise lost(self.address, error, timeout_s) from error
        try:
            return self._over(self._connection(timeout_s), call, timeout_s)
        except (OSError, http.client.HTTPException) as error:
            raise lost(self.address, error, timeout_s) from error

    def close(self) -> None:
        """Close the kept connections. Closing twice is fine."""
        while self._free:
            self._free.pop().close()

    def _connection(self, timeout_s: float) -> http.client.HTTPConnection:
        place = (self.address.host, self.address.port)
        if self._context is None:
            return http.client.HTTPConnection(*place, timeout=timeout_s)
        return http.client.HTTPSConnection(*place, timeout=timeout_s, context=self._context)

    def _over(self, connection: http.client.HTTPConnection, call: Call[Any], timeout_s: float) -> Reply:
        kept = False
        try:
            connection.timeout = timeout_s
            if connection.sock is not None:
                connection.sock.settimeout(timeout_s)
            parts = [b"".join(call.body)] if size_of(call) <= SMALL_BYTES else list(call.body)
            connection.request(call.verb, call.target, iter(parts), headers_of(self.address, call))
            answer = connection.getresponse()
            check_size(self.address, answer.length or 0)
            body = _read(self.address, answer)
            kept = not answer.will_close
            return Reply(answer.status, {name.lower(): value for name, value in answer.getheaders()}, body)
        finally:
            if kept and len(self._free) < KEPT:
                self._free.append(connection)
            else:
                connection.close()


def _read(address: Address, answer: http.client.HTTPResponse) -> bytes:
    try:
        if answer.length is not None:
            return answer.read()
        body = answer.read(LARGEST_ANSWER_BYTES + 1)
    except GONE as error:  # it had begun to answer: this is no call to repeat
        raise NoAnswer(f"{address.url} ended its answer early: {error}") from error
    check_size(address, len(body))
    return body


def open_http(address: Address) -> Http:
    """Make what sends calls to an address; nothing is connected yet. Raises BadInput."""
    return Http(address, trusted(address))
