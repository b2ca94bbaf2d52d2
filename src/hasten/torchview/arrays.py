"""NumPy arrays as PyTorch tensors, and back; bfloat16 too."""

from __future__ import annotations

import numpy as np
import torch

from hasten.tensors import DTYPES, Array


def to_torch(array: Array) -> torch.Tensor:
    """Copy an array into a tensor of the same dtype and shape."""
    own = np.array(array, order="C")
    if own.dtype == DTYPES["bfloat16"]:
        return torch.from_numpy(own.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(own)


def to_numpy(tensor: torch.Tensor) -> Array:
    """Copy a tensor, of any device, into an array of the same dtype and shape."""
    whole = tensor.detach().cpu().contiguous()
    if whole.dtype is torch.bfloat16:
        return np.array(whole.view(torch.int16).numpy()).view(DTYPES["bfloat16"])
    return np.array(whole.numpy())
