"""API keys: read from a file, kept as digests, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hasten.errors import BadInput, NotAllowed

LEAST_CHARACTERS = 16


@dataclass
class Keys:
    """The keys that are let in, each as its SHA-256 digest."""

    digests: tuple[bytes, ...]

    def take(self, others: Keys) -> None:
        """Let in ``others`` from the next request on, and these no more."""
        self.digests = others.digests

    def check(self, headers: Mapping[bytes, bytes]) -> None:
        """Check the key of a request: ``Authorization: Bearer KEY`` or ``X-Api-Key: KEY``.

        Takes the same time whichever key is right, or nearly right.

        Raises:
            NotAllowed: there is no key, or it is none of these.
        """
        bearer = headers.get(b"authorization", b"")
        key = bearer[7:].strip() if bearer[:7].lower() == b"bearer " else headers.get(b"x-api-key", b"")
        if not key:
            raise NotAllowed("this server wants an API key; send it as Authorization: Bearer KEY")
        digest, found = hashlib.sha256(key).digest(), False
        for known in self.digests:
            found |= hmac.compare_digest(digest, known)
        if not found:
            raise NotAllowed("the API key is not one of this server's")


def read_keys(path: Path) -> Keys:
    """Read keys from a file: one a line; empty lines, and what begins with #, are left out.

    Raises:
        BadInput: it cannot be read, holds no key, or one that is too short to be one.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise BadInput(f"the API keys in {path} cannot be read: {error}") from error
    keys = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith(b"#")]
    if not keys:
        raise BadInput(f"{path} holds no API key; write one a line")
    for number, key in enumerate(keys, 1):
        if len(key) < LEAST_CHARACTERS:
            raise BadInput(f"API key {number} of {path} has {len(key)} characters; take {LEAST_CHARACTERS} or more")
    return Keys(tuple(hashlib.sha256(key).digest() for key in keys))
