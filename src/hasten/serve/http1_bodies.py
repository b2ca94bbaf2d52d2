"""Room for bodies that do not come whole with their heads: memory is taken as they come, not as they are announced."""

from __future__ import annotations

import numpy as np

from hasten.serve.http1_request import Buffer

HUGE_BYTES, FIRST_BYTES = 4 * 2**20, 2 * 2**20
"""From the first on NumPy asks for huge pages, of which one written byte takes 2 MiB: such a body first gets a room of
the second, and all of its own when that is full, so that not much more than twice of what came is ever held."""


def room(length: int, begun: Buffer = b"") -> memoryview:
    """Give room for a body of ``length`` bytes that begins with ``begun``: all of it, or a first part of a large one.

    Nothing is written beyond ``begun``, so that the system gives the pages when they are filled; ``bytearray`` would
    write them all.
    """
    first = length >= HUGE_BYTES and len(begun) < FIRST_BYTES
    made = np.empty(FIRST_BYTES if first else length, np.uint8).data
    made[: len(begun)] = begun
    return made
