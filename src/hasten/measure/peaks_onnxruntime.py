"""The rates that ONNX Runtime's kernels reach. Runs in a child process of ``hasten.measure.peaks``."""

from __future__ import annotations

import onnxruntime as ort

from hasten.artifact import Json
from hasten.measure.peaks import best_rate
from hasten.measure.probes import probes


def measure(*, threads: int, dtypes: list[str]) -> Json:
    """Give the best operations per second by dtype; bfloat16 is not among them, the CPU provider lacks it."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    rates: dict[str, float] = {}
    for dtype in dtypes:
        if dtype == "bfloat16":
            continue
        for probe in probes(dtype):
            session = ort.InferenceSession(probe.model.SerializeToString(), options, providers=["CPUExecutionProvider"])
            rate = best_rate(lambda s=session, p=probe: s.run(None, p.feed), probe.operations)  # type: ignore[misc]
            rates[dtype] = max(rates.get(dtype, 0.0), rate)
    return {"operations_per_s": rates}
