"""Ray Serve with ONNX Runtime, one replica: python ray_ort.py MODEL.onnx NAME PORT"""

import sys
import time

import numpy as np
import onnxruntime
import orjson
import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import Response


@serve.deployment(num_replicas=1, max_ongoing_requests=64, ray_actor_options={"num_cpus": 0.2})
class Net:
    def __init__(self, path: str) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.feed = self.session.get_inputs()[0].name

    async def __call__(self, request: Request) -> Response:
        tensor = orjson.loads(await request.body())["inputs"][0]
        x = np.array(tensor["data"], np.float32).reshape(tensor["shape"])
        (y,) = self.session.run(None, {self.feed: x})
        output = {"name": "y", "shape": y.shape, "datatype": "FP32", "data": y.ravel()}
        return Response(
            orjson.dumps({"outputs": [output]}, option=orjson.OPT_SERIALIZE_NUMPY), media_type="application/json"
        )


if __name__ == "__main__":
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    serve.start(
        http_options={"host": "127.0.0.1", "port": int(sys.argv[3])}, logging_config={"enable_access_log": False}
    )
    serve.run(Net.bind(sys.argv[1]), route_prefix=f"/v2/models/{sys.argv[2]}/infer")
    while True:
        time.sleep(3600)
