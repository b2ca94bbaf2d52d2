"""Fixtures that many tests share. Everything random is seeded; every file goes below pytest's own folder."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import numpy as np
import pytest

from hasten import registry
from hasten.measure.peaks import measure_peaks
from hasten.serve.compiled import is_compiled
from hasten.store import Store
from hasten.testing.faults import FAULTS
from hasten.transform import Context

hypothesis.settings.register_profile("hasten", deadline=None)  # no test is timed: the machine may be busy
hypothesis.settings.load_profile("hasten")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty store."""
    return Store(tmp_path / "store")


@pytest.fixture
def ctx(store: Store) -> Context:
    """A context without samples, for ``run_pass``."""
    return Context(folder=store.root, samples=None, seed=0, progress=lambda text, share: None)


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A monkeypatch for the inside of the server, whose calls are bound where it is compiled."""
    if is_compiled():
        pytest.skip("the server is compiled: what is called inside it cannot be replaced")
    return monkeypatch


@pytest.fixture
def random() -> np.random.Generator:
    """A random generator with a fixed seed."""
    return np.random.default_rng(0)


@pytest.fixture
def faulty_engines(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, ...]]:
    """The engines that fail on purpose, registered while the test runs; gives their names."""
    for name, entry in FAULTS.items():
        monkeypatch.setitem(registry._registered["engine"], name, entry)
    yield tuple(FAULTS)


@pytest.fixture(scope="session")
def shared_peaks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This machine's peaks, measured once for all tests: copy the folder to ``store.root / "peaks"``."""
    home = tmp_path_factory.mktemp("peaks")
    measure_peaks(1, home=home)
    return home / "peaks"


@pytest.fixture
def free_port() -> Iterator[int]:
    """A port that is bound and not listening: nothing else takes it, and every connection is refused."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]
