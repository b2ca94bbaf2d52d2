"""Calls a server with KServe's own clients, unchanged, and checks what they read. Run by test_kserve_client.py.

A process of its own: kserve and tritonclient register the same protobuf names, and cannot be imported together.

    python kserve_calls.py HTTP_URL GRPC_HOST:PORT
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import grpc
import httpx
import numpy as np
from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferOutput, InferRequest
from kserve.inference_client import RESTConfig


def asked(rows: int, *, binary: bool, model: str = "net", features: int = 16, **more: Any) -> InferRequest:
    x = np.random.default_rng(0).standard_normal((rows, features)).astype(np.float32)
    given = InferInput("x", list(x.shape), "FP32")
    given.set_data_from_numpy(x, binary_data=binary)
    return InferRequest(model_name=model, infer_inputs=[given], **more)


def checked(outputs: list[InferOutput], rows: int) -> np.ndarray[Any, Any]:
    (y,) = outputs
    found = y.as_numpy()
    assert (y.name, found.shape, found.dtype) == ("y", (rows, 4), np.float32), (y.name, found.shape, found.dtype)
    return found


async def over_rest(url: str) -> np.ndarray[Any, Any]:
    client = InferenceRESTClient(RESTConfig(protocol="v2", retries=0))
    assert await client.is_server_live(url)
    assert await client.is_server_ready(url)
    assert await client.is_model_ready(url, "net")
    found = []
    for binary in (False, True):
        request = asked(3, binary=binary, request_id="mine")
        answer = await client.infer(url, request, model_name="net")
        assert (answer.id, answer.model_name) == ("mine", "net"), (answer.id, answer.model_name)
        found.append(checked(answer.outputs, 3))
    request = asked(3, binary=True, parameters={"binary_data_output": True, "priority": 1})
    answer = await client.infer(url, request, model_name="net")
    found.append(checked(answer.outputs, 3))
    for other in found:
        np.testing.assert_allclose(other, found[0], rtol=1e-5)
    for model, features, status, says in (("nix", 16, 404, "nix"), ("net", 3, 400, "'x'")):
        try:
            await client.infer(url, asked(1, binary=False, model=model, features=features), model_name=model)
        except httpx.HTTPStatusError as error:
            assert error.response.status_code == status, error
            assert says in str(error), error
        else:
            raise AssertionError(f"{model} was answered")
    await client.close()
    return found[0]


async def over_grpc(place: str) -> np.ndarray[Any, Any]:
    client = InferenceGRPCClient(place, timeout=30, retries=0)
    assert await client.is_server_live()
    assert await client.is_server_ready()
    assert await client.is_model_ready("net")
    found = []
    for binary in (False, True):
        answer = await client.infer(asked(3, binary=binary, request_id="mine"))
        assert (answer.id, answer.model_name) == ("mine", "net"), (answer.id, answer.model_name)
        found.append(checked(answer.outputs, 3))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)
    for model, features, status in (
        ("nix", 16, grpc.StatusCode.NOT_FOUND),
        ("net", 3, grpc.StatusCode.INVALID_ARGUMENT),
    ):
        try:
            await client.infer(asked(1, binary=True, model=model, features=features))
        except grpc.RpcError as error:
            assert error.code() == status, error
        else:
            raise AssertionError(f"{model} was answered")
    await client.close()
    return found[0]


async def main(url: str, place: str) -> None:
    rest, over = await over_rest(url), await over_grpc(place)
    np.testing.assert_allclose(rest, over, rtol=1e-5)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2]))
    print("all calls answered")  # noqa: T201 - read by the test
