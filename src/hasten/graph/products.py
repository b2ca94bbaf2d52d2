"""How many multiplications the operators with weights or matrix products make, from their shapes alone.

Engines tell kinds and shapes of what they run, but seldom strides, paddings or transpositions; so these are read from
the shapes. Where a shape is ambiguous the smaller count is taken: it serves a lower bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hasten.measurement import Operator
from hasten.tensors import TensorSpec

Shape = tuple[int, ...]


def concrete(spec: TensorSpec) -> Shape | None:
    """Give a tensor's shape, or None where a dimension is symbolic."""
    dims = tuple(dim for dim in spec.shape if isinstance(dim, int))
    return dims if len(dims) == len(spec.shape) else None


def shape_at(specs: tuple[TensorSpec, ...], index: int) -> Shape | None:
    """Give the shape of one input or output, or None where it is not there or not known."""
    return concrete(specs[index]) if index < len(specs) else None


def operand(operator: Operator) -> Shape | None:
    """Give the shape of a product's second factor; in QLinearMatMul and QGemm it stands behind a scale."""
    quantized = len(operator.inputs) > 3 and operator.kind.lower().rpartition(".")[2].startswith(("qlinear", "qgemm"))
    return shape_at(operator.inputs, 3 if quantized else 1)


@dataclass(frozen=True)
class _Window:
    """A convolution as its shapes tell: of each output element, which products are with real data."""

    weight: Shape
    kernel: Shape
    data: Shape
    """The input's spatial lengths."""
    out: Shape
    groups: bool
    outputs: int
    """Output elements over all channels and samples."""
    products: int
    """Products an output element, over the kernel and its input channels."""


def _window(operator: Operator) -> _Window | None:
    """Read a convolution; None where its shapes do not fit one."""
    x, y = shape_at(operator.inputs, 0), shape_at(operator.outputs, 0)
    if x is None or y is None or len(x) < 3 or len(y) != len(x) or not math.prod(y):
        return None
    spatial = len(x) - 2
    weights = (concrete(s) for s in operator.inputs[1:] if len(s.shape) in (spatial + 2, spatial + 3))
    w = next((shape for shape in weights if shape), None)
    if w is None:
        return None
    grouped = len(w) == spatial + 3  # OpenVINO: [groups, out / groups, in / groups, ...]
    maps = w[0] * w[1] if grouped else w[0]
    last = y[1] != maps and y[-1] == maps
    channels = x[-1] if last else x[1]
    return _Window(
        weight=w,
        kernel=w[-spatial:],
        data=x[1:-1] if last else x[2:],
        out=y[1:-1] if last else y[2:],
        groups=grouped or w[1] != channels,
        outputs=math.prod(y),
        products=math.prod(w) // max(maps, 1),
    )


