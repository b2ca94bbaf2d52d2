"""An event loop that wakes to the microsecond: asyncio's own rounds every wait up to a millisecond.

At 5,000 requests a second the gaps are 200 µs. ``epoll_wait`` counts milliseconds; ``select`` on the epoll's own
descriptor counts microseconds, and the kernel's slack of 50 µs on every wait can be asked away.
"""

from __future__ import annotations

import asyncio
import ctypes
import select
import selectors
import sys

PR_SET_TIMERSLACK = 29
LARGEST_FILE = 1024
"""``select`` takes no descriptor beyond."""


def precise_loop() -> asyncio.AbstractEventLoop:
    """Make an event loop for this thread; where there is no epoll, it is asyncio's usual one."""
    if sys.platform != "linux":
        return asyncio.SelectorEventLoop()
    ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, 1)  # nanoseconds; of this thread alone
    selector = PreciseSelector()
    if selector.fileno() >= LARGEST_FILE:
        selector.close()
        return asyncio.SelectorEventLoop()
    return asyncio.SelectorEventLoop(selector)


if sys.platform == "linux":

    class PreciseSelector(selectors.EpollSelector):
        """Waits in ``select``, and asks the epoll without waiting."""

        def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
            """Wait until something is ready, or ``timeout`` seconds have passed."""
            if timeout is not None and timeout > 0:
                select.select((self,), (), (), timeout)
                timeout = 0
            return super().select(timeout)
