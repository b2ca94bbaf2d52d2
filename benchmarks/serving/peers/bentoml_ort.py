"""BentoML with ONNX Runtime: MODEL=MODEL.onnx NAME=NAME bentoml serve bentoml_ort:Net --port PORT"""

import os

import bentoml
import numpy as np
import onnxruntime


@bentoml.service(workers=1, traffic={"timeout": 10}, metrics={"enabled": False}, logging={"access": {"enabled": False}})
class Net:
    def __init__(self) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(os.environ["MODEL"], options, providers=["CPUExecutionProvider"])
        self.feed = self.session.get_inputs()[0].name

    @bentoml.api(route=f"/v2/models/{os.environ['NAME']}/infer")
    def infer(self, inputs: list[dict]) -> dict:
        x = np.array(inputs[0]["data"], np.float32).reshape(inputs[0]["shape"])
        (y,) = self.session.run(None, {self.feed: x})
        return {"outputs": [{"name": "y", "shape": list(y.shape), "datatype": "FP32", "data": y.ravel().tolist()}]}
