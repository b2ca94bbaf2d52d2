"""Products of matrices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - as everyone calls it

from hasten.torchview.operators.operator import Function, Operator, Site, Tensor, plain


def _bind_gemm(site: Site) -> Function:
    alpha, beta = site.get("alpha", 1.0), site.get("beta", 1.0)
    flip_a, flip_b = site.get("transA", 0), site.get("transB", 0)
    bias_rank = site.rank(2)
    if alpha == 1.0 and beta == 1.0 and not flip_a and (bias_rank == 1 or not site.has(2)):
        return F.linear if flip_b else _linear

    def gemm(a: Tensor, b: Tensor, c: Any = None) -> Tensor:
        y = (a.t() if flip_a else a) @ (b.t() if flip_b else b)
        if alpha != 1.0:
            y = y * alpha
        return y if c is None else y + (c if beta == 1.0 else c * beta)

    return gemm


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Give x @ weight + bias; weight is [in, out]."""
    return F.linear(x, weight.t(), bias)


def _bind_einsum(site: Site) -> Function:
    equation = site.get("equation")

    def einsum(*inputs: Tensor) -> Tensor:
        return torch.einsum(equation, *inputs)

    return einsum


TABLE: Mapping[str, Operator] = {
    "Gemm": Operator(bind=_bind_gemm, attributes=frozenset(("alpha", "beta", "transA", "transB"))),
    "MatMul": plain(torch.matmul),
    "Einsum": Operator(bind=_bind_einsum, attributes=frozenset(("equation",))),
}
