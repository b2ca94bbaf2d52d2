"""Fixtures of the server's tests."""

from __future__ import annotations

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
