"""The bodies of the REST calls that are no inference: what they may say. What is not known is refused, not dropped."""

from __future__ import annotations

import msgspec


class Index(msgspec.Struct, forbid_unknown_fields=True):
    """The body of an index."""

    ready: bool = False


class LoadParameters(msgspec.Struct, forbid_unknown_fields=True):
    """What a load takes: which version, to go back to one; a configuration sent along is refused, not dropped."""

    version: str | None = None


class Load(msgspec.Struct, forbid_unknown_fields=True):
    """The body of a load."""

    parameters: LoadParameters = msgspec.field(default_factory=LoadParameters)


class UnloadParameters(msgspec.Struct, forbid_unknown_fields=True):
    """What Triton's clients always send: whether the members of a deployment made of others are unloaded too."""

    unload_dependents: bool = False


class Unload(msgspec.Struct, forbid_unknown_fields=True):
    """The body of an unload."""

    parameters: UnloadParameters = msgspec.field(default_factory=UnloadParameters)


class Register(msgspec.Struct, forbid_unknown_fields=True):
    """The body of a registration of shared memory."""

    key: str
    byte_size: int
    offset: int = 0
