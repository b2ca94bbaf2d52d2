"""The ASGI application of ``--transport library``, called as an ASGI server calls it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="needs the extra serve")

from hasten.serve.asgi import asgi
from hasten.serve.limits import Limits
from hasten.serve.repository import open_repository
from hasten.serve.rest import Rest
from hasten.serve.service import Service
from serve.bundles import bundle, run

UNLOAD = "/v2/repository/models/net/unload"


@pytest.mark.parametrize("first", [b"", b'{"para'])
def test_a_request_whose_client_leaves_before_its_body_has_come_is_not_run(tmp_path: Path, first: bytes) -> None:
    bundle(tmp_path / "models" / "net")
    coming = [{"type": "http.request", "body": first, "more_body": True}]
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return coming.pop() if coming else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    async def work() -> None:
        service = Service(open_repository(tmp_path / "models"))
        await service.start()
        rest = Rest(service, body_bytes=1000)
        scope = {"type": "http", "method": "POST", "path": UNLOAD, "headers": [(b"content-length", b"50")]}
        await asgi(rest, Limits())(scope, receive, send)
        await asyncio.gather(*rest._tasks)
        assert service.model_ready("net")
        await service.stop()
        assert sent == []

    run(work())
