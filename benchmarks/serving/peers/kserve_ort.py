"""KServe's Python server with ONNX Runtime: python kserve_ort.py MODEL.onnx NAME HTTP_PORT GRPC_PORT"""

import sys
from uuid import uuid4

import onnxruntime
from kserve import InferOutput, InferRequest, InferResponse, Model, ModelServer


class Net(Model):
    def __init__(self) -> None:
        super().__init__(sys.argv[2])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
        self.feed = self.session.get_inputs()[0].name
        self.ready = True

    def predict(self, payload: InferRequest, headers: object = None, response_headers: object = None) -> InferResponse:
        (y,) = self.session.run(None, {self.feed: payload.inputs[0].as_numpy()})
        output = InferOutput("y", list(y.shape), "FP32")
        output.set_data_from_numpy(y, binary_data=bool(payload.use_binary_outputs))
        return InferResponse(
            payload.id or uuid4().hex, self.name, [output], use_binary_outputs=payload.use_binary_outputs
        )


if __name__ == "__main__":
    ModelServer(
        http_port=int(sys.argv[3]), grpc_port=int(sys.argv[4]), enable_grpc=True, workers=1, access_log_format=""
    ).start([Net()])
