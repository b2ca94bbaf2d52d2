"""LitServe with ONNX Runtime: python litserve_ort.py MODEL.onnx NAME PORT"""

import sys

import litserve
import numpy as np
import onnxruntime


class Api(litserve.LitAPI):
    def setup(self, device: str) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
        self.feed = self.session.get_inputs()[0].name

    def decode_request(self, request):  # type: ignore[no-untyped-def]
        tensor = request["inputs"][0]
        return np.array(tensor["data"], np.float32).reshape(tensor["shape"])

    def predict(self, x):  # type: ignore[no-untyped-def]
        return self.session.run(None, {self.feed: x})[0]

    def encode_response(self, y):  # type: ignore[no-untyped-def]
        return {"outputs": [{"name": "y", "shape": list(y.shape), "datatype": "FP32", "data": y.ravel().tolist()}]}


if __name__ == "__main__":
    api = Api(api_path=f"/v2/models/{sys.argv[2]}/infer")
    litserve.LitServer(api, accelerator="cpu", workers_per_device=1).run(
        port=int(sys.argv[3]), generate_client_file=False
    )
