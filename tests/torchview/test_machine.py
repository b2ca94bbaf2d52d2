"""Where a view computes while it is trained: filters and images lie channels last, and afterwards all is as it was."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from hasten.testing.models import Builder, convnet  # noqa: E402
from hasten.torchview.machine import computing, laid_out  # noqa: E402
from hasten.torchview.view import View  # noqa: E402


def filters(view):
    return [p for p in view.parameters() if p.ndim == 4 and p.shape[1] > 1 and p.shape[2] > 1]


def test_filters_lie_with_their_channels_last_meanwhile() -> None:
    view = View.of(convnet())
    before = [p.detach().clone() for p in filters(view)]
    assert before
    with computing("cpu", None, [view]):
        assert all(p.is_contiguous(memory_format=torch.channels_last) for p in filters(view))
        assert not any(p.is_contiguous() for p in filters(view))
    assert all(p.is_contiguous() for p in filters(view))
    assert all(torch.equal(a, b) for a, b in zip(before, filters(view), strict=True))


def test_filters_of_three_dimensions_and_constants_of_that_rank_stay_as_they_are() -> None:
    net = Builder(0)
    grid = net.constant(np.ones((1, 1, 1, 1, 3), np.float32))
    net.add("Mul", net.add("Conv", "x", net.weight(4, 1, 3, 3, 3)), grid)
    view = View.of(net.model(("x", ("batch", 1, 5, 5, 5)), ("y", ("batch", 4, 3, 3, 3))))
    with computing("cpu", None, [view]):
        assert view(torch.ones(2, 1, 5, 5, 5))[0].shape == (2, 4, 3, 3, 3)


def test_images_are_laid_out_alike_and_keep_their_values() -> None:
    batch = {"image": torch.randn(2, 3, 4, 5), "row": torch.randn(2, 3)}
    made = laid_out(batch)
    assert made["image"].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(made["image"], batch["image"])
    assert made["row"] is batch["row"]
