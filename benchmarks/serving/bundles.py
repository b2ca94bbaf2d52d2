"""The models that are served, as bundles: a tiny MLP (pure overhead) and the ResNet-20 of benchmarks/cifar10."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx

from hasten.deployment import Serving
from hasten.protocol import grpc, rest
from hasten.protocol.messages import InferRequest, Tensor
from hasten.testing.deployments import deployed
from hasten.testing.models import mlp

RESNET = Path(__file__).parents[1] / "cifar10" / "resnet20.onnx"
SHAPES = {"mlp": (1, 16), "resnet20": (1, 3, 32, 32)}


def write_bundle(folder: Path, model: str, serving: Serving) -> Path:
    """Build ``model`` for ONNX Runtime with one thread; gives the TOML file of folder/MODEL."""
    graph = mlp() if model == "mlp" else onnx.load(RESNET)
    return deployed(graph, folder / model, name=model, serving=serving)


def request_of(model: str, onnx_input: str) -> InferRequest:
    """Give a request of one row."""
    x = np.random.default_rng(0).standard_normal(SHAPES[model]).astype(np.float32)
    return InferRequest(model=model, inputs=(Tensor.of(onnx_input, x),))


def bodies(request: InferRequest) -> dict[str, tuple[bytes, dict[str, str]]]:
    """Give the request as JSON, as binary tensors, and as a gRPC frame: body and headers of each."""
    plain, _ = rest.encode_request(request, binary=False)
    parts, header_bytes = rest.encode_request(request, binary=True)
    message = grpc.encode_infer_request(request)
    return {
        "json": (b"".join(plain), {"Content-Type": "application/json"}),
        "binary": (
            b"".join(parts),
            {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(header_bytes)},
        ),
        "grpc": (
            b"\0" + len(message).to_bytes(4, "big") + message,
            {"content-type": "application/grpc", "te": "trailers"},
        ),
    }
