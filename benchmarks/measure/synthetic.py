"""Work of known length as an engine, and a neighbour that keeps a processor busy. Both live in child processes."""

import threading
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from msgspec import Meta

from hasten.errors import Unsupported
from hasten.settings import Doc

SIZE = 64

CACHE_LINE = 64


@dataclass(frozen=True, kw_only=True)
class Synthetic:
    """Opens anything as a session whose run is ``units`` times the same small matrix product."""

    name: ClassVar[str] = "synthetic"
    uses_samples: ClassVar[bool] = False

    threads: Annotated[int, Doc("always one"), Meta(ge=1, le=1)] = 1
    precision: Annotated[str, Doc("always float32")] = "float32"
    units: Annotated[int, Doc("matrix products in a run"), Meta(ge=1)] = 100

    def why_not(self, source):
        return None

    def apply(self, source, ctx):
        return source

    def open(self, built):
        return Session(built.signature, self.units)

    def operators(self, built, feed, *, runs):
        raise Unsupported(self.name, "synthetic work has no operators")


class Session:
    def __init__(self, signature, units):
        self.signature = signature
        self._units = range(units)
        self._a, self._b, self._out = aligned(), aligned(), aligned()
        for matrix in (self._a, self._b):
            matrix[:] = np.random.default_rng(0).standard_normal((SIZE, SIZE))

    def run(self, feed):
        for _ in self._units:
            np.matmul(self._a, self._b, out=self._out)
        return {"y": self._out[:1, :1]}

    def close(self):
        pass


def aligned():
    """Make a matrix that begins with a cache line, as the runtimes make theirs.

    NumPy's own begin at any multiple of 16 bytes, differently in each process, and that alone made twins differ:
    the standard deviation between processes was over 1 % of the time, and is 0.2 % with this.
    """
    raw = np.empty(SIZE * SIZE * 4 + CACHE_LINE, np.uint8)
    start = -raw.ctypes.data % CACHE_LINE
    return raw[start : start + SIZE * SIZE * 4].view(np.float32).reshape(SIZE, SIZE)


class Neighbour:
    """Multiplies matrices without end, from the moment it is made until its process ends."""

    def __init__(self):
        threading.Thread(target=self._spin, daemon=True).start()

    def _spin(self):
        block = np.random.default_rng(0).standard_normal((512, 512), dtype=np.float32)
        out = np.empty_like(block)
        while True:
            np.matmul(block, block, out=out)
