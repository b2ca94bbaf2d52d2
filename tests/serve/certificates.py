"""A certificate for this machine's loopback address, which nobody else has signed."""

from __future__ import annotations

import subprocess
from pathlib import Path

KINDS = {"ec": ("ec", "ec_paramgen_curve:prime256v1"), "rsa": ("rsa", "rsa_keygen_bits:2048")}


def certificate(folder: Path, kind: str = "ec") -> tuple[Path, Path]:
    """Make one, and its key."""
    cert, key = folder / "cert.pem", folder / "key.pem"
    made = ["openssl", "req", "-x509", "-newkey", KINDS[kind][0], "-pkeyopt", KINDS[kind][1], "-nodes"]
    names = ["-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*made, *names, "-keyout", str(key), "-out", str(cert)], check=True, capture_output=True)
    return cert, key
