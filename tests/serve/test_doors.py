"""The protocols that event loops get to see: asyncio's own loop and uvloop, with TLS and without."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import uvloop

import hasten
from hasten.serve.app import Listening
from serve.bundles import bundle
from serve.certificates import certificate
from serve.served import CLASSES, rows_of, served


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_both_loops_read_requests_of_any_size_through_a_door(
    tmp_path: Path, new_loop: Callable[[], asyncio.AbstractEventLoop], tls: bool
) -> None:
    cert, key = certificate(tmp_path) if tls else (None, None)
    listening = Listening(port=0, grpc_port=0, tls_cert=cert, tls_key=key, drain_s=0.0)
    with served(bundle(tmp_path / "net"), listening, new_loop) as opened:
        alone = {}
        for url in (opened.http, f"grpc{'s' if tls else ''}://{opened.grpc}"):
            with hasten.Client(url, certificate=cert) as client:
                for n in (1, 3000, 2):  # the second comes in many reads, into a buffer of its own
                    y = client.infer("net", {"x": rows_of(n)}).outputs["y"]
                    assert y.shape == (n, CLASSES)
                    np.testing.assert_array_equal(y, alone.setdefault(n, y))
