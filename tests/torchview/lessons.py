"""What the tests of training learn: samples labelled by one network, learned by another. Also the child of a test."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from hasten.samples import Samples
from hasten.testing.models import convnet, mlp
from hasten.torchview.checks import outputs_of
from hasten.torchview.training import Pace, Training, train
from hasten.torchview.view import View

EVERY_STEP = Pace(progress_s=0.0, checkpoint_s=0.0)
LONG = Training(epochs=4.0, batch=32, lr=3e-3, threads=1)


def teacher():
    return View.of(mlp(seed=1)).eval()


def pupil(seed=0):
    return View.of(mlp(seed=seed))


def rows(n=400, seed=0):
    return np.random.default_rng(seed).standard_normal((n, 16)).astype(np.float32)


def lesson(n=400, seed=0):
    """Samples with the teacher's classes."""
    x = rows(n, seed)
    return Samples({"x": x}, outputs_of(teacher(), Samples({"x": x}))["y"].argmax(1))


def pictures(n=96, seed=0):
    """Images with classes that a convnet can learn: which channel is brightest."""
    x = np.random.default_rng(seed).standard_normal((n, 3, 16, 16)).astype(np.float32)
    bright = np.arange(n) % 3
    x[np.arange(n), bright] += 0.5
    return Samples({"x": x}, bright)


def small_convnet():
    return View.of(convnet(width=4))


def accuracy(view, samples):
    return float((outputs_of(view, samples)["y"].argmax(1) == samples.labels).mean())


if __name__ == "__main__":
    train(
        pupil(),
        lesson(),
        LONG,
        teacher=teacher(),
        checkpoints=Path(sys.argv[1]),
        progress=lambda text, share: print(f"{share:.6f}", flush=True),  # noqa: T201
        pace=EVERY_STEP,
    )
