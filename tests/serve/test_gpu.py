"""Models on a GPU: how they are served where nothing else is said, and, with a GPU, that they are."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import pytest

from hasten import registry
from hasten.deployment import Serving
from hasten.engines.onnxruntime import OnnxRuntime
from hasten.protocol.messages import InferRequest, Tensor
from hasten.serve.model import usual_sizes
from hasten.serve.reading import read_bundle
from hasten.serve.repository import open_repository
from hasten.serve.service import Service
from hasten.store import Store
from hasten.testing.deployments import deployed
from hasten.testing.faults import TwinEngine
from hasten.testing.models import Builder, convnet, mlp, random_samples, stored
from hasten.transform import Context, run_pass
from serve.bundles import bundle, run


@dataclass(frozen=True, kw_only=True)
class Elsewhere(TwinEngine):
    """ONNX Runtime that says it computes on a GPU."""

    name: ClassVar[str] = "elsewhere"
    device: ClassVar[str] = "cuda"


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of an engine that says it computes on a GPU."""
    monkeypatch.setitem(registry._registered["engine"], "elsewhere", registry.Entry("serve.test_gpu:Elsewhere"))
    yield "elsewhere"


async def started(path: Path) -> Service:
    service = Service(open_repository(path))
    await service.start()
    assert service.ready(), service.index()
    return service


def test_a_gpu_has_two_instances_and_large_batches_whatever_the_cores(tmp_path: Path, elsewhere: str) -> None:
    path = deployed(mlp(), tmp_path / "net", engine=elsewhere)

    async def work() -> None:
        service = await started(path)
        config = service.config("net")
        assert service.models()[0].pool.ready == 2, "a run on a GPU is none for the event loop's thread"
        assert config["instance_group"] == [{"name": "net", "count": 2, "kind": "KIND_GPU", "gpus": [0]}]
        assert config["dynamic_batching"] == {"preferred_batch_size": [1, 4, 16, 64]}
        await service.stop()

    run(work())


def relu(*row: int | str) -> onnx.ModelProto:
    """x [n, *row] -> y, as large."""
    net = Builder(0)
    net.add("Relu", "x")
    return net.model(("x", ("n", *row)), ("y", ("n", *row)))


@pytest.mark.parametrize(
    ("row", "sizes"),
    [((3, 640, 640), [1, 4]), ((1 << 25,), [1]), ((3, "height", "width"), [1, 2, 4, 8]), ((8,), [1, 4, 16, 64])],
)
def test_a_gpu_gets_fewer_large_rows_and_no_more_than_before_where_their_size_is_open(
    row: tuple[int | str, ...], sizes: list[int], tmp_path: Path, elsewhere: str
) -> None:
    path = deployed(relu(*row), tmp_path / "net", engine=elsewhere)
    (bundle,) = (found for versions in open_repository(path).scan().values() for found in versions.values())
    assert list(usual_sizes(read_bundle(bundle))) == sizes


def test_what_a_deployment_says_of_instances_and_batches_holds_on_a_gpu_too(tmp_path: Path, elsewhere: str) -> None:
    serving = Serving(isolation="thread", instances=3, batch_sizes=(1, 6))
    path = bundle(tmp_path / "net", engine=elsewhere, serving=serving)

    async def work() -> None:
        service = await started(path)
        config = service.config("net")
        assert (config["instance_group"][0]["count"], config["max_batch_size"]) == (3, 6)
        await service.stop()

    run(work())


def on_a_gpu(name: str) -> Any:
    """An engine on a GPU, or a skipped test."""
    if name == "torch":
        torch = pytest.importorskip("hasten.engines.torch")
        return torch.Torch(device="cuda")
    return OnnxRuntime(provider="cuda", graphs=name == "onnxruntime with graphs")


@pytest.mark.gpu
@pytest.mark.parametrize("isolation", ["thread", "process"])
@pytest.mark.parametrize("name", ["onnxruntime", "onnxruntime with graphs", "torch"])
def test_a_model_on_a_gpu_answers_many_at_once_as_the_processor_does_and_is_swapped_beside_them(
    name: str, isolation: str, tmp_path: Path, store: Store, ctx: Context
) -> None:
    """Needs an NVIDIA GPU, and PyTorch or onnxruntime-gpu."""
    engine, source = on_a_gpu(name), stored(convnet(), store)
    if reason := engine.why_not(source):
        pytest.skip(reason)
    instances = 1 if isolation == "process" else None  # a process takes seconds to begin
    serving = Serving(isolation=isolation, instances=instances)  # type: ignore[arg-type]
    deployed(convnet(), tmp_path / "models" / "net" / "1", runtime=engine, serving=serving)
    deployed(convnet(), tmp_path / "models" / "net" / "2", runtime=engine, serving=serving)
    samples = random_samples(source, n=64)
    (name_in,) = (spec.name for spec in source.signature.inputs)
    expected = OnnxRuntime().open(run_pass(OnnxRuntime(), source, store, ctx)).run(samples.feed(slice(0, 64)))["y"]

    async def work() -> None:
        service = await started(tmp_path / "models")

        async def ask(k: int) -> None:
            n = 1 + k % 5
            x = np.asarray(samples.feed(slice(k % 59, k % 59 + n))[name_in])
            answer = await service.infer(InferRequest(model="net", inputs=(Tensor.of(name_in, x),)))
            np.testing.assert_allclose(answer.outputs[0].data, expected[k % 59 : k % 59 + n], rtol=1e-3, atol=1e-4)

        for _ in range(3):
            await asyncio.gather(*(ask(k) for k in range(200)))
        swap = asyncio.ensure_future(service.load("net", "1"))
        asked = 0
        while not swap.done():
            await asyncio.gather(*(ask(k) for k in range(20)))
            asked += 20
        await swap
        assert asked
        await asyncio.gather(*(ask(k) for k in range(20)))
        await service.stop()

    run(work())