def _convolution(operator: Operator) -> float | None:
    """Output elements x products of each, without those that fall into padding."""
    window = _window(operator)
    if window is None:
        return None
    met = math.prod(map(_met_products, window.data, window.kernel, window.out))
    maps = window.outputs // math.prod(window.out)
    return float(maps * (window.products // math.prod(window.kernel)) * met)


def _met_products(length: int, kernel: int, out: int) -> int:
    """Count the products along one axis that meet data, not padding, over all positions of the window.

    Stride and padding are read from the lengths: none if that explains the output, else the stride nearest to the
    ratio of lengths, and padding on both sides. (A dilated kernel meets more padding: then this is too much.)
    """
    stride = max(1, round(length / out))
    padding = (out - 1) * stride + kernel - length
    if padding <= 0 or _unpadded(length, kernel, out):
        return out * kernel
    starts = range(-(padding // 2), out * stride - padding // 2, stride)
    return sum(max(0, min(at + kernel, length) - max(at, 0)) for at in starts)


def _unpadded(length: int, kernel: int, out: int) -> bool:
    if length < kernel:
        return False
    if out == 1:
        return length < 2 * kernel
    stride = (length - kernel) // (out - 1)
    return stride >= 1 and (length - kernel) // stride + 1 == out


def suits_winograd(kind: str, operator: Operator) -> bool:
    """Tell if it is an ungrouped 3x3 convolution of stride 1 in floating point.

    F(4x4, 3x3) makes 36 products where the direct way makes 144: A. Lavin and S. Gray, "Fast algorithms for
    convolutional neural networks", CVPR 2016.
    """
    if PRODUCTS.get(kind) is not _convolution or operator.dtype.lstrip("u").startswith("int"):
        return False
    window = _window(operator)
    if window is None or window.groups or window.kernel != (3, 3):
        return False
    return all(out >= length - 2 > 0 for length, out in zip(window.data, window.out, strict=True))


def _transposed_convolution(operator: Operator) -> float | None:
    """Input elements x products of each. Those that are cropped at the border are counted."""
    x, w = shape_at(operator.inputs, 0), shape_at(operator.inputs, 1)
    if x is None or w is None or len(x) < 3 or len(w) < len(x):
        return None
    maps = w[0] * w[1] if len(w) > len(x) else w[0]
    return math.prod(x) * math.prod(w) / max(maps, 1)


def _matrix_product(operator: Operator) -> float | None:
    """[..., m, k] x [..., k, n], either of them perhaps transposed: output elements x k."""
    a, y = shape_at(operator.inputs, 0), shape_at(operator.outputs, 0)
    if a is None or y is None or not a:
        return None
    if len(a) == 1 or not y:
        return float(math.prod(y) * a[-1])
    b = operand(operator)
    if b is not None and len(b) == 1:
        return float(math.prod(y) * a[-1])
    rows = y[-2] if len(y) > 1 else 1
    inner = a[-1] if a[-2] == rows or a[-1] != rows else a[-2]
    return float(math.prod(y) * inner)


def _recurrent(operator: Operator) -> float | None:
    """X [steps, batch, in] through W [directions, gates, in] and R [directions, gates, hidden]."""
    x, w, r = (shape_at(operator.inputs, i) for i in range(3))
    if x is None or w is None or r is None or len(x) != 3:
        return None
    return float(x[0] * x[1] * (math.prod(w) + math.prod(r)))


def _joint_attention(operator: Operator) -> float | None:
    """ONNX Runtime's Attention: x [batch, length, in] through weights [in, q + k + v], then the attention itself."""
    x, w, y = shape_at(operator.inputs, 0), shape_at(operator.inputs, 1), shape_at(operator.outputs, 0)
    if x is None or w is None or y is None or len(x) != 3 or len(w) != 2:
        return _attention(operator)
    return float(math.prod(x[:2]) * math.prod(w) + 2 * math.prod(y) * x[1])


def _attention(operator: Operator) -> float | None:
    """Queries against keys, then weights against values; keys are [..., length, width]."""
    query, key, y = shape_at(operator.inputs, 0), shape_at(operator.inputs, 1), shape_at(operator.outputs, 0)
    if query is None or key is None or y is None or len(key) not in (3, 4) or len(query) != len(key):
        return None
    return float((math.prod(query) + math.prod(y)) * key[-2])


def _tokenized_attention(operator: Operator) -> float | None:
    """OpenVINO's: q [b, l, h, d], k [b, h, d, s], v [b, s, h, e] -> [b, l, h, e], the transpositions inside."""
    q, k, v = (shape_at(operator.inputs, i) for i in range(3))
    y = shape_at(operator.outputs, 0)
    if q is None or k is None or v is None or y is None or {len(q), len(k), len(v), len(y)} != {4} or q == k:
        return None
    batch, length, heads, depth = q
    steps, wide = k[3], v[3]
    if k[:3] != (batch, heads, depth) or v[:3] != (batch, steps, heads) or y != (batch, length, heads, wide):
        return None
    return float(batch * heads * length * steps * (depth + wide))


def _attention_of_unknown_layout(operator: Operator) -> float | None:
    """OpenVINO does not tell if keys are [batch, heads, length, width] or [batch, length, heads, width]: take less."""
    if (known := _tokenized_attention(operator)) is not None:
        return known
    query, key, y = shape_at(operator.inputs, 0), shape_at(operator.inputs, 1), shape_at(operator.outputs, 0)
    if query is None or key is None or y is None or len(key) != 4:
        return None
    return float((math.prod(query) + math.prod(y)) * min(key[1:3]))


PRODUCTS: Mapping[str, Callable[[Operator], float | None]] = {
    **dict.fromkeys(("conv", "fusedconv", "nhwcconv", "nhwcfusedconv", "convinteger"), _convolution),
    **dict.fromkeys(("qlinearconv", "convolution", "groupconvolution"), _convolution),
    **dict.fromkeys(("convtranspose", "deconvolution", "groupdeconvolution"), _transposed_convolution),
    **dict.fromkeys(("matmul", "fusedmatmul", "gemm", "fusedgemm", "matmulinteger", "matmulnbits"), _matrix_product),
    **dict.fromkeys(("qlinearmatmul", "qgemm"), _matrix_product),
    **dict.fromkeys(("transposematmul", "matmulintegertofloat", "dynamicquantizematmul"), _matrix_product),
    **dict.fromkeys(("fullyconnected", "fullyconnectedcompressed", "fullyconnectedquantized"), _matrix_product),
    **dict.fromkeys(("lstm", "gru", "rnn", "dynamicquantizelstm", "lstmsequence", "grusequence"), _recurrent),
    **dict.fromkeys(("attention", "qattention"), _joint_attention),
    **dict.fromkeys(("multiheadattention",), _attention),
    **dict.fromkeys(("mha", "scaleddotproductattention", "sdpa"), _attention_of_unknown_layout),
    "subgraph": _tokenized_attention,  # any other subgraph does not tell what it computes
}
"""How many multiplications a kind makes. Fused activations and additions are not counted."""
