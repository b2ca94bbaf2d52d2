"""The rates that OpenVINO's kernels reach. Runs in a child process of ``hasten.measure.peaks``."""

from __future__ import annotations

from hasten.artifact import Json
from hasten.engines import openvino as engine
from hasten.measure.peaks import best_rate
from hasten.measure.probes import probes

ov = vars(engine)["openvino"]
"""By way of the engine, which keeps it from sending an event to a server when it is imported."""

HINTS = {"float32": "f32", "int8": "f32", "bfloat16": "bf16"}
"""The precision to ask for: in an int8 model it is that of what stays in float."""


def measure(*, threads: int, dtypes: list[str]) -> Json:
    """Give the best operations per second by dtype. One that the CPU plug-in does not take is left out."""
    core = ov.Core()
    rates: dict[str, float] = {}
    for dtype in dtypes:
        options = {"INFERENCE_PRECISION_HINT": HINTS[dtype], "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
        for probe in probes("int8" if dtype == "int8" else "float32"):
            compiled = core.compile_model(core.read_model(probe.model.SerializeToString()), "CPU", options)
            if compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name() != HINTS[dtype]:
                continue
            request = compiled.create_infer_request()
            request.set_input_tensor(ov.Tensor(probe.feed["x"], shared_memory=True))
            rates[dtype] = max(rates.get(dtype, 0.0), best_rate(request.infer, probe.operations))
    return {"operations_per_s": rates}
