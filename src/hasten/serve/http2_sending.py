"""What one HTTP/2 connection sends of its calls: within the peer's windows, and a batch's answers in one write."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final, Protocol

from hasten.protocol import http2_frames as h2
from hasten.protocol.http2_frames import Broken, Code
from hasten.serve.cork import Cork
from hasten.serve.http2_guards import CREDIT_PER_CALL, Credit
from hasten.serve.http2_stream import OPENING, Call

LARGEST_FRAME_BYTES: Final = 2**20
"""Frames that we send are no longer, whatever the peer takes."""


class Open(Protocol):
    """The connection, as its sending side needs it."""

    @property
    def calls(self) -> Mapping[int, Call]:
        """Those that are open; none where the connection is over."""

    def done(self, call: Call) -> None:
        """All of a call was sent."""

    def flushed(self) -> None:
        """What was gathered has been written."""

    def blocked(self) -> None:
        """The windows hold back what a call has to send."""


NO_CALLS: Mapping[int, Call] = MappingProxyType({})


class Gone:
    """No connection any more."""

    def __init__(self) -> None:
        self.calls = NO_CALLS

    def done(self, call: Call) -> None:
        """Nobody hears it."""

    def flushed(self) -> None:
        """Nothing was written."""

    def blocked(self) -> None:
        """There is nobody to wait for."""


GONE: Final = Gone()


class Sending:
    """Windows (RFC 9113, 6.9) and frames of what goes out."""

    __slots__ = (
        *("_clock_s", "_connection", "_cork", "_credit", "_frame_bytes", "_gathered", "_held", "_window", "_write"),
        *("paused", "unread_s"),
    )

    def __init__(
        self,
        connection: Open,
        *,
        cork: Cork,
        credit: Credit,
        write: Callable[[bytes], object],
        clock_s: Callable[[], float],
    ) -> None:
        self._connection: Open = connection
        self._cork = cork
        self._credit = credit
        self._write = write
        self._window = h2.FIRST_WINDOW
        self._frame_bytes = h2.FIRST_FRAME_BYTES
        self._held: list[Call] = []
        self._gathered: list[bytes] | None = None
        self._clock_s = clock_s
        self.unread_s: dict[int, float] = {}
        """Calls that the windows hold back, by number, and when they last sent a piece."""
        self.paused = False
        """The client does not read."""

    @property
    def gathers(self) -> bool:
        """What is written now goes out later, together."""
        return self._gathered is not None

    def write(self, data: bytes) -> None:
        """Write frames, behind what was gathered."""
        if self._gathered is not None:
            self._gathered.append(data)
        else:
            self._write(data)

    def forget(self) -> None:
        """The connection is lost: nothing goes out any more, and nothing refers to it."""
        self._connection, self._write = GONE, len

    # what the peer says

    def limit_frames(self, n_bytes: int) -> None:
        """Take the largest frame that the peer reads."""
        self._frame_bytes = min(n_bytes, LARGEST_FRAME_BYTES)

    def widen(self, more: int) -> None:
        """Widen the connection's window. Raises Broken where it is too large."""
        self._window += more
        if self._window > h2.LARGEST_WINDOW:
            raise Broken(Code.FLOW_CONTROL_ERROR, "a window that is too large")
        self._read_on()
        for call in list(self._connection.calls.values()):
            if call.out:
                self.pump(call)

    def _read_on(self) -> None:
        """The client reads: who only waits behind others, within a window of its own, is not unread."""
        now_s = self._clock_s() if self.unread_s else 0.0
        for number in self.unread_s:
            if self._connection.calls[number].send_window > 0:
                self.unread_s[number] = now_s

    def widen_call(self, call: Call, more: int) -> None:
        """Widen a call's window, or narrow it. Raises Broken where it is too large."""
        call.send_window += more
        if call.send_window > h2.LARGEST_WINDOW:
            raise Broken(Code.FLOW_CONTROL_ERROR, "a window that is too large")
        if call.out:
            self.pump(call)

    def resume(self) -> None:
        """The client reads again."""
        self._read_on()
        for call in list(self._connection.calls.values()):
            if call.out or call.trailers is not None:
                self.pump(call)

    # what goes out

    def pump(self, call: Call) -> None:
        """Send what the windows let through: headers, messages, trailers; all of a batch's answers together."""
        if self._cork.active:
            self._held.append(call)
            self._cork.hold(self)
        else:
            self._send(call)

    def flush(self) -> None:
        """Send what was held, in one write."""
        held, self._held = self._held, []
        if len(held) == 1:
            self._send(held[0])
        elif held:
            gathered: list[bytes] = []
            self._gathered = gathered
            try:
                for call in held:
                    self._send(call)
            finally:
                self._gathered = None
                self._write(b"".join(gathered))
            self._connection.flushed()

    def _send(self, call: Call) -> None:
        if call.id not in self._connection.calls:
            return
        if not call.started and call.trailers is not None and len(call.out) == 1 and not self.paused:
            size = len(call.out[0])
            if size <= min(self._window, call.send_window, self._frame_bytes):
                self._send_whole(call, size)
                return
        parts: list[bytes | memoryview] = []
        if not call.started:
            call.started = True
            parts.append(h2.frame(h2.HEADERS, h2.END_HEADERS, call.id, OPENING))
        while call.out and not self.paused:
            room = min(self._window, call.send_window, self._frame_bytes)
            if room <= 0:
                break
            piece = call.out[0][:room]
            parts += (h2.HEAD.pack(len(piece) >> 16, len(piece) & 0xFFFF, h2.DATA, 0, call.id), piece)
            self._window -= len(piece)
            call.send_window -= len(piece)
            self._credit.earn(1)
            self.unread_s.pop(call.id, None)
            if len(piece) == len(call.out[0]):
                del call.out[0]
            else:
                call.out[0] = call.out[0][room:]
        if not call.out and call.trailers is not None:
            parts.append(h2.frame(h2.HEADERS, h2.END_HEADERS | h2.END_STREAM, call.id, call.trailers))
            if not call.ended:
                parts.append(h2.reset(call.id, Code.NO_ERROR))
            self.write(b"".join(parts))
            self._credit.earn(CREDIT_PER_CALL)
            self._connection.done(call)
            return
        if parts:
            self.write(b"".join(parts))
        if call.out and not self.paused and call.id not in self.unread_s:
            self.unread_s[call.id] = self._clock_s()
            self._connection.blocked()

    def _send_whole(self, call: Call, size: int) -> None:
        """Send an answer of one frame that the windows let through: headers, message, trailers, in one write."""
        pack, number, trailers = h2.HEAD.pack, call.id, call.trailers or b""
        self._window -= size
        parts: list[bytes | memoryview] = [
            pack(0, len(OPENING), h2.HEADERS, h2.END_HEADERS, number),
            OPENING,
            pack(size >> 16, size & 0xFFFF, h2.DATA, 0, number),
            call.out[0],
            pack(len(trailers) >> 16, len(trailers) & 0xFFFF, h2.HEADERS, h2.END_HEADERS | h2.END_STREAM, number),
            trailers,
        ]
        if not call.ended:
            parts.append(h2.reset(number, Code.NO_ERROR))
        self.write(b"".join(parts))
        self._credit.earn(CREDIT_PER_CALL + 1)
        call.started = True
        call.out.clear()
        self._connection.done(call)
