"""A real server whose model takes long at the first served run of each batch size: a shape that was not warmed.

    python benchmarks/causes/server.py DEPLOYMENT

Prints its address and serves until a signal.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

from hasten import registry
from hasten.engines.onnxruntime import OnnxRuntime
from hasten.serve.app import Listening, serve
from hasten.testing.faults import FaultySession

COLD_S = 0.4


class Cold:
    """Takes longer at the first run of each size after the server was opened, busy as a compiler is."""

    opened = False
    """Warm-up is over."""

    def __init__(self):
        self.known = {1}

    def __call__(self, session, feed):
        rows = len(next(iter(feed.values())))
        if Cold.opened and rows not in self.known:
            self.known.add(rows)
            until = time.perf_counter() + COLD_S
            while time.perf_counter() < until:
                session.run(feed)
        return session.run(feed)


@dataclass(frozen=True, kw_only=True)
class ColdEngine(OnnxRuntime):
    """ONNX Runtime with cold shapes."""

    name = "cold"

    def open(self, built):
        return FaultySession(super().open(built), Cold())


if __name__ == "__main__":
    registry.register("engine", "cold", registry.Entry("__main__:ColdEngine"))

    def tell(opened):
        Cold.opened = True
        print(opened.http, flush=True)

    serve(Path(sys.argv[1]), Listening(port=0, grpc_port=None), tell)
