"""Attention as one operator: of ONNX, and of com.microsoft as the ``fuse`` pass writes it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F  # noqa: N812 - as everyone calls it

from hasten.torchview.operators.operator import Function, Operator, Site, Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, scale: float | None, causal: bool) -> Tensor:
    """Give softmax(q k^T * scale + mask) v; q is [batch, heads, length, depth], heads of k and v may be fewer.

    The mask broadcasts to [batch, heads, length of q, length of k]; a boolean one is true where a value is seen.
    """
    if causal and mask is not None:
        seen = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
        mask = mask & seen if mask.dtype is torch.bool else mask.masked_fill(~seen, float("-inf"))
        causal = False
    fewer = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=fewer)


def _split(x: Tensor, heads: int) -> Tensor:
    """Take [batch, length, heads * depth] apart: [batch, heads, length, depth]."""
    return x.reshape(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)


def _merged(x: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], -1)


def _bind_attention(site: Site) -> Function:
    if any(site.has(i) for i in range(4, len(site.node.input))):
        raise site.refuse("has a cache of keys and values, which is nothing to train with")
    if any(site.wants(i) for i in range(1, 4)):
        raise site.refuse("gives keys, values or scores, which the view does not make")
    if site.get("softcap", 0.0):
        raise site.refuse(f"has softcap = {site.get('softcap')}, which the table does not know")
    scale, causal = site.get("scale"), bool(site.get("is_causal", 0))
    q_heads, kv_heads = site.get("q_num_heads"), site.get("kv_num_heads")

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *cache: None) -> Tensor:
        if q.ndim == 4:
            return attend(q, k, v, mask, scale=scale, causal=causal)
        q, k, v = _split(q, q_heads), _split(k, kv_heads), _split(v, kv_heads)
        return _merged(attend(q, k, v, mask, scale=scale, causal=causal))

    return run


def _bind_multi_head(site: Site) -> Function:
    """Bind com.microsoft.MultiHeadAttention with q, k, v apart and, at most, a bias on the scores."""
    if site.rank(0) not in (3, None) or any(site.has(i) for i in (3, 4, 6, 7, 8, 9)) or site.get("unidirectional", 0):
        raise site.refuse("has other inputs than query, key, value and attention bias")
    heads, scale = site.get("num_heads"), site.get("scale")

    def run(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor | None) -> Tensor:
        bias = rest[2] if len(rest) > 2 else None
        q, k, v = (_split(x, heads) for x in (q, k, v))
        return _merged(attend(q, k, v, bias, scale=scale or None, causal=False))

    return run


TABLE: Mapping[str, Operator] = {
    "Attention": Operator(
        bind=_bind_attention,
        attributes=frozenset(
            (
                *("is_causal", "kv_num_heads", "q_num_heads", "qk_matmul_output_mode", "scale"),
                *("softcap", "softmax_precision"),
            )
        ),
    ),
}

MICROSOFT: Mapping[str, Operator] = {
    "MultiHeadAttention": Operator(
        bind=_bind_multi_head,
        attributes=frozenset(("mask_filter_value", "num_heads", "scale", "unidirectional")),
    ),
}
