"""The clients over TLS: a certificate that is trusted, and one that is not; and many calls at once."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("httptools", reason="needs the extra 'serve'")
pytest.importorskip("grpc", reason="needs the extra 'serve'")

import hasten
from hasten.errors import BadInput, NoAnswer
from hasten.serve.app import Listening, Open
from serve.bundles import bundle
from serve.certificates import certificate
from serve.served import rows_of, served


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Open, Path]]:
    folder = tmp_path_factory.mktemp("tls")
    cert, key = certificate(folder)
    listening = Listening(port=0, grpc_port=0, tls_cert=cert, tls_key=key)
    with served(bundle(folder / "net"), listening) as opened:
        yield opened, cert


@pytest.mark.parametrize("scheme", ["https", "grpcs"])
def test_a_trusted_certificate_opens_the_way_for_both_clients(secured: tuple[Open, Path], scheme: str) -> None:
    opened, cert = secured
    place = str(opened.http if scheme == "https" else opened.grpc).rpartition("//")[2]
    with hasten.Client(f"{scheme}://{place}", certificate=cert) as client:
        wanted = client.infer("net", {"x": rows_of(1)}).outputs

    async def many() -> None:
        async with hasten.AsyncClient(f"{scheme}://{place}", certificate=cert) as client:
            found = await asyncio.gather(*[client.infer("net", {"x": rows_of(1)}, id=str(at)) for at in range(20)])
        assert [result.id for result in found] == [str(at) for at in range(20)]
        for name, array in wanted.items():
            np.testing.assert_allclose(found[-1].outputs[name], array, rtol=1e-5, atol=1e-6)

    asyncio.run(many())


def test_a_certificate_that_nobody_vouches_for_is_no_answer(secured: tuple[Open, Path]) -> None:
    with hasten.Client(secured[0].http) as client, pytest.raises(NoAnswer, match="certificate"):
        client.ready()


def test_a_file_that_is_no_certificate_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot be"):
        hasten.Client("https://127.0.0.1:1", certificate=tmp_path / "none.pem")
    with pytest.raises(BadInput, match="cannot be"):
        hasten.AsyncClient("grpcs://127.0.0.1:1", certificate=tmp_path / "none.pem")
