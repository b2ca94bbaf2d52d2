"""The servers that hasten's transports are compared with, as bare as they can be. Run: python peers.py KIND MODEL.onnx

Each prints its port once it listens. ``echo`` kinds answer a fixed body and run no model; ``model`` kinds read the
binary tensor, run ONNX Runtime where they stand, and answer it: no phases, no metrics, no limits, no admission.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import Callable
from typing import Any

import grpc.aio
import httptools
import msgspec
import numpy as np
import onnxruntime
import uvicorn
import uvloop

from hasten.protocol.grpc_messages import message

FIXED = b'{"model_name":"mlp","outputs":[{"name":"y","shape":[1,4],"datatype":"FP32","parameters":' + (
    b'{"binary_data_size":16}}]}' + bytes(16)
)
Work = Callable[[bytes, int], tuple[bytes, int]]


class Head(msgspec.Struct):
    inputs: list[dict[str, Any]]


HEADS = msgspec.json.Decoder(Head)


def echo(body: bytes, head: int) -> tuple[bytes, int]:
    return FIXED, len(FIXED) - 16


def model_of(path: str) -> Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    outputs, name = [session.get_outputs()[0].name], session.get_inputs()[0].name
    return lambda x: session.run(outputs, {name: x})[0]


def with_model(path: str) -> Work:
    run = model_of(path)

    def work(body: bytes, head: int) -> tuple[bytes, int]:
        said = HEADS.decode(memoryview(body)[:head]).inputs[0]
        y = run(np.frombuffer(body, np.float32, offset=head).reshape(said["shape"]))
        parameters = {"binary_data_size": y.nbytes}
        answer = {"name": "y", "shape": y.shape, "datatype": "FP32", "parameters": parameters}
        text = msgspec.json.encode({"model_name": "mlp", "outputs": [answer]})
        return text + y.tobytes(), len(text)

    return work


def asgi(work: Work) -> Any:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        head = next((int(v) for k, v in scope["headers"] if k == b"inference-header-content-length"), 0)
        body = b""
        while True:
            part = await receive()
            body += part.get("body", b"")
            if not part.get("more_body"):
                break
        answer, size = work(body, head)
        headers = [
            (b"content-type", b"application/octet-stream"),
            (b"inference-header-content-length", b"%d" % size),
            (b"content-length", b"%d" % len(answer)),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": answer})

    return app


class Bare(asyncio.Protocol):
    """httptools on a protocol, and nothing else."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.parser = httptools.HttpRequestParser(self)
        self.body = b""
        self.head = 0

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"inference-header-content-length":
            self.head = int(value)

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        answer, size = self.work(self.body, self.head)
        self.body = b""
        self.transport.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\nInference-Header-Content-Length: %d\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (size, len(answer), answer)
        )


def listen() -> socket.socket:
    bound = socket.socket()
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind(("127.0.0.1", 0))
    bound.listen(1024)
    print(bound.getsockname()[1], flush=True)
    return bound


async def bare(work: Work) -> None:
    server = await asyncio.get_running_loop().create_server(lambda: Bare(work), sock=listen())
    await server.serve_forever()


async def aio(path: str) -> None:
    run, asked, answer = model_of(path), message("ModelInferRequest"), message("ModelInferResponse")

    async def infer(data: bytes, context: Any) -> bytes:
        said: Any = asked.FromString(data)
        y = run(np.frombuffer(said.raw_input_contents[0], np.float32).reshape(list(said.inputs[0].shape)))
        made: Any = answer(model_name="mlp")
        made.outputs.add(name="y", datatype="FP32", shape=y.shape)
        made.raw_output_contents.append(y.tobytes())
        done: bytes = made.SerializeToString()
        return done

    server = grpc.aio.server()
    handler = grpc.unary_unary_rpc_method_handler(infer)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("inference.GRPCInferenceService", {"ModelInfer": handler}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()


def main(kind: str, path: str) -> None:
    server, _, job = kind.partition("-")
    if server == "grpcaio":
        uvloop.run(aio(path))
        return
    work = echo if job == "echo" else with_model(path)
    if server == "bare":
        uvloop.run(bare(work))
        return
    settings: dict[str, Any] = {"log_level": "warning", "access_log": False, "http": "httptools", "loop": "uvloop"}
    uvicorn.Server(uvicorn.Config(asgi(work), lifespan="off", **settings)).run(sockets=[listen()])


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
