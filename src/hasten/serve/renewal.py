"""What an operator may exchange while a server runs: API keys, the certificate, the file of the access log."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from hasten.errors import BadInput
from hasten.serve.access import AccessLog
from hasten.serve.certificate import Certificate
from hasten.serve.keys import Keys, read_keys

logger = logging.getLogger(__name__)


class Renewal:
    """Reads again what the server was started with, where it was started with that."""

    def __init__(
        self,
        *,
        keys: tuple[Path, Keys] | None = None,
        certificate: Certificate | None = None,
        access: AccessLog | None = None,
    ) -> None:
        self._parts: list[tuple[str, Callable[[], None]]] = []
        if keys is not None:
            path, known = keys
            self._parts.append(("API keys", lambda: known.take(read_keys(path))))
        if certificate is not None:
            self._parts.append(("certificate", certificate.renew))
        if access is not None and access.has_file:
            self._parts.append(("access log", access.reopen))

    def renew(self) -> list[str]:
        """Take what the files hold now; what cannot be used is logged, and stays as it was. Gives what was taken."""
        taken = []
        for name, part in self._parts:
            try:
                part()
            except BadInput as error:
                logger.error("the %s stay as they were: %s", name, error)
            else:
                taken.append(name)
        return taken
