"""The same networks by each runtime's own tools alone, as their documentation says: the rows to hold hasten against."""

import shutil
import time
from pathlib import Path

import numpy as np

from hasten.isolation import Child, Reply
from hasten.measure.latency import WarmUp, timed_runs, warm_up

CALIBRATION = 128


class PeerWorker:
    """Runs in a child: one model file in one runtime, as a user of that runtime alone would open it."""

    def __init__(self, runtime: str, path: str, threads: int, feed: str) -> None:
        self.feeds = dict(np.load(feed))
        self.run = self.open(runtime, path, threads)
        start = time.perf_counter_ns()
        self.run()
        self.first_run_ns = time.perf_counter_ns() - start

    def open(self, runtime: str, path: str, threads: int):
        return {"onnxruntime": open_onnxruntime, "openvino": open_openvino}[runtime](path, threads, self.feeds)

    def first(self) -> int:
        return self.first_run_ns

    def warm_up(self) -> bool:
        def once() -> int:
            start = time.perf_counter_ns()
            self.run()
            return time.perf_counter_ns() - start

        return warm_up(once, WarmUp(max_s=10))

    def slice(self, seconds: float) -> Reply:
        return Reply(None, {"ns": timed_runs(self.run, seconds)})


class Peer:
    """A contender of ``hasten.measure.compare``."""

    def __init__(self, name: str, child: Child) -> None:
        self.name = name
        self.child = child
        self.first_run_ns = child.call("first").value

    def warm_up(self) -> bool:
        return self.child.call("warm_up").value

    def slice(self, seconds: float):
        return self.child.call("slice", seconds=seconds).arrays["ns"]

    def close(self) -> None:
        self.child.close()


def open_onnxruntime(path, threads, feed):
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, feed)


def open_openvino(path, threads, feed):
    import openvino as ov

    core = ov.Core()
    model = core.read_model(path)
    model.reshape({name: list(value.shape) for name, value in feed.items()})
    request = core.compile_model(
        model, "CPU", {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    ).create_infer_request()
    return lambda: request.infer(feed)


def build_peers(model: Path, samples: dict[str, np.ndarray], folder: Path) -> dict[str, tuple[str, Path]]:
    """Build every row: name -> (runtime, file)."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = {
        "ONNX Runtime fp32": ("onnxruntime", model),
        "OpenVINO f32": ("openvino", model),
        "ONNX Runtime static int8 (its own quantizer)": ("onnxruntime", ort_static(model, samples, folder)),
        "ONNX Runtime dynamic int8": ("onnxruntime", ort_dynamic(model, folder)),
        "OpenVINO int8 (NNCF's default PTQ)": ("openvino", nncf_ptq(model, samples, folder)),
    }
    if "ids" in samples:
        path = nncf_ptq(model, samples, folder, transformer=True)
        rows["OpenVINO int8 (NNCF's PTQ for transformers)"] = ("openvino", path)
    return {name: (runtime, Path(path)) for name, (runtime, path) in rows.items()}


def prepared(model: Path, folder: Path) -> Path:
    """Run ONNX Runtime's own preparation; its quantizers need the exporter's value_info gone first."""
    import onnx
    from onnxruntime.quantization.shape_inference import quant_pre_process

    loaded = onnx.load(model)
    del loaded.graph.value_info[:]
    onnx.save(loaded, folder / "bare.onnx")
    quant_pre_process(str(folder / "bare.onnx"), str(folder / "prepared.onnx"), skip_symbolic_shape=True)
    return folder / "prepared.onnx"


def ort_static(model: Path, samples: dict[str, np.ndarray], folder: Path) -> Path:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.rows = iter({k: v[i : i + 1] for k, v in samples.items()} for i in range(CALIBRATION))

        def get_next(self):
            return next(self.rows, None)

    target = folder / "ort-static.onnx"
    quantize_static(
        str(prepared(model, folder)),
        str(target),
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    return target


def ort_dynamic(model: Path, folder: Path) -> Path:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    target = folder / "ort-dynamic.onnx"
    quantize_dynamic(str(prepared(model, folder)), str(target), weight_type=QuantType.QInt8, per_channel=True)
    return target


def nncf_ptq(model: Path, samples: dict[str, np.ndarray], folder: Path, *, transformer: bool = False) -> Path:
    import nncf
    import openvino as ov

    target = folder / ("nncf-transformer.xml" if transformer else "nncf.xml")
    rows = [{k: v[i : i + 1] for k, v in samples.items()} for i in range(CALIBRATION)]
    kind = {"model_type": nncf.ModelType.TRANSFORMER} if transformer else {}
    quantized = nncf.quantize(ov.Core().read_model(model), nncf.Dataset(rows), subset_size=CALIBRATION, **kind)
    ov.save_model(quantized, target, compress_to_fp16=False)
    return target


def forget(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
