"""Targets of requests: which call a path means, for which model and version. Names never reach the file system."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import unquote_to_bytes

from hasten.errors import BadRequest, ModelNotFound

LONGEST_NAME = 256


@dataclass(frozen=True, slots=True)
class Target:
    """A call's key in the table of calls, and the names in its path."""

    call: str
    model: str | None = None
    version: str | None = None
    region: str | None = None
    """Of shared memory."""


PLAIN = {
    "v2": "server",
    "v2/health/live": "live",
    "v2/health/ready": "ready",
    "v2/models/stats": "stats",
    "v2/repository/index": "index",
    "v2/systemsharedmemory/status": "memory_status",
    "v2/systemsharedmemory/unregister": "memory_unregister",
    "metrics": "metrics",
    "openapi.json": "openapi",
    "docs": "docs",
}
"""Paths without names -> calls."""

OF_MODEL = {"": "model", "ready": "model_ready", "infer": "infer", "config": "config", "stats": "stats"}
"""What may follow a model, or its version -> calls."""

OF_REGION = {"status": "memory_status", "register": "memory_register", "unregister": "memory_unregister"}
OF_REPOSITORY = {"load": "load", "unload": "unload"}


def find_target(target: bytes) -> Target:
    """Say what a target means: a path, or as to a proxy a whole ``http://host/path``, whose host is not looked at.

    Raises:
        ModelNotFound: there is no such path. BadRequest: a name in it is no name.
    """
    path = target.partition(b"?")[0].partition(b"#")[0]
    if not path.startswith(b"/"):
        scheme, _, behind = path.partition(b"://")
        if scheme.lower() in (b"http", b"https"):
            path = behind.partition(b"/")[2]
    path = path.strip(b"/")
    plain = PLAIN.get(path.decode("latin-1"))
    if plain is not None:
        return Target(plain)
    pieces = path.split(b"/")
    if len(pieces) >= 3 and pieces[0] == b"v2":
        if pieces[1] == b"models":
            model, rest = _name(pieces[2]), pieces[3:]
            version = None
            if len(rest) >= 2 and rest[0] == b"versions":
                version, rest = _name(rest[1]), rest[2:]
            call = OF_MODEL.get(b"/".join(rest).decode("latin-1"))
            if call is not None:
                return Target(call, model, version)
        elif pieces[1:3] == [b"repository", b"models"] and len(pieces) == 5:
            call = OF_REPOSITORY.get(pieces[4].decode("latin-1"))
            if call is not None:
                return Target(call, _name(pieces[3]))
        elif pieces[1:3] == [b"systemsharedmemory", b"region"] and len(pieces) == 5:
            call = OF_REGION.get(pieces[4].decode("latin-1"))
            if call is not None:
                return Target(call, region=_name(pieces[3]))
    raise ModelNotFound(f"there is no path {target[:200].decode('latin-1')!r} here; GET /docs lists them all")


def _name(piece: bytes) -> str:
    """Decode a name: percent-encoded UTF-8, printable, without a slash."""
    try:
        name = unquote_to_bytes(piece).decode()
    except UnicodeDecodeError as error:
        raise BadRequest(f"the name {piece[:LONGEST_NAME]!r} in the path is no UTF-8: {error}") from error
    if not name or len(name) > LONGEST_NAME or not name.isprintable() or "/" in name or name in (".", ".."):
        raise BadRequest(f"{name[:LONGEST_NAME]!r} in the path is no name of a model or a version")
    return name
