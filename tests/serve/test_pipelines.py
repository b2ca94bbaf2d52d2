"""Deployments with steps: a client sends files and gets labels, and a bad row is its own request's alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from hasten.engines.onnxruntime import OnnxRuntime
from hasten.protocol.messages import InferResponse
from hasten.samples.preprocess import Preprocess
from hasten.serve.repository import open_repository
from hasten.serve.service import Service
from hasten.store import read_artifact
from hasten.tensors import Array
from hasten.testing.models import convnet
from serve.bundles import bundle, instances_left, run
from serve.photos import CLASSES, POST, PRE, SIZE, asking, photo

PREPROCESS = Preprocess(resize=(SIZE, SIZE), mean=(0.5,), std=(0.25,))


def made(folder: Path, **more: Any) -> Path:
    """Write a bundle of a network on images, with steps around it."""
    told: dict[str, Any] = {"pre": PRE, "post": POST, "classes": list(CLASSES), **more}
    return bundle(folder, model=convnet(size=SIZE), **told)


async def started(path: Path, **more: Any) -> Service:
    service = Service(open_repository(path), **more)
    await service.start()
    assert service.ready(), service.index()
    return service


def scores(path: Path, *data: bytes) -> Array:
    """Give what a bare session says of the files, read as samples are."""
    x = np.stack([PREPROCESS.apply_image(each) for each in data])
    return OnnxRuntime().open(read_artifact(path.parent / "model")).run({"x": x})["y"]


def outputs(answer: InferResponse) -> dict[str, Array]:
    return {tensor.name: tensor.data for tensor in answer.outputs}


def expected(path: Path, *data: bytes) -> tuple[list[list[bytes]], Array]:
    raw = scores(path, *data).astype(np.float64)
    shares = np.exp(raw) / np.exp(raw).sum(axis=1, keepdims=True)
    order = np.argsort(-shares, axis=1)[:, :2]
    return [[CLASSES[i].encode() for i in row] for row in order], np.take_along_axis(shares, order, axis=1)


def test_a_photo_gets_labels_as_a_bare_session_has_them(tmp_path: Path) -> None:
    path = made(tmp_path / "net")
    sent = [photo(1), photo(2, form="PNG", height=70), photo(3, form="WEBP", width=9)]

    async def work() -> None:
        service = await started(path)
        got = outputs(await service.infer(asking(*sent, id="7")))
        about = service.model_metadata("net")
        await service.stop()
        labels, shares = expected(path, *sent)
        assert got["label"].tolist() == labels
        np.testing.assert_allclose(got["score"], shares, rtol=1e-4)
        assert [(t.name, t.datatype, t.shape) for t in about.inputs] == [("image", "BYTES", (-1,))]
        assert [(t.name, t.datatype, t.shape) for t in about.outputs] == [
            ("label", "BYTES", (-1, 2)),
            ("score", "FP32", (-1, 2)),
        ]

    run(work())
    assert not instances_left()
