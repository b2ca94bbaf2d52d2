"""For each operator of the table: nodes with random shapes and attributes, to run in ONNX Runtime and in the view."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

OPSET = 20


@dataclass(frozen=True)
class Case:
    """One node with its inputs; those in ``constants`` are initializers, the others inputs of the graph."""

    kind: str
    inputs: Sequence[Any]
    outputs: int = 1
    opset: int = OPSET
    domain: str = ""
    constants: frozenset[int] = frozenset()
    attributes: dict[str, Any] = field(default_factory=dict)
    unused: frozenset[int] = frozenset()
    """Outputs that are left out."""
    smooth: bool = True
    """Its gradients are those of finite differences."""
    tolerance: float = 2e-5
    """float32 has 24 bits, and sums of some hundred terms have another order."""

    def __post_init__(self) -> None:
        arrays = [None if value is None else np.asarray(value) for value in self.inputs]
        object.__setattr__(self, "inputs", arrays)

    def model(self) -> onnx.ModelProto:
        names = ["" if value is None else f"x{i}" for i, value in enumerate(self.inputs)]
        made = ["" if i in self.unused else f"y{i}" for i in range(self.outputs)]
        node = helper.make_node(self.kind, names, made, name="node", domain=self.domain, **self.attributes)
        given = [i for i, value in enumerate(self.inputs) if value is not None]
        graph = helper.make_graph(
            [node],
            "one",
            [
                helper.make_tensor_value_info(
                    f"x{i}", helper.np_dtype_to_tensor_dtype(self.inputs[i].dtype), self.inputs[i].shape
                )
                for i in given
                if i not in self.constants
            ],
            [helper.make_value_info(name, onnx.TypeProto()) for name in made if name],
            [numpy_helper.from_array(self.inputs[i], f"x{i}") for i in given if i in self.constants],
        )
        opsets = [
            helper.make_opsetid("", self.opset),
            helper.make_opsetid("com.microsoft", 1),
            helper.make_opsetid("ai.onnx.ml", 3),
        ]
        return _typed(helper.make_model(graph, opset_imports=opsets, ir_version=10))

    def feed(self) -> dict[str, np.ndarray]:
        return {f"x{i}": value for i, value in enumerate(self.inputs) if value is not None and i not in self.constants}


def _typed(model: onnx.ModelProto) -> onnx.ModelProto:
    inferred = onnx.shape_inference.infer_shapes(model)
    for mine, found in zip(model.graph.output, inferred.graph.output, strict=True):
        kind = found.type.tensor_type.elem_type or TensorProto.FLOAT
        mine.CopyFrom(helper.make_tensor_value_info(mine.name, kind, None))
    return model


class Draw:
    """Draws parts of a case with hypothesis."""

    def __init__(self, data: Any) -> None:
        self.draw = data.draw
        self.random = np.random.default_rng(self.draw(st.integers(0, 2**16)))

    def int(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))

    def bool(self) -> bool:
        return self.draw(st.booleans())

    def of(self, *choices: Any) -> Any:
        return self.draw(st.sampled_from(choices))

    def shape(self, low: int = 1, high: int = 4, longest: int = 5) -> tuple[int, ...]:
        return tuple(self.int(1, longest) for _ in range(self.int(low, high)))

    def float(self, *shape: int, low: float | None = None, high: float = 1.0) -> np.ndarray:
        if low is None:
            return self.random.standard_normal(shape).astype(np.float32)
        return self.random.uniform(low, high, shape).astype(np.float32)

    def axis(self, rank: int, extra: int = 0) -> int:
        return self.int(-rank - extra, rank - 1 + extra)

    def axes(self, rank: int, least: int = 1) -> list[int]:
        chosen = self.draw(st.lists(st.integers(0, rank - 1), min_size=least, max_size=rank, unique=True))
        return [axis - rank if self.bool() else axis for axis in chosen]


def whole(values: Any) -> np.ndarray:
    return np.asarray(values, np.int64)


Generator = Callable[[Draw], Case]
CASES: dict[str, Generator] = {}


def case(*kinds: str) -> Callable[[Any], Any]:
    """Enter a generator for operators; one for several gets the kind first."""

    def enter(function: Any) -> Any:
        for kind in kinds:
            CASES[kind] = (lambda d, kind=kind: function(d, kind)) if len(kinds) > 1 else function
        return function

    return enter


# Values at the same place

ROUGH = ("Ceil", "Floor", "Round", "Sign")
DOMAIN = {"Acos": (-0.9, 0.9), "Asin": (-0.9, 0.9), "Atanh": (-0.9, 0.9), "Acosh": (1.1, 3.0)}
DOMAIN |= {"Log": (0.1, 3.0), "Sqrt": (0.1, 3.0), "Reciprocal": (0.5, 3.0), "Tan": (-1.2, 1.2)}


@case(
    *("Abs", "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "Ceil", "Cos", "Cosh", "Erf", "Exp", "Floor"),
    *("Log", "Neg", "Reciprocal", "Round", "Sign", "Sin", "Sinh", "Sqrt", "Tan", "Tanh", "Sigmoid", "Relu"),
    *("HardSwish", "Softplus", "Softsign", "Mish", "Identity"),
)
def unary(d: Draw, kind: str) -> Case:
    low, high = DOMAIN.get(kind, (-3.0, 3.0))
    return Case(kind, [d.float(*d.shape(0), low=low, high=high)], smooth=kind not in ROUGH)


@case("LeakyRelu", "Elu", "Celu", "ThresholdedRelu")
def with_alpha(d: Draw, kind: str) -> Case:
    attributes = {"alpha": d.of(0.1, 0.5, 1.5)} if d.bool() else {}
    return Case(kind, [d.float(*d.shape()) * np.float32(2)], attributes=attributes)


@case("Selu")
def selu(d: Draw) -> Case:
    return Case("Selu", [d.float(*d.shape())], attributes={"alpha": 1.5, "gamma": 1.2} if d.bool() else {})


@case("HardSigmoid")
def hard_sigmoid(d: Draw) -> Case:
    attributes = {"alpha": 1 / 6, "beta": 0.4} if d.bool() else {}
    return Case("HardSigmoid", [d.float(*d.shape()) * np.float32(3)], attributes=attributes)


@case("Shrink")
def shrink(d: Draw) -> Case:
    return Case("Shrink", [d.float(*d.shape())], attributes={"bias": d.of(0.0, 0.3), "lambd": d.of(0.5, 0.8)})


@case("Swish")
def swish(d: Draw) -> Case:
    return Case("Swish", [d.float(*d.shape())], opset=24, attributes={"alpha": d.of(1.0, 1.7)})


@case("Gelu")
def gelu(d: Draw) -> Case:
    return Case("Gelu", [d.float(*d.shape())], attributes={"approximate": d.of("none", "tanh")})


@case("PRelu")
def prelu(d: Draw) -> Case:
    x = d.float(*d.shape(2, 4))
    slope = d.of((1,), (x.shape[1], *[1] * (x.ndim - 2)), x.shape, (x.shape[-1],))
    return Case("PRelu", [x, d.float(*slope)], constants=frozenset(d.of((), (1,))))


@case("Clip")
def clip(d: Draw) -> Case:
    x, low, high = d.float(*d.shape()), np.float32(-0.5), np.float32(0.7)
    if d.bool():
        return Case("Clip", [x], opset=6, attributes={"min": -0.4, "max": 0.6})
    bounds = [np.asarray(low) if d.bool() else None, np.asarray(high) if d.bool() else None]
    return Case("Clip", [x, *bounds], constants=frozenset((1, 2)))


@case("Softmax", "LogSoftmax", "Hardmax")
def softmax(d: Draw, kind: str) -> Case:
    x, opset = d.float(*d.shape(1, 4)), d.of(11, 13, 20)
    attributes = {"axis": d.axis(x.ndim)} if d.bool() or x.ndim == 1 else {}
    return Case(kind, [x], opset=opset, attributes=attributes, smooth=kind != "Hardmax")


@case("Dropout")
def dropout(d: Draw) -> Case:
    x, opset = d.float(*d.shape()), d.of(11, 20)
    if opset == 11:
        return Case("Dropout", [x], opset=11, attributes={"ratio": 0.3})
    return Case("Dropout", [x, np.asarray(np.float32(0.3))], constants=frozenset((1,)))


def _broadcast(d: Draw, count: int) -> list[tuple[int, ...]]:
    shape = d.shape(1, 4)
    found = [tuple(1 if d.int(0, 2) == 0 else n for n in shape)[d.int(0, len(shape)) :] for _ in range(count - 1)]
    found.insert(d.int(0, count - 1), shape)
    return found


@case("Add", "Sub", "Mul", "Div", "Pow", "Mod")
def arithmetic(d: Draw, kind: str) -> Case:
    one, other = _broadcast(d, 2)
    if kind != "Pow" and d.bool():
        values = [d.random.integers(-9, 9, one), d.random.integers(1, 9, other) * d.of(1, -1)]
        return Case(kind, [v.astype(d.of(np.int32) if kind == "Mod" else np.int64) for v in values])
    low = 0.5 if kind in ("Pow", "Div", "Mod") else -2.0
    attributes = {"fmod": 1} if kind == "Mod" else {}
    constants = frozenset(d.of((), (0,), (1,))) if kind != "Pow" else frozenset(d.of((), (1,)))
    inputs = [d.float(*one, low=low, high=3.0), d.float(*other, low=low, high=3.0)]
    return Case(kind, inputs, attributes=attributes, constants=constants, smooth=kind != "Mod")


@case("Max", "Min", "Sum", "Mean")
def several(d: Draw, kind: str) -> Case:
    shapes = _broadcast(d, d.int(2, 3))
    return Case(kind, [d.float(*shape) for shape in shapes], constants=frozenset(d.of((), (0,), (1,))))


@case("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")
def compare(d: Draw, kind: str) -> Case:
    one, other = _broadcast(d, 2)
    inputs = [d.random.integers(0, 3, shape).astype(np.float32) for shape in (one, other)]
    return Case(kind, inputs, constants=frozenset(d.of((), (1,))))


@case("And", "Or", "Xor")
def logic(d: Draw, kind: str) -> Case:
    return Case(kind, [d.random.integers(0, 2, shape).astype(bool) for shape in _broadcast(d, 2)])


@case("Not")
def logical_not(d: Draw) -> Case:
    return Case("Not", [d.random.integers(0, 2, d.shape()).astype(bool)])


@case("BitwiseAnd", "BitwiseOr", "BitwiseXor", "BitShift")
def bitwise(d: Draw, kind: str) -> Case:
    attributes = {"direction": d.of("LEFT", "RIGHT")} if kind == "BitShift" else {}
    dtype = np.uint8 if kind == "BitShift" else np.int32
    return Case(kind, [d.random.integers(0, 7, s).astype(dtype) for s in _broadcast(d, 2)], attributes=attributes)


@case("BitwiseNot")
def bitwise_not(d: Draw) -> Case:
    return Case("BitwiseNot", [d.random.integers(-9, 9, d.shape()).astype(np.int32)])


@case("IsNaN", "IsInf")
def special(d: Draw, kind: str) -> Case:
    x = d.random.choice(np.array([0, 1, np.nan, np.inf, -np.inf], np.float32), d.shape())
    attributes = {"detect_negative": d.int(0, 1), "detect_positive": d.int(0, 1)} if kind == "IsInf" else {}
    return Case(kind, [x], attributes=attributes)


@case("Where")
def where(d: Draw) -> Case:
    shapes = _broadcast(d, 3)
    inputs = [d.random.integers(0, 2, shapes[0]).astype(bool), d.float(*shapes[1]), d.float(*shapes[2])]
    return Case("Where", inputs, constants=frozenset(d.of((), (1,), (2,))))


@case("Cast")
def cast(d: Draw) -> Case:
    to = d.of(*(getattr(TensorProto, name) for name in ("FLOAT", "INT64", "INT32", "BOOL", "FLOAT16", "DOUBLE")))
    return Case("Cast", [d.float(*d.shape()) * np.float32(5)], attributes={"to": to}, smooth=False)


@case("CastLike")
def cast_like(d: Draw) -> Case:
    return Case("CastLike", [d.float(2, 3) * np.float32(5), np.zeros(1, d.of(np.int64, np.float64))], smooth=False)


# Convolution, pooling, sampling


def _window(d: Draw, n: int, size: int, *, dilated: bool = True) -> dict[str, Any]:
    kernel = [d.int(1, 3) for _ in range(n)]
    attributes: dict[str, Any] = {"kernel_shape": kernel}
    if d.bool():
        attributes["strides"] = [d.int(1, 3) for _ in range(n)]
    if dilated and d.bool():
        attributes["dilations"] = [d.int(1, 2) for _ in range(n)]
    auto = d.of("NOTSET", "NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID")
    if auto != "NOTSET":
        attributes["auto_pad"] = auto
        attributes.pop("dilations", None)  # ONNX Runtime refuses them, or pools to other lengths than the standard
    elif d.bool():
        half = [d.int(0, k - 1) for k in kernel]
        attributes["pads"] = half + (half if d.bool() else [d.int(0, k - 1) for k in kernel])
    return attributes


@case("Conv")
def conv(d: Draw) -> Case:
    n, group = d.int(1, 3), d.of(1, 1, 2)
    attributes = _window(d, n, 7)
    channels, out = 2 * group, group * d.int(1, 3)
    x, w = d.float(d.int(1, 2), channels, *[7] * n), d.float(out, 2, *attributes["kernel_shape"])
    inputs = [x, w, d.float(out)] if d.bool() else [x, w]
    return Case("Conv", inputs, constants=frozenset((1, 2)), attributes=attributes | {"group": group})


@case("ConvTranspose")
def conv_transpose(d: Draw) -> Case:
    n, group = d.int(1, 2), d.of(1, 1, 2)
    attributes = _window(d, n, 4) | {"group": group}
    strides = attributes.get("strides", [1] * n)
    if "auto_pad" in attributes:
        attributes.pop("dilations", None)
        attributes["kernel_shape"] = [max(k, s) for k, s in zip(attributes["kernel_shape"], strides, strict=True)]
    elif d.bool():
        attributes["output_padding"] = [d.int(0, s - 1) for s in strides]
    x, w = d.float(d.int(1, 2), 2 * group, *[4] * n), d.float(2 * group, d.int(1, 3), *attributes["kernel_shape"])
    inputs = [x, w, d.float(w.shape[1] * group)] if d.bool() else [x, w]
    return Case("ConvTranspose", inputs, constants=frozenset((1, 2)), attributes=attributes)


@case("MaxPool")
def max_pool(d: Draw) -> Case:
    n = d.int(1, 3)
    attributes = _window(d, n, 7) | ({"ceil_mode": 1} if d.bool() else {})
    outputs = d.int(1, 2) if "auto_pad" not in attributes and "ceil_mode" not in attributes else 1
    return Case("MaxPool", [d.float(2, 2, *[7] * n)], outputs, attributes=attributes)


@case("AveragePool")
def average_pool(d: Draw) -> Case:
    n = d.int(1, 3)
    attributes = _window(d, n, 7) | {"count_include_pad": d.int(0, 1)} | ({"ceil_mode": 1} if d.bool() else {})
    return Case("AveragePool", [d.float(2, 2, *[7] * n)], attributes=attributes)


@case("LpPool")
def lp_pool(d: Draw) -> Case:
    attributes = _window(d, 2, 7, dilated=False) | {"p": d.int(1, 3)}
    return Case("LpPool", [d.float(2, 2, 7, 7)], attributes=attributes, tolerance=1e-4)


@case("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool")
def global_pool(d: Draw, kind: str) -> Case:
    return Case(kind, [d.float(2, 3, *d.shape(1, 3))])


@case("Pad")
def pad(d: Draw) -> Case:
    x, mode = d.float(*[d.int(3, 5) for _ in range(d.int(1, 4))]), d.of("constant", "reflect", "edge", "wrap")
    low = -1 if mode == "constant" else 0
    if d.bool():
        inputs = [x, whole([d.int(low, 2) for _ in range(2 * x.ndim)])]
    else:
        axes = d.axes(x.ndim)
        inputs = [x, whole([d.int(low, 2) for _ in range(2 * len(axes))]), None, whole(axes)]
    if mode == "constant" and d.bool():
        inputs[2:3] = [np.asarray(np.float32(1.5))]
    return Case("Pad", inputs, constants=frozenset((1, 2, 3)), attributes={"mode": mode}, opset=19)


@case("Resize")
def resize(d: Draw) -> Case:
    mode = d.of("nearest", "linear", "cubic")
    x = d.float(1, 2, d.int(3, 5), d.int(3, 5))
    attributes = {
        "mode": mode,
        "coordinate_transformation_mode": d.of("half_pixel", "align_corners", "asymmetric", "pytorch_half_pixel"),
    }
    if mode == "nearest":
        attributes["nearest_mode"] = d.of("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")
    if mode == "cubic":
        attributes["cubic_coeff_a"] = d.of(-0.75, -0.5)
        attributes["exclude_outside"] = int(d.bool() and attributes["coordinate_transformation_mode"] == "half_pixel")
    if mode != "nearest" and attributes["coordinate_transformation_mode"] == "half_pixel" and d.bool():
        attributes["antialias"] = 1
    if d.bool():
        inputs = [x, None, np.array([1, 1, d.of(0.5, 2.0, 1.5), d.of(1.0, 2.0)], np.float32)]
    else:
        inputs = [x, None, None, whole([1, 2, d.int(2, 9), d.int(2, 9)])]
    return Case("Resize", inputs, constants=frozenset((2, 3)), attributes=attributes, opset=18, tolerance=1e-4)


@case("Upsample")
def upsample(d: Draw) -> Case:
    inputs = [d.float(1, 2, 3, 4), np.array([1, 1, d.of(1.0, 2.0, 1.5), d.of(2.0, 3.0)], np.float32)]
    return Case("Upsample", inputs, constants=frozenset((1,)), attributes={"mode": d.of("nearest", "linear")}, opset=9)


@case("DepthToSpace")
def depth_to_space(d: Draw) -> Case:
    block = d.int(1, 3)
    attributes = {"blocksize": block, "mode": d.of("DCR", "CRD")}
    return Case("DepthToSpace", [d.float(2, 2 * block**2, 2, 3)], attributes=attributes)


@case("SpaceToDepth")
def space_to_depth(d: Draw) -> Case:
    block = d.int(1, 3)
    return Case("SpaceToDepth", [d.float(2, 2, 2 * block, 3 * block)], attributes={"blocksize": block})


# Normalization


@case("BatchNormalization")
def batch_norm(d: Draw) -> Case:
    x = d.float(d.int(2, 3), d.int(1, 4), *d.shape(0, 3))
    channels = x.shape[1]
    weights = [d.float(channels), d.float(channels), d.float(channels), d.float(channels, low=0.5, high=2.0)]
    attributes = {"epsilon": d.of(1e-5, 1e-2), "momentum": 0.8}
    return Case("BatchNormalization", [x, *weights], constants=frozenset((1, 2, 3, 4)), attributes=attributes)


@case("LayerNormalization")
def layer_norm(d: Draw) -> Case:
    x = d.float(*d.shape(0, 3), 4)
    axis = d.axis(x.ndim)
    shape = x.shape[axis:]
    inputs = [x, d.float(*shape), d.float(*shape)] if d.bool() else [x, d.float(*shape)]
    attributes = {"axis": axis, "epsilon": d.of(1e-5, 1e-2)}
    return Case(
        *("LayerNormalization", inputs, d.of(1, 3)), constants=frozenset((1, 2)), attributes=attributes, tolerance=1e-4
    )


@case("RMSNormalization")
def rms_norm(d: Draw) -> Case:
    x = d.float(*d.shape(2, 4))
    axis = d.axis(x.ndim)
    return Case(
        *("RMSNormalization", [x, d.float(*x.shape[axis:])]), opset=23, attributes={"axis": axis, "epsilon": 1e-3}
    )


@case("InstanceNormalization")
def instance_norm(d: Draw) -> Case:
    x = d.float(2, 3, 4, *d.shape(0, 2))
    inputs = [x, d.float(3), d.float(3)]
    return Case("InstanceNormalization", inputs, constants=frozenset((1, 2)), attributes={"epsilon": 1e-3})


@case("GroupNormalization")
def group_norm(d: Draw) -> Case:
    opset, groups = d.of(18, 21), d.int(1, 3)
    x = d.float(2, 2 * groups, 3, *d.shape(0, 2))
    count = groups if opset == 18 else 2 * groups
    attributes = {"num_groups": groups, "epsilon": 1e-3}
    inputs = [x, d.float(count), d.float(count)]
    return Case("GroupNormalization", inputs, constants=frozenset((1, 2)), opset=opset, attributes=attributes)


@case("LpNormalization")
def lp_norm(d: Draw) -> Case:
    x = d.float(*d.shape(1, 3))
    return Case("LpNormalization", [x], attributes={"axis": d.axis(x.ndim), "p": d.int(1, 2)})


@case("LRN")
def lrn(d: Draw) -> Case:
    attributes = {"size": d.of(1, 3, 5), "alpha": 0.1, "beta": 0.6, "bias": 1.5}
    return Case("LRN", [d.float(2, d.int(1, 6), 3, 3)], attributes=attributes)


@case("MeanVarianceNormalization")
def mean_variance(d: Draw) -> Case:
    return Case("MeanVarianceNormalization", [d.float(2, 3, 4, 4)], attributes={"axes": d.of([0, 2, 3], [2, 3])})


# Products and attention


@case("Gemm")
def gemm(d: Draw) -> Case:
    m, k, n = (d.int(1, 5) for _ in range(3))
    attributes = {"transA": d.int(0, 1), "transB": d.int(0, 1)}
    if d.bool():
        attributes |= {"alpha": 0.5, "beta": d.of(1.0, 2.0)}
    a = d.float(*((k, m) if attributes["transA"] else (m, k)))
    b = d.float(*((n, k) if attributes["transB"] else (k, n)))
    inputs = [a, b, d.float(*d.of((n,), (1, n), (m, n), (m, 1), ()))] if d.bool() else [a, b]
    return Case("Gemm", inputs, constants=frozenset(d.of((), (1, 2))), attributes=attributes)


@case("MatMul")
def matmul(d: Draw) -> Case:
    m, k, n, b = (d.int(1, 4) for _ in range(4))
    one, other = d.of(((m, k), (k, n)), ((b, m, k), (k, n)), ((b, m, k), (b, k, n)), ((k,), (k, n)), ((m, k), (k,)))
    return Case("MatMul", [d.float(*one), d.float(*other)], constants=frozenset(d.of((), (1,))))


@case("Einsum")
def einsum(d: Draw) -> Case:
    equation, shapes = d.of(
        ("bij,bjk->bik", ((2, 3, 4), (2, 4, 5))),
        ("bhqd,bhkd->bhqk", ((1, 2, 3, 4), (1, 2, 5, 4))),
        ("ij->ji", ((2, 3),)),
    )
    return Case("Einsum", [d.float(*shape) for shape in shapes], attributes={"equation": equation})


@case("Attention")
def attention(d: Draw) -> Case:
    batch, heads, length, depth = d.int(1, 2), 2, d.int(2, 4), 3
    if d.bool():
        inputs = [d.float(batch, heads, length, depth) for _ in range(3)]
        attributes: dict[str, Any] = {}
    else:
        inputs = [d.float(batch, length, heads * depth) for _ in range(3)]
        attributes = {"q_num_heads": heads, "kv_num_heads": heads}
    if d.bool():
        inputs.append(d.float(length, length))
    attributes |= {"is_causal": d.int(0, 1)} | ({"scale": 0.3} if d.bool() else {})
    return Case("Attention", inputs, opset=23, attributes=attributes)


@case("ai.onnx.ml.ArrayFeatureExtractor")
def extract(d: Draw) -> Case:
    x = d.float(*d.shape(1, 2))
    places = d.random.integers(0, x.shape[-1], (1, 2))
    return Case("ArrayFeatureExtractor", [x, places], domain="ai.onnx.ml", smooth=False)


@case("ai.onnx.ml.Scaler")
def scaler(d: Draw) -> Case:
    count = d.of(1, 3)
    attributes = {"offset": d.float(count).tolist(), "scale": d.float(count).tolist()}
    return _scaled_rows(d, "Scaler", attributes)


@case("ai.onnx.ml.Normalizer")
def normalizer(d: Draw) -> Case:
    return _scaled_rows(d, "Normalizer", {"norm": d.of("L1", "L2")})


def _scaled_rows(d: Draw, kind: str, attributes: dict[str, Any]) -> Case:
    """Integers go in as well, and floats come out."""
    whole = d.bool()
    x = d.random.integers(-9, 9, (4, 3)).astype(d.of(np.int64, np.int32)) if whole else d.float(4, 3)
    return Case(kind, [x], domain="ai.onnx.ml", attributes=attributes, smooth=not whole)


@case("com.microsoft.MultiHeadAttention")
def multi_head(d: Draw) -> Case:
    inputs = [d.float(2, 3, 8) for _ in range(3)]
    if d.bool():
        inputs += [None, None, d.float(1, 1, 3, 3)]
    attributes = {"num_heads": 2} | ({"scale": 0.3} if d.bool() else {})
    return Case("MultiHeadAttention", inputs, domain="com.microsoft", attributes=attributes)


# Shapes


@case("Reshape")
def reshape(d: Draw) -> Case:
    x = d.float(2, 3, 4)
    shape, zero = d.of(([6, 4], 0), ([0, -1], 0), ([-1], 0), ([4, 0, 2], 0), ([3, 2, 4], 1), ([0, 0, 2, 2], 0))
    return Case("Reshape", [x, whole(shape)], constants=frozenset((1,)), attributes={"allowzero": zero})


@case("Flatten")
def flatten(d: Draw) -> Case:
    x = d.float(*d.shape(1, 4))
    return Case("Flatten", [x], attributes={"axis": d.int(-x.ndim, x.ndim)})


@case("Transpose")
def transpose(d: Draw) -> Case:
    x = d.float(*d.shape(1, 4))
    perm = d.draw(st.permutations(range(x.ndim)))
    return Case("Transpose", [x], attributes={"perm": perm} if d.bool() else {})


@case("Squeeze")
def squeeze(d: Draw) -> Case:
    x = d.float(1, 3, 1, 2)
    axes, opset = d.of(None, [0], [-2], [2, 0]), d.of(11, 13, 20)
    if opset == 11:
        return Case("Squeeze", [x], opset=11, attributes={"axes": axes} if axes else {})
    return Case("Squeeze", [x, whole(axes)] if axes else [x], opset=opset, constants=frozenset((1,)))


@case("Unsqueeze")
def unsqueeze(d: Draw) -> Case:
    x, axes = d.float(*d.shape(1, 2)), d.of([0], [-1], [2, 0], [0, -1])
    if max(axes) >= x.ndim + len(axes):
        axes = [0]
    if d.bool():
        return Case("Unsqueeze", [x], opset=11, attributes={"axes": axes})
    return Case("Unsqueeze", [x, whole(axes)], constants=frozenset((1,)))


@case("Expand")
def expand(d: Draw) -> Case:
    x, shape = d.of(((3, 1), (2, 1, 4)), ((3, 1), (3, 4)), ((2, 3), (1, 1)), ((1,), (2, 2)), ((), (2, 3)))
    return Case("Expand", [d.float(*x), whole(shape)], constants=frozenset((1,)))


@case("Tile")
def tile(d: Draw) -> Case:
    x = d.float(*d.shape(1, 3))
    return Case("Tile", [x, whole([d.int(1, 3) for _ in x.shape])], constants=frozenset((1,)))


@case("Slice")
def slice_(d: Draw) -> Case:
    x = d.float(5, 6, 3)
    axes = d.axes(3)
    starts, ends = [d.int(-7, 7) for _ in axes], [d.of(-9, -2, -1, 0, 2, 4, 2**31) for _ in axes]
    if d.bool():
        return Case("Slice", [x], opset=9, attributes={"axes": axes, "starts": starts, "ends": ends})
    steps = [d.of(1, 2, -1, -2) for _ in axes]
    ends = [d.of(-(2**31), end) if step < 0 else end for end, step in zip(ends, steps, strict=True)]
    inputs = [x, whole(starts), whole(ends), whole(axes), whole(steps)]
    return Case("Slice", inputs, constants=frozenset((1, 2, 3, 4)), smooth=False)


@case("Split")
def split(d: Draw) -> Case:
    x, axis = d.float(6, 5), d.of(0, -1)
    form = d.of("sizes", "equal", "uneven", "old")
    if form == "sizes":
        sizes = [2, 4] if axis == 0 else [1, 4]
        return Case("Split", [x, whole(sizes)], 2, constants=frozenset((1,)), attributes={"axis": axis}, opset=13)
    if form == "equal":
        return Case("Split", [x], 3, attributes={"axis": 0}, opset=13)
    if form == "old":
        return Case("Split", [x], 2, attributes={"axis": 1, "split": [3, 2]}, opset=11)
    return Case("Split", [x], 2, attributes={"axis": 1, "num_outputs": 2}, opset=18)


@case("Concat")
def concat(d: Draw) -> Case:
    shape = list(d.shape(1, 4))
    axis = d.axis(len(shape))
    inputs = []
    for _ in range(d.int(1, 3)):
        shape[axis] = d.int(1, 4)
        inputs.append(d.float(*shape))
    return Case("Concat", inputs, attributes={"axis": axis})


@case("Shape")
def shape_of(d: Draw) -> Case:
    attributes = {"start": d.int(-3, 3), "end": d.int(-3, 4)} if d.bool() else {}
    return Case("Shape", [d.float(*d.shape(0, 4))], attributes=attributes)


@case("Size")
def size(d: Draw) -> Case:
    return Case("Size", [d.float(*d.shape(0, 4))])


@case("Range")
def range_(d: Draw) -> Case:
    values = d.of((0, 5, 1), (2, 9, 3), (5, -3, -2))
    return Case("Range", [np.asarray(v, d.of(np.int64)) for v in values])


@case("ConstantOfShape")
def constant_of_shape(d: Draw) -> Case:
    attributes = {"value": numpy_helper.from_array(np.array([d.of(2.5, -1.0)], np.float32))} if d.bool() else {}
    return Case("ConstantOfShape", [whole(d.shape(1, 3))], attributes=attributes)


@case("EyeLike")
def eye_like(d: Draw) -> Case:
    attributes = {"k": d.int(-1, 1)} | ({"dtype": TensorProto.INT64} if d.bool() else {})
    return Case("EyeLike", [d.float(3, 4)], attributes=attributes, smooth=False)


# Places


@case("Gather")
def gather(d: Draw) -> Case:
    x = d.float(*d.shape(1, 3))
    axis = d.axis(x.ndim)
    indices = d.random.integers(-x.shape[axis], x.shape[axis], d.of((), (2,), (2, 3)))
    return Case("Gather", [x, whole(indices)], constants=frozenset(d.of((), (0,), (1,))), attributes={"axis": axis})


@case("GatherElements")
def gather_elements(d: Draw) -> Case:
    x = d.float(3, 4)
    axis = d.axis(2)
    return Case(
        "GatherElements",
        [x, d.random.integers(-x.shape[axis], x.shape[axis], (2, 4) if axis in (0, -2) else (3, 2))],
        attributes={"axis": axis},
    )


@case("GatherND")
def gather_nd(d: Draw) -> Case:
    x, batch = d.float(2, 3, 4), d.int(0, 1)
    depth = d.int(1, 3 - batch)
    indices = np.stack([d.random.integers(-n, n, (2, 3)) for n in x.shape[batch : batch + depth]], -1)
    return Case("GatherND", [x, whole(indices)], attributes={"batch_dims": batch})


@case("ScatterElements")
def scatter_elements(d: Draw) -> Case:
    x, reduction = d.float(3, 4), d.of("none", "add", "mul", "max", "min")
    rows = np.stack([d.random.permutation(3)[:2] for _ in range(4)], 1)
    indices = np.where(d.random.integers(0, 2, rows.shape), rows, rows - 3)
    inputs = [x, whole(indices), d.float(2, 4)]
    return Case("ScatterElements", inputs, attributes={"axis": d.of(0, -2), "reduction": reduction}, opset=18)


@case("ScatterND")
def scatter_nd(d: Draw) -> Case:
    x, reduction, depth = d.float(3, 4, 2), d.of("none", "add", "mul", "max", "min"), d.int(1, 2)
    flat = d.random.permutation(3 if depth == 1 else 12)[:2]
    indices = np.stack(np.unravel_index(flat, x.shape[:depth]), -1)
    indices = indices - (d.random.integers(0, 2, indices.shape) * x.shape[:depth])
    inputs = [x, whole(indices), d.float(2, *x.shape[depth:])]
    return Case("ScatterND", inputs, attributes={"reduction": reduction}, opset=18)


@case("OneHot")
def one_hot(d: Draw) -> Case:
    inputs = [d.random.integers(-4, 4, d.shape(1, 2)), np.asarray(4, np.int64), np.array([-1, 2], np.float32)]
    axis = d.int(-2, 1)
    return Case("OneHot", inputs, constants=frozenset((1, 2)), attributes={"axis": axis})


@case("NonZero")
def nonzero(d: Draw) -> Case:
    return Case("NonZero", [d.random.integers(0, 2, d.shape(1, 3)).astype(np.float32)], smooth=False)


# Reductions


@case("ReduceMax", "ReduceMin", "ReduceMean", "ReduceSum", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceSumSquare")
def reduce_(d: Draw, kind: str, low: float = -2.0) -> Case:
    x = d.float(*d.shape(1, 4), low=low, high=2.0)
    attributes: dict[str, Any] = {"keepdims": d.int(0, 1)}
    axes = d.axes(x.ndim) if d.bool() else None
    since = 13 if kind == "ReduceSum" else 18
    if d.bool() and axes is not None:
        return Case(kind, [x], opset=since - 2 if since == 13 else 17, attributes=attributes | {"axes": axes})
    if axes is None:
        attributes["noop_with_empty_axes"] = d.int(0, 1)
        return Case(kind, [x], opset=since, attributes=attributes)
    return Case(kind, [x, whole(axes)], opset=since, constants=frozenset((1,)), attributes=attributes)


@case("ReduceLogSum", "ReduceLogSumExp")
def reduce_log(d: Draw, kind: str) -> Case:
    return reduce_(d, kind, low=0.1)


@case("ArgMax", "ArgMin")
def extreme(d: Draw, kind: str) -> Case:
    x = d.random.integers(0, 3, d.shape(1, 3)).astype(np.float32)
    attributes = {"axis": d.axis(x.ndim), "keepdims": d.int(0, 1), "select_last_index": d.int(0, 1)}
    return Case(kind, [x], attributes=attributes)


@case("TopK")
def top_k(d: Draw) -> Case:
    x = d.random.permutation(60).reshape(3, 4, 5).astype(np.float32)
    axis = d.axis(3)
    inputs = [x, whole([d.int(1, x.shape[axis])])]
    return Case("TopK", inputs, 2, constants=frozenset((1,)), attributes={"axis": axis, "largest": d.int(0, 1)})


@case("CumSum")
def cumulative(d: Draw) -> Case:
    x = d.float(3, 4)
    attributes = {"exclusive": d.int(0, 1), "reverse": d.int(0, 1)}
    return Case("CumSum", [x, np.asarray(d.axis(2), np.int64)], constants=frozenset((1,)), attributes=attributes)


@case("Trilu")
def trilu(d: Draw) -> Case:
    inputs = [d.float(2, 4, 3), np.asarray(d.int(-2, 2), np.int64)] if d.bool() else [d.float(4, 4)]
    return Case("Trilu", inputs, constants=frozenset((1,)), attributes={"upper": d.int(0, 1)})


# Recurrent


@case("LSTM", "GRU", "RNN")
def recurrent(d: Draw, kind: str) -> Case:
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[kind]
    length, batch, size, hidden = d.int(1, 4), d.int(1, 3), d.int(1, 4), d.int(1, 3)
    direction = d.of("forward", "reverse", "bidirectional")
    ways = 2 if direction == "bidirectional" else 1
    inputs: list[Any] = [
        *(d.float(length, batch, size), d.float(ways, gates * hidden, size), d.float(ways, gates * hidden, hidden)),
        d.float(ways, 2 * gates * hidden) if d.bool() else None,
        d.random.integers(1, length + 1, batch).astype(np.int32) if d.int(0, 2) == 0 else None,
        d.float(ways, batch, hidden) if d.bool() else None,
    ]
    if kind == "LSTM":
        inputs.append(d.float(ways, batch, hidden) if d.bool() else None)
        inputs.append(d.float(ways, 3 * hidden) if d.int(0, 2) == 0 else None)
    while inputs[-1] is None:
        inputs.pop()
    attributes: dict[str, Any] = {"direction": direction, "hidden_size": hidden}
    if kind == "GRU":
        attributes["linear_before_reset"] = d.int(0, 1)
    if d.int(0, 3) == 0:
        attributes["clip"] = 0.7
    if d.int(0, 3) == 0:
        names = {"LSTM": ["HardSigmoid", "Tanh", "Softsign"], "GRU": ["HardSigmoid", "Relu"], "RNN": ["Relu"]}[kind]
        attributes["activations"] = names * ways
    return Case(
        *(kind, inputs, 3 if kind == "LSTM" else 2),
        constants=frozenset((1, 2, 3, 7)),
        attributes=attributes,
        opset=14,
        tolerance=3e-4,  # ONNX Runtime's sigmoid and tanh are approximations, good to 1e-7, of states that may be 1e-3
    )


# Quantization


@case("DynamicQuantizeLinear")
def dynamic_quantize(d: Draw) -> Case:
    return Case("DynamicQuantizeLinear", [d.float(3, 4)], 3, smooth=False)


@case("MatMulInteger")
def matmul_integer(d: Draw) -> Case:
    inputs: list[Any] = [d.random.integers(0, 255, (3, 4)).astype(np.uint8), d.random.integers(-9, 9, (4, 2))]
    inputs[1] = inputs[1].astype(np.int8)
    if d.bool():
        inputs += [np.asarray(3, np.uint8), d.random.integers(-2, 2, d.of((), (2,))).astype(np.int8)]
    return Case("MatMulInteger", inputs, constants=frozenset((1, 3)), smooth=False)


@case("ConvInteger")
def conv_integer(d: Draw) -> Case:
    inputs: list[Any] = [d.random.integers(0, 255, (1, 2, 5, 5)).astype(np.uint8)]
    inputs.append(d.random.integers(-9, 9, (3, 2, 3, 3)).astype(np.uint8))
    inputs += [np.asarray(3, np.uint8)] if d.bool() else []
    return Case("ConvInteger", inputs, constants=frozenset((1,)), attributes={"strides": [2, 1]}, smooth=False)
