"""What a search leaves to serve: answers to check it by, and steps so that it takes the files that people have."""

import asyncio
import io
import shutil
import zipfile

import ml_dtypes
import numpy as np
import pytest
from PIL import Image

from hasten.deployment import parse_deployment
from hasten.engines.onnxruntime import OnnxRuntime
from hasten.errors import StoreError, Untrusted
from hasten.golden import Golden, read_golden, write_golden
from hasten.protocol.messages import InferRequest, Tensor
from hasten.samples.preprocess import Preprocess
from hasten.search.optimize import optimize
from hasten.search.prepare import Data
from hasten.search.result import Goal
from hasten.search.task import Effort
from hasten.serve.repository import open_repository
from hasten.serve.service import Service
from hasten.steps.from_preprocess import image_input
from hasten.tensors import Signature, TensorSpec
from hasten.testing import models
from hasten.transform import run_pass

QUICK = Effort(trial_s=0.5, slice_s=0.01, finals_s=1.5, limit_s=60.0)
PREPROCESS = Preprocess(resize=(16, 16), mean=(0.5,), std=(0.25,))


def photo(seed):
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (3, 3, 3), np.uint8)
    held = io.BytesIO()
    Image.fromarray(coarse).resize((30, 24), Image.Resampling.BICUBIC).save(held, "JPEG")
    return held.getvalue()


@pytest.fixture
def photos(store, ctx, shared_peaks, tmp_path):
    """A small network, and a folder of photos by the class that it says itself, more often than usual."""
    shutil.copytree(shared_peaks, store.root / "peaks")
    source = models.stored(models.convnet(size=16, width=8, seed=4), store)
    session = OnnxRuntime().open(run_pass(OnnxRuntime(), source, store, ctx))
    files = [photo(seed) for seed in range(300)]
    y = session.run({"x": np.stack([PREPROCESS.apply_image(data) for data in files])})["y"]
    for seed, (data, best) in enumerate(zip(files, (y - y.mean(axis=0)).argmax(axis=1), strict=True)):
        (tmp_path / "photos" / f"kind{best}").mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / f"kind{best}" / f"{seed:03}.jpg").write_bytes(data)
    session.close()
    return store, source, tmp_path / "photos"


def test_a_search_over_photos_leaves_a_deployment_that_takes_a_photo_and_names_it(photos) -> None:
    store, source, folder = photos
    classes = sorted(path.name for path in folder.iterdir())
    data, goal = Data(preprocess=PREPROCESS), Goal(max_drop=0.2)
    how = {"engines": ["onnxruntime"], "threads": [1], "effort": QUICK, "home": store.root}
    result = optimize(source, folder, goal, data=data, **how)
    deployment = parse_deployment(result.deployment)
    assert [step["step"] for step in deployment.pre] == ["decode-image", "resize", "normalise"]
    assert [step["step"] for step in deployment.post] == ["softmax", "top-k"]
    golden = read_golden(result.deployment.parent)
    assert golden is not None
    assert len(golden.inputs["x"]) == len(golden.outputs["y"]) == 16

    async def work() -> None:
        service = Service(open_repository(result.deployment))
        await service.start()
        assert service.ready(), service.index()
        name = deployment.name
        data = np.empty(1, object)
        data[0] = photo(7)
        asked = InferRequest(model=name, inputs=(Tensor(name="image", datatype="BYTES", data=data),))
        got = {tensor.name: tensor.data for tensor in (await service.infer(asked)).outputs}
        x = PREPROCESS.apply_image(photo(7))[None]
        raw = await service.infer(InferRequest(model=f"{name}.raw", inputs=(Tensor.of("x", x),)))
        await service.stop()
        best = int(raw.outputs[0].data.argmax())
        assert got["label"][0].tolist()[0].decode() == classes[best]
        assert got["score"][0, 0] == got["y"][0, best] > 0.25

    asyncio.run(work())


def test_golden_answers_of_bfloat16_come_back_as_they_were(tmp_path) -> None:
    x = np.array([[1.0, -2.5, 3.0]], ml_dtypes.bfloat16)
    write_golden(tmp_path, Golden({"x": x}, {"y": x}))
    back = read_golden(tmp_path)
    assert (back.inputs["x"].dtype, back.inputs["x"].tolist()) == (x.dtype, x.tolist())
    back.check({"y": x})
    with pytest.raises(Untrusted):
        back.check({"y": x + 1})


def test_a_header_that_claims_more_than_there_is_memory_is_damage(tmp_path) -> None:
    held = io.BytesIO()
    np.lib.format.write_array_header_1_0(held, {"descr": "<f4", "fortran_order": False, "shape": (10**13,)})
    with zipfile.ZipFile(tmp_path / "golden.npz", "w") as file:
        file.writestr("inputs:x.npy", held.getvalue())
    with pytest.raises(StoreError, match="cannot be read"):
        read_golden(tmp_path)


def test_golden_answers_say_how_far_others_may_lie(tmp_path) -> None:
    y = np.ones((2, 3), np.float32)
    golden = Golden({"x": y}, {"y": y, "z": y}, {"y": 0.05})
    write_golden(tmp_path, golden)
    back = read_golden(tmp_path)
    assert back is not None
    assert back.within == {"y": 0.05}
    back.check({"y": y * 1.04, "z": y})
    for got, says in (
        ({"y": y * 1.06, "z": y}, r"'y' is off by 0.06 .*allowed: 0.05"),
        ({"y": y, "z": y * 1.04}, "'z'"),
    ):
        with pytest.raises(Untrusted, match=says):
            back.check(got)
    with pytest.raises(Untrusted, match="'y' is missing"):
        back.check({"z": y})


def test_the_input_of_images_is_the_only_one_with_four_axes() -> None:
    image, row = TensorSpec("x", "float32", ("n", 3, 8, 8)), TensorSpec("age", "float32", ("n", 1))
    assert image_input(Signature((row, image), ())) == "x"
    assert image_input(Signature((image, image), ())) is None
    assert image_input(Signature((row,), ())) is None
