"""A small linear model behind KServe's Python server: kserve_net.py HTTP_PORT GRPC_PORT."""

import sys
from uuid import uuid4

import numpy as np
from kserve import InferOutput, InferRequest, InferResponse, Model, ModelServer

WEIGHTS = np.random.default_rng(0).standard_normal((16, 4)).astype(np.float32)


class Net(Model):
    def __init__(self) -> None:
        super().__init__("net")
        self.ready = True

    def get_input_types(self) -> list[dict[str, object]]:
        return [{"name": "x", "datatype": "FP32", "shape": [-1, 16]}]

    def get_output_types(self) -> list[dict[str, object]]:
        return [{"name": "y", "datatype": "FP32", "shape": [-1, 4]}]

    def predict(self, payload: InferRequest, headers: object = None, response_headers: object = None) -> InferResponse:
        y = payload.get_input_by_name("x").as_numpy() @ WEIGHTS
        output = InferOutput("y", list(y.shape), "FP32")
        output.set_data_from_numpy(y, binary_data=bool(payload.use_binary_outputs))
        return InferResponse(
            payload.id or uuid4().hex,
            self.name,
            [output],
            requested_outputs=payload.request_outputs,
            use_binary_outputs=payload.use_binary_outputs,
        )


if __name__ == "__main__":
    ModelServer(http_port=int(sys.argv[1]), grpc_port=int(sys.argv[2]), enable_grpc=True).start([Net()])
