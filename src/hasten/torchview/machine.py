"""Where PyTorch computes while a view is trained, and with how many threads; afterwards all is as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from hasten.errors import InvalidSetting


@contextlib.contextmanager
def computing(device: str, threads: int | None, modules: Sequence[nn.Module]) -> Iterator[None]:
    """Compute on ``device`` with ``threads``, the modules there; then bring them back, in evaluation mode.

    PyTorch's own random state is the caller's, and is as before afterwards. cuDNN takes deterministic kernels.

    Raises:
        InvalidSetting: PyTorch does not know the device, or does not find it here.
    """
    kind = check_device(device)
    before = torch.get_num_threads()
    cudnn = torch.backends.cudnn
    flags = (cudnn.deterministic, cudnn.benchmark)
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        cudnn.deterministic, cudnn.benchmark = True, False
        with torch.random.fork_rng(devices=[device] if kind == "cuda" else [], enabled=True):
            for module in modules:
                module.to(device)
                module.eval()
            yield
    finally:
        for module in modules:
            module.eval()
            module.to("cpu")
        cudnn.deterministic, cudnn.benchmark = flags
        torch.set_num_threads(before)


def check_device(device: str) -> str:
    """Give the kind of a device: "cpu", "cuda", ...

    Raises:
        InvalidSetting: PyTorch does not know it, or does not find it here.
    """
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise InvalidSetting(f"device = {device!r}: PyTorch knows no such device; use cpu or cuda") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise InvalidSetting(
            f"device = {device!r}: PyTorch finds {torch.cuda.device_count()} CUDA devices here; use cpu"
        )
    return str(found.type)
