"""What load is put on, and how: an address, a protocol, a model; and the plan of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from hasten.client.values import Address, read_address
from hasten.errors import InvalidSetting
from hasten.load.arrivals import Arrivals

Protocol = Literal["rest-json", "rest-binary", "grpc", "http", "session"]
PROTOCOLS: tuple[Protocol, ...] = ("rest-json", "rest-binary", "grpc", "http", "session")

GRPC_STREAMS = 256
"""Calls that one connection of ours carries at once, where the server allows so many."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where load goes.

    ``url``: of a server (``http://``, ``https://``; for grpc also ``grpc://``, ``grpcs://``); for ``http`` the whole
    address of an endpoint, with its path and query; for ``session`` a deployment's folder or TOML file.
    """

    url: str
    protocol: Protocol = "rest-binary"
    model: str = ""
    version: str | None = None
    api_key: str | None = field(default=None, repr=False)
    certificate: Path | None = None
    connections: int = 1024
    """Most connections at once over HTTP/1.1, each with one request; over HTTP/2, each with many."""
    verb: str = "POST"
    """Of ``http`` alone."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """More headers, of ``http`` alone."""
    instances: int = 1
    """Of ``session`` alone: sessions that run at once."""

    @property
    def address(self) -> Address:
        """Where to connect. Raises InvalidSetting: the URL is none, or has the wrong scheme for the protocol."""
        url = self.url
        if self.protocol == "http":
            scheme, _, rest = url.partition("://")
            url = f"{scheme}://{rest.partition('/')[0].partition('?')[0]}"
        found = read_address(url, api_key=self.api_key, certificate=self.certificate)
        if found.is_grpc != (self.protocol == "grpc"):
            wanted = "grpc://HOST:PORT" if self.protocol == "grpc" else "http://HOST:PORT"
            raise InvalidSetting(f"{url} is no address for {self.protocol}; write {wanted}")
        return found

    @property
    def path(self) -> str:
        """The path and query of an ``http`` endpoint."""
        rest = self.url.partition("://")[2]
        at = min((place for place in (rest.find("/"), rest.find("?")) if place >= 0), default=-1)
        found = rest[at:] if at >= 0 else "/"
        return found if found.startswith("/") else f"/{found}"


@dataclass(frozen=True, kw_only=True)
class LoadPlan:
    """One run: when requests leave, for how long, and when an answer comes too late to be one."""

    arrivals: Arrivals
    duration_s: float
    seed: int = 0
    timeout_s: float = 10.0
    """From the scheduled time of a request; afterwards it is withdrawn and counted as a timeout."""

    def __post_init__(self) -> None:
        for name in ("duration_s", "timeout_s"):
            value = getattr(self, name)
            if not 0 < value < 86_400 * 7:
                raise InvalidSetting(f"{name} is {value!r}, and must be above 0 and below a week")
