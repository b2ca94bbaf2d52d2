"""Where PyTorch computes while a view is trained, and with how many threads; afterwards all is as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from hasten.errors import InvalidSetting


@contextlib.contextmanager
def computing(device: str, threads: int | None, modules: Sequence[nn.Module]) -> Iterator[None]:
    """Compute on ``device`` with ``threads``, the modules there; then bring them back, in evaluation mode.

    Filters lie in memory with their channels last meanwhile, as convolutions compute fastest; see ``laid_out``.
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
                for value in (*module.parameters(), *module.buffers()):
                    if value.ndim == 4:  # the format has no other rank
                        value.data = value.data.contiguous(memory_format=torch.channels_last)
                module.eval()
            yield
    finally:
        for module in modules:
            module.eval()
            module.to("cpu", memory_format=torch.contiguous_format)
        cudnn.deterministic, cudnn.benchmark = flags
        torch.set_num_threads(before)


def laid_out(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give a batch with what has four dimensions [n, c, h, w] laid out with its channels last; values stay."""
    return {
        name: value.contiguous(memory_format=torch.channels_last) if value.ndim == 4 else value
        for name, value in inputs.items()
    }


def found_device() -> str:
    """Give "cuda" where PyTorch finds a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


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
