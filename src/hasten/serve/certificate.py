"""A server's certificate with its key: what TLS is spoken with, and exchanged for a newer one while it is."""

from __future__ import annotations

import ssl
from pathlib import Path

from hasten.errors import BadInput


def _no_password() -> str:
    """Answer for a key that is locked: nobody is there to be asked, and it cannot be used."""
    return ""


class Certificate:
    """A certificate chain and its key, in PEM, and the contexts that were made of them."""

    def __init__(self, certificate: Path, key: Path) -> None:
        """Read them.

        Raises:
            BadInput: a file cannot be read, or the key is not the certificate's.
        """
        self._paths = (certificate, key)
        self._contexts: list[ssl.SSLContext] = []
        self.pem = self._read()
        """The key's bytes and the certificate's."""

    def context(self, *, speaks: str) -> ssl.SSLContext:
        """Make a server's TLS context: TLS 1.2 or newer; ``speaks`` is its protocol by its ALPN name.

        Raises:
            BadInput: a file cannot be read, or the key is not the certificate's.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols([speaks])
        self._load(context)
        self._contexts.append(context)
        return context

    def renew(self) -> None:
        """Read the files again: handshakes from now on use what they hold. Connections that are open stay.

        Raises:
            BadInput: they cannot be used; what was there before stays.
        """
        self.pem = self._read()
        for context in self._contexts:
            self._load(context)

    def _read(self) -> tuple[bytes, bytes]:
        certificate, key = self._paths
        self._load(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))  # first where nobody speaks it
        try:
            return key.read_bytes(), certificate.read_bytes()
        except OSError as error:
            raise BadInput(f"the certificate {certificate} with the key {key} cannot be read: {error}") from error

    def _load(self, context: ssl.SSLContext) -> None:
        certificate, key = self._paths
        try:
            context.load_cert_chain(certificate, key, password=_no_password)
        except (OSError, ssl.SSLError) as error:
            raise BadInput(f"the certificate {certificate} with the key {key} cannot be used: {error}") from error
