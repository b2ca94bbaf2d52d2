"""The blocking gRPC client's channel: what it trusts, which proxy it asks, and its end."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("grpc", reason="needs the extra 'serve'")

import hasten
from hasten.errors import BadInput, UsageError
from hasten.serve.app import Listening
from serve.bundles import bundle
from serve.served import served


@pytest.mark.parametrize("content", ["", "not a certificate"])
@pytest.mark.parametrize("kind", [hasten.Client, hasten.AsyncClient])
def test_a_file_that_holds_no_certificate_is_refused_at_once(tmp_path: Path, kind: type, content: str) -> None:
    (tmp_path / "ca.pem").write_text(content)
    with pytest.raises(BadInput, match="certificate"):
        kind("grpcs://127.0.0.1:1", certificate=tmp_path / "ca.pem")


def test_a_call_after_the_end_says_that_the_client_is_closed() -> None:
    client = hasten.Client("grpc://127.0.0.1:1")
    client.close()
    with pytest.raises(UsageError, match="closed"):
        client.ready()


def test_a_proxy_that_the_environment_names_is_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "no_grpc_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("grpc_proxy", "http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    with served(bundle(tmp_path / "net"), Listening(port=0, grpc_port=0)) as opened:
        for url in (opened.http, f"grpc://{str(opened.grpc).rpartition('//')[2]}"):
            with hasten.Client(url) as client:
                assert client.ready()
