"""Where a version of a deployment is in its life."""

from __future__ import annotations

import enum


class State(enum.Enum):
    """Where a version is in its life; the values are those of the repository extension."""

    LOADING = "LOADING"
    READY = "READY"
    DRAINING = "UNLOADING"
    GONE = "UNAVAILABLE"
    FAILED = "FAILED"
