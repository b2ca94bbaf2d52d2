"""Fixtures of the server's tests."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest

from hasten import registry
from serve import faulty


@pytest.fixture
def faulty_engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The engine ``faulty``, with nothing that hangs before or after."""
    monkeypatch.setitem(registry._registered["engine"], "faulty", faulty.ENTRY)
    for event in (faulty.release, faulty.hanging, faulty.opening):
        event.clear()
    yield
    faulty.release.set()
    faulty.may_open.set()


@pytest.fixture
def gone_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients reset their connections just before the server ends its side, of which asyncio's own loop tells."""

    def gone(transport: object) -> None:
        raise OSError(errno.ENOTCONN, "Transport endpoint is not connected")

    monkeypatch.setattr("asyncio.selector_events._SelectorSocketTransport.write_eof", gone)
