"""A server's certificate with its key: what TLS is spoken with, and exchanged for a newer one while it is."""

from __future__ import annotations

import contextlib
import os
import ssl
from collections.abc import Iterator
from pathlib import Path

from hasten.errors import BadInput


class Certificate:
    """A certificate chain and its key, in PEM, and the contexts that speak with them.

    A context is never changed: it keeps a certificate for each kind of key, and an old one would be shown on beside a
    new one of another kind. A handshake goes on with the newest context instead, which is asked for once the client has
    said hello.
    """

    def __init__(self, certificate: Path, key: Path) -> None:
        """Read them. Raises BadInput: a file cannot be read."""
        self._certificate, self._key = certificate, key
        self._newest: dict[str, ssl.SSLContext] = {}
        """By the protocol that is spoken."""
        self.pem = self._read()
        """The key's bytes and the certificate's."""

    def context(self, *, speaks: str) -> ssl.SSLContext:
        """Make a server's TLS context: TLS 1.2 or newer; ``speaks`` is its protocol by its ALPN name.

        Raises:
            BadInput: the key is not the certificate's.
        """
        first = self._newest[speaks] = self._made(self.pem, speaks)

        def greeted(connection: ssl.SSLObject | ssl.SSLSocket, name: str | None, context: ssl.SSLContext) -> None:
            connection.context = self._newest[speaks]

        first.sni_callback = greeted
        return first

    def renew(self) -> None:
        """Read the files again: handshakes from now on use what they hold. Connections that are open stay.

        Raises:
            BadInput: they cannot be used; what was there before stays, for all that is spoken.
        """
        pem = self._read()
        made = {speaks: self._made(pem, speaks) for speaks in self._newest}
        self.pem, self._newest = pem, made

    def _read(self) -> tuple[bytes, bytes]:
        try:
            return self._key.read_bytes(), self._certificate.read_bytes()
        except OSError as error:
            raise BadInput(f"{self} cannot be read: {error}") from error

    def _made(self, pem: tuple[bytes, bytes], speaks: str) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols([speaks])
        with _as_file(pem[0]) as key, _as_file(pem[1]) as certificate:
            try:
                context.load_cert_chain(certificate, key, password=_no_password)
            except (OSError, ssl.SSLError) as error:
                raise BadInput(f"{self} cannot be used: {error}") from error
        return context

    def __str__(self) -> str:
        return f"the certificate {self._certificate} with the key {self._key}"


def _no_password() -> str:
    """Answer for a key that is locked: nobody is there to be asked, and it cannot be used."""
    return ""


@contextlib.contextmanager
def _as_file(data: bytes) -> Iterator[str]:
    """Give bytes a name that OpenSSL reads them by, on no disk: what was read once is what is used."""
    fd = os.memfd_create("hasten-pem")
    try:
        os.write(fd, data)
        yield f"/proc/self/fd/{fd}"
    finally:
        os.close(fd)
