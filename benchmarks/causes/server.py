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

WARM_RUNS = 4
"""Runs of each size before a server answers: one, and three that are timed."""

COLD_S = 0.4


class Cold:
    """Takes longer at the first run of each size after warm-up, busy as a compiler is."""

    def __init__(self):
        self.runs = {}

    def __call__(self, session, feed):
        rows = len(next(iter(feed.values())))
        self.runs[rows] = self.runs.get(rows, 0) + 1
        if self.runs[rows] == WARM_RUNS + 1 and rows > 1:
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
    listening = Listening(port=0, grpc_port=None)
    serve(Path(sys.argv[1]), listening, lambda opened: print(opened.http, flush=True))
