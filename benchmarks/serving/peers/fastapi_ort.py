"""FastAPI as one would write it well: ONNX Runtime in a thread pool, orjson, no validation of single numbers.

python fastapi_ort.py MODEL.onnx NAME THREADS     (prints its port)
"""

import asyncio
import socket
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnxruntime
import orjson
import uvicorn
from fastapi import FastAPI, Request, Response

path, name, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = options.inter_op_num_threads = 1
session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
feed, wanted = session.get_inputs()[0].name, [session.get_outputs()[0].name]
pool = ThreadPoolExecutor(threads)
app = FastAPI()


@app.post(f"/v2/models/{name}/infer")
async def infer(request: Request) -> Response:
    body = await request.body()
    head = request.headers.get("inference-header-content-length")
    if head is None:
        tensor = orjson.loads(body)["inputs"][0]
        x = np.array(tensor["data"], np.float32).reshape(tensor["shape"])
    else:
        tensor = orjson.loads(body[: int(head)])["inputs"][0]
        x = np.frombuffer(body, np.float32, offset=int(head)).reshape(tensor["shape"])
    (y,) = await asyncio.get_running_loop().run_in_executor(pool, session.run, wanted, {feed: x})
    output = {"name": wanted[0], "shape": y.shape, "datatype": "FP32"}
    if head is None:
        answer = {"model_name": name, "outputs": [{**output, "data": y.ravel()}]}
        return Response(orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY), media_type="application/json")
    text = orjson.dumps({"model_name": name, "outputs": [{**output, "parameters": {"binary_data_size": y.nbytes}}]})
    return Response(
        text + y.tobytes(),
        media_type="application/octet-stream",
        headers={"inference-header-content-length": str(len(text))},
    )


bound = socket.socket()
bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
bound.bind(("127.0.0.1", 0))
bound.listen(1024)
print(bound.getsockname()[1], flush=True)
uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False)).run(sockets=[bound])
