"""What the service manager is told: systemd's readiness protocol (sd_notify(3)), where it asks for it."""

from __future__ import annotations

import logging
import os
import socket
from time import clock_gettime_ns

logger = logging.getLogger(__name__)

SOCKET = "NOTIFY_SOCKET"
READY, STOPPING = "READY=1", "STOPPING=1"
PATIENCE_S = 1.0
"""How long the manager may leave what it is told unread, its socket full: the event loop waits meanwhile."""

MONOTONIC = 1
"""``CLOCK_MONOTONIC``, which systemd compares with its own."""


def tell_manager(*lines: str) -> bool:
    """Send lines to the socket that ``NOTIFY_SOCKET`` names, a path or, after an @, an abstract name.

    Returns:
        Whether they were sent. A manager that does not hear is logged, and changes nothing.
    """
    name = os.environ.get(SOCKET, "")
    if not name.startswith(("/", "@")):
        return False
    place = f"\0{name[1:]}" if name.startswith("@") else name
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as door:
            door.settimeout(PATIENCE_S)
            door.sendto("\n".join(lines).encode(), place)
    except OSError as error:
        logger.warning("the service manager at %s cannot be told: %s", name, error)
        return False
    return True


def reloading() -> tuple[str, str]:
    """Give the lines that say that a reload begins; ``READY`` says that it ended (``Type=notify-reload``)."""
    return "RELOADING=1", f"MONOTONIC_USEC={clock_gettime_ns(MONOTONIC) // 1000}"
