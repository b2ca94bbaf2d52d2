"""What scikit-learn's converter writes around a neural network: the domain ai.onnx.ml, as far as tensors go."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from hasten.torchview.operators.operator import Function, Operator, Site, Tensor, plain


def extract(x: Tensor, places: Tensor) -> Tensor:
    """Read along the last axis; a vector becomes one row."""
    found = x.index_select(-1, places.reshape(-1).to(torch.int64))
    return found.unsqueeze(0) if x.ndim == 1 else found


def _bind_scaler(site: Site) -> Function:
    offset, scale = (list(site.get(name) or ()) for name in ("offset", "scale"))

    def run(x: Tensor) -> Tensor:
        x = x if x.is_floating_point() else x.to(torch.float32)  # what it gives, whatever it takes
        return (x - x.new_tensor(offset)) * x.new_tensor(scale)

    return run


def _bind_normalizer(site: Site) -> Function:
    kinds = {"L1": 1.0, "L2": 2.0}
    norm = site.get("norm", "MAX")
    if norm not in kinds:
        raise site.refuse(f"has norm = {norm!r}; known: {', '.join(kinds)}")

    def run(x: Tensor) -> Tensor:
        x = x if x.is_floating_point() else x.to(torch.float32)
        size = torch.linalg.vector_norm(x, kinds[norm], -1, keepdim=True)
        return x / torch.where(size == 0, 1.0, size)

    return run


TABLE: Mapping[str, Operator] = {
    "ArrayFeatureExtractor": plain(extract),
    "Scaler": Operator(bind=_bind_scaler, attributes=frozenset(("offset", "scale"))),
    "Normalizer": Operator(bind=_bind_normalizer, attributes=frozenset(("norm",))),
}
