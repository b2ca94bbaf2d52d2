"""What a client is given and gives: addresses, requests made of arrays, results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt

from hasten.errors import BadRequest, InvalidSetting
from hasten.protocol.messages import NAMES, InferRequest, Parameters, RequestedOutput, Tensor
from hasten.tensors import Array

DEFAULT_TIMEOUT_S = 60.0
"""How long a call may take that names no time of its own."""

LONGEST_TIMEOUT_S = 31_536_000.0
"""A year: sockets, gRPC and the protocol's microseconds cannot all hold much more."""

LARGEST_ANSWER_BYTES = 1 << 30
"""An answer that claims more is refused before memory is taken for it."""

PORTS: Mapping[str, int] = {"http": 80, "https": 443, "grpc": 8001, "grpcs": 443}
"""The schemes, and the ports where none is named."""


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where a server is, and what a call of it must bring."""

    scheme: str
    host: str
    port: int
    prefix: str = ""
    """Of every path, as a proxy may want it; HTTP only."""
    api_key: str | None = field(default=None, repr=False)
    certificate: Path | None = None
    """A file of certificates to trust, in PEM; None: the system's."""

    @property
    def secure(self) -> bool:
        """It speaks TLS."""
        return self.scheme in ("https", "grpcs")

    @property
    def is_grpc(self) -> bool:
        """It speaks gRPC."""
        return self.scheme.startswith("grpc")

    @property
    def authority(self) -> str:
        """Host and port, as URLs write them."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        """The address for messages: it has no key in it."""
        return f"{self.scheme}://{self.authority}{self.prefix}"


def read_address(url: str, *, api_key: str | None = None, certificate: Path | None = None) -> Address:
    """Read ``http://host:port``, ``https://``, ``grpc://`` or ``grpcs://``.

    Raises:
        InvalidSetting: it is none of them, or has a part that has no meaning here.
    """
    wanted = "write http://HOST:PORT, https://HOST:PORT, grpc://HOST:PORT or grpcs://HOST:PORT"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise InvalidSetting(f"{url!r} is no address of a server: {error}; {wanted}") from error
    if parts.scheme not in PORTS or not parts.hostname:
        raise InvalidSetting(f"{url!r} is no address of a server; {wanted}")
    prefix = parts.path.rstrip("/")
    if parts.username or parts.query or parts.fragment or (prefix and parts.scheme.startswith("grpc")):
        raise InvalidSetting(f"{parts.scheme}://{parts.hostname} has more than a host and a port; {wanted}")
    if not url.isascii() or not url.isprintable() or " " in url:
        raise InvalidSetting(f"{url!r} has characters that no address has; {wanted}")
    if api_key is not None and not (api_key.isascii() and api_key.isprintable() and api_key.strip() == api_key):
        raise InvalidSetting("the API key has characters that no header may have")
    return Address(
        scheme=parts.scheme,
        host=parts.hostname,
        port=PORTS[parts.scheme] if port is None else port,
        prefix=prefix,
        api_key=api_key,
        certificate=certificate,
    )


@dataclass(frozen=True, kw_only=True)
class InferResult:
    """The answer to one request."""

    model: str
    version: str
    outputs: dict[str, Array]
    """By name. An array may be read-only: it is a view of the answer. BYTES are object arrays of ``bytes``."""
    id: str = ""
    parameters: Parameters = field(default_factory=dict)
    phases_ns: Mapping[str, int] = field(default_factory=dict)
    """What the server said its phases took (Server-Timing); empty where it said nothing."""
    batch_rows: int | None = None
    """Rows of the batch that it ran in, padding included, where the server told."""
    instance: int | None = None
    """Which of the model's instances ran it, where the server told."""


@dataclass(frozen=True, kw_only=True)
class ModelState:
    """A version of a model in a server's repository."""

    name: str
    version: str = ""
    state: str = ""
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a request asks besides its inputs."""

    version: str | None = None
    outputs: Sequence[str] = ()
    """None named: all."""
    id: str = ""
    priority: int = 0
    """1 is the highest; 0: the deployment's usual one."""
    timeout_s: float | None = None
    """Seconds after which the answer is of no use to anybody."""


def time_of(timeout_s: float | None) -> float:
    """Give how long a call may take; None: the usual time. Raises InvalidSetting."""
    if timeout_s is None:
        return DEFAULT_TIMEOUT_S
    if not 0 < timeout_s <= LONGEST_TIMEOUT_S:
        raise InvalidSetting(f"timeout_s is {timeout_s!r}, and must be above 0, and {LONGEST_TIMEOUT_S:.0f} or less")
    return timeout_s


def request_of(model: str, inputs: Mapping[str, npt.ArrayLike], wanted: Wanted) -> InferRequest:
    """Make a request of arrays by name.

    Raises:
        BadRequest: there are none, or one is no array of a dtype of the protocol's. InvalidSetting: a time that is
            none, or a negative priority.
    """
    if not inputs:
        raise BadRequest(f"a request to {model!r} needs one input or more")
    time_of(wanted.timeout_s)
    if wanted.priority < 0:
        raise InvalidSetting(f"priority is {wanted.priority}, and must be 0 or more")
    if isinstance(wanted.outputs, str):
        raise InvalidSetting(f"outputs is the text {wanted.outputs!r}; write ({wanted.outputs!r},)")
    return InferRequest(
        model=model,
        version=wanted.version,
        id=wanted.id,
        inputs=tuple(_tensor(name, _array(name, value)) for name, value in inputs.items()),
        outputs=tuple(RequestedOutput(name=name) for name in wanted.outputs),
        priority=wanted.priority,
        timeout_us=0 if wanted.timeout_s is None else max(1, round(wanted.timeout_s * 1e6)),
    )


def _array(name: str, value: npt.ArrayLike) -> Array:
    """Make an array of what was given; lists of text become objects, for numpy's own text loses NULs at the end."""
    if isinstance(value, np.ndarray):
        return value
    if not isinstance(_first(value), (bytes, str)):
        try:
            array = np.asarray(value)
        except (TypeError, ValueError, OverflowError) as error:
            raise BadRequest(f"input {name!r} is no array: {error}") from error
        if array.dtype.kind not in "SUO" or hasattr(value, "__array__"):
            return array
    shape, flat = _shape(name, value), list(_leaves(value))
    return np.fromiter(flat, object, len(flat)).reshape(shape)


def _first(value: object) -> object:
    while isinstance(value, (list, tuple)) and value:
        value = value[0]
    return value


def _leaves(value: object) -> Iterator[object]:
    if isinstance(value, np.ndarray):
        yield from value.ravel().tolist()
        return
    if not isinstance(value, (list, tuple)):
        yield value
        return
    for item in value:
        yield from _leaves(item)


def _shape(name: str, value: object) -> tuple[int, ...]:
    """Give the lengths of the axes of nested lists. Raises BadRequest: lists beside each other differ in length."""
    if not isinstance(value, (list, tuple)):
        return value.shape if isinstance(value, np.ndarray) else ()
    inner = {_shape(name, item) for item in value}
    if len(inner) > 1:
        raise BadRequest(f"input {name!r} has rows of different shapes: {', '.join(map(str, sorted(inner)))}")
    return (len(value), *(inner.pop() if inner else ()))


def _tensor(name: str, array: Array) -> Tensor:
    if array.dtype.kind not in "SUO" and array.dtype.name not in NAMES:
        raise BadRequest(f"input {name!r} is {array.dtype.name}, and the protocol has {', '.join(NAMES)}")
    if array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("<"))
    return Tensor.of(name, array)
