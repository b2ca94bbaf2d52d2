"""The phases of a request, as a server of ours tells them and whoever analyses it reads them."""

from __future__ import annotations

PHASES = ("receive", "decode", "queue", "batch_wait", "pre", "infer", "post", "encode", "send")
"""In order; phase k lies between marks k and k + 1 of ``serve.ticket.Marks``."""
