"""What operators cost: arithmetic operations, and bytes at their stored width.

Counted is what has to be done, so that a time computed from it is a lower bound: a multiplication and an addition
are two operations; products with padding are none; an elementwise operator makes one operation an output element
(``PER_OUTPUT`` has the exceptions); a reshape is free. Bytes are activations in and out and weights, each once.

Everything follows from kinds and shapes alone, because that is all that engines tell of the graph they run. Kinds
are ONNX's, ONNX Runtime's own and OpenVINO's execution types; a prefix ("com.microsoft.nchwc.Conv") is ignored.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import numpy_helper

from hasten.graph.dims import Shapes
from hasten.graph.model import Graph, attribute, infer_shapes, spec_of
from hasten.graph.products import PRODUCTS, concrete, shape_at, suits_winograd
from hasten.measurement import Operator
from hasten.tensors import DTYPES, TensorSpec

PER_OUTPUT: Mapping[str, float] = {
    **dict.fromkeys(("softmax", "logsoftmax", "qlinearsoftmax"), 5.0),  # maximum, subtract, exp, sum, divide
    **dict.fromkeys(("layernormalization", "mvn", "instancenormalization", "groupnormalization"), 7.0),
    **dict.fromkeys(("simplifiedlayernormalization", "rmsnormalization", "rms"), 4.0),
    **dict.fromkeys(("skiplayernormalization", "embedlayernormalization"), 8.0),
    "skipsimplifiedlayernormalization": 5.0,
    **dict.fromkeys(("batchnormalization", "quantizelinear", "dequantizelinear", "dynamicquantizelinear"), 2.0),
    **dict.fromkeys(("fakequantize", "hardsigmoid", "hardswish", "clip"), 2.0),
    **dict.fromkeys(("sigmoid", "tanh", "exp", "log", "softplus", "elu", "swish", "qlinearsigmoid"), 4.0),
    **dict.fromkeys(("erf", "gelu", "biasgelu", "fastgelu", "quickgelu", "mish"), 8.0),
    "lrn": 8.0,
}
"""Operations an output element, where it is not one. Transcendental functions count as few additions: a lower bound."""

ELEMENTWISE = frozenset(
    (
        *("abs", "add", "and", "cast", "ceil", "div", "equal", "floor", "greater", "greaterorequal", "leakyrelu"),
        *("less", "lessorequal", "max", "min", "mod", "mul", "neg", "not", "or", "pow", "prelu", "reciprocal", "relu"),
        *("round", "sign", "sqrt", "sub", "sum", "where", "xor", "cos", "sin", "thresholdedrelu", "selu", "celu"),
        *("qlinearadd", "qlinearmul", "qlinearleakyrelu", "biasadd", "convert", "eltwise", "select", "math"),
        *("castlike", "isnan", "isinf", "cumsum", "bias", "quickscale", "rotaryembedding", "rope"),
    )
)
"""Kinds that make one operation an output element."""

REDUCTIONS = frozenset(
    (
        *("averagepool", "maxpool", "globalaveragepool", "globalmaxpool", "lppool", "qlinearaveragepool"),
        *("qlinearglobalaveragepool", "qlinearreducemean", "pooling", "reduce", "argmax", "argmin"),
        *(f"reduce{name}" for name in ("mean", "sum", "max", "min", "prod", "l1", "l2", "logsum", "sumsquare")),
        *("adaptivepooling", "maxpoolnhwc", "averagepoolnhwc", "nhwcmaxpool", "topk"),
    )
)
"""Kinds that look at every input element at least once: one operation each, whatever windows overlap."""

MOVES = frozenset(
    (
        *("transpose", "concat", "qlinearconcat", "pad", "expand", "tile", "broadcast", "resize", "upsample"),
        *("reorder", "reorderinput", "reorderoutput", "depthtospace", "spacetodepth", "roll", "reverse"),
        *(
            "reversesequence",
            "constantofshape",
            "range",
            "onehot",
            "memcpy",
            "memory",
            "interpolate",
            "trilu",
            "eyelike",
        ),
    )
)
"""Kinds that only move data: bytes in and out."""

PICKS = frozenset(
    ("gather", "gatherelements", "gathernd", "slice", "split", "embedding", "stridedslice", "compress", "crop")
)
"""Kinds that read only what they give: bytes twice the output, and the indices where there are any."""

FREE = frozenset(
    (
        *("reshape", "flatten", "squeeze", "unsqueeze", "identity", "dropout", "shape", "size", "constant", "const"),
        *("input", "output", "result", "parameter", "shapeof", "optimized", "noop"),
    )
)
"""Kinds that no engine needs to run: views of their input, shapes, and what is there before the run."""


QUANTIZABLE = frozenset(("Conv", "ConvTranspose", "MatMul", "Gemm"))
"""ONNX kinds that every engine computes in int8 between DequantizeLinear nodes."""

INTEGER_PRODUCTS = frozenset(("MatMulInteger", "ConvInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"))
"""Kinds that compute in int8 whatever they give."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one operator needs. ``bytes`` is what it moves at stored width, of which ``weights`` are weights."""

    operations: float | None
    """None: this kind, or these shapes, cannot be priced."""
    bytes: float
    weights: float
    dtype: str
    winograd: float | None = None
    """Operations by Winograd's F(4x4, 3x3), where it applies."""


@dataclass(frozen=True, kw_only=True)
class Totals:
    """What a model needs for one run. Bytes are at stored width."""

    operations: Mapping[str, float]
    """By the dtype that they are computed in."""
    weight_bytes: float
    input_bytes: float
    output_bytes: float
    parameters: int
    unpriced: tuple[str, ...]
    """Kinds whose operations are not counted."""

    @property
    def compulsory_bytes(self) -> float:
        """What every run has to move at least: inputs, outputs and weights, once."""
        return self.weight_bytes + self.input_bytes + self.output_bytes


def price(operator: Operator) -> Cost:
    """Give what an operator costs. A tensor whose shape is not known counts no bytes."""
    kind = kind_of(operator)
    operations = _operations(kind, operator)
    total, weights = _traffic(kind, operator)
    winograd = operations / 4 if operations is not None and suits_winograd(kind, operator) else None
    return Cost(operations=operations, bytes=total, weights=weights, dtype=operator.dtype, winograd=winograd)


def kind_of(operator: Operator) -> str:
    """Give an operator's kind as the tables have it: lower case, without prefix."""
    return re.split(r"[.:/]", operator.kind)[-1].lower().replace("_", "")


def model_totals(operators: Iterable[Operator]) -> Totals:
    """Add up what a model costs. A weight that several operators read counts once."""
    listed = tuple(operators)
    operations: dict[str, float] = {}
    unpriced: dict[str, None] = {}
    for operator in listed:
        cost = price(operator)
        if cost.operations is None:
            unpriced[operator.kind] = None
        elif cost.operations:
            operations[cost.dtype] = operations.get(cost.dtype, 0.0) + cost.operations
    weights = {name for operator in listed for name in operator.weights}
    learned = (s for op in listed for s in op.inputs if s.name in weights and s.dtype not in ("int64", "bool"))
    sizes = {spec.name: count_of(spec) or 0 for spec in learned}
    input_bytes, output_bytes = _crossing_bytes(listed)
    return Totals(
        operations=operations,
        weight_bytes=_weight_bytes(listed),
        input_bytes=input_bytes,
        output_bytes=output_bytes,
        parameters=sum(sizes.values()),
        unpriced=tuple(unpriced),
    )


def nbytes(spec: TensorSpec) -> float:
    """Give a tensor's bytes; 0 where its shape is not known. Four-bit types take half a byte."""
    count = count_of(spec)
    if count is None or spec.dtype == "string":
        return 0.0
    return count * width(spec.dtype)


def width(dtype: str) -> float:
    """Give the bytes of one element."""
    if dtype in DTYPES:
        return float(DTYPES[dtype].itemsize)
    found = re.search(r"\d+", dtype)
    return int(found.group()) / 8 if found else 1.0


def _crossing_bytes(operators: tuple[Operator, ...]) -> tuple[float, float]:
    """Give the bytes that come from outside and that nobody inside reads.

    An engine may leave views out of the graph that it shows, so that a tensor goes in under another name than it came
    out: an input of the size of an earlier output that nobody reads is taken for that one.
    """
    sources = {s.name for op in operators for s in op.outputs if kind_of(op) in ("input", "parameter")}
    read = {s.name for op in operators for s in op.inputs if kind_of(op) not in ("output", "result")}
    made: set[str] = set()
    inputs: dict[str, float] = {}
    loose: dict[str, float] = {}
    viewed: set[float] = set()
    for operator in operators:
        for spec in operator.inputs:
            if spec.name in made - sources or spec.name in operator.weights:
                continue
            if (size := nbytes(spec)) in loose.values() and spec.name not in sources:
                viewed.add(size)
            else:
                inputs[spec.name] = size
        for spec in operator.outputs:
            made.add(spec.name)
            if spec.name not in read | sources:
                loose[spec.name] = nbytes(spec)
    return sum(inputs.values()), sum(size for size in loose.values() if size not in viewed)


def _weight_bytes(operators: Iterable[Operator]) -> float:
    """Add up the weights that a run reads: of a table, only the rows that are picked."""
    most: dict[str, float] = {}
    for operator in operators:
        picks = kind_of(operator) in PICKS
        taken = sum(nbytes(spec) for spec in operator.outputs)
        for spec in operator.inputs:
            if spec.name in operator.weights:
                used = min(nbytes(spec), taken) if picks else nbytes(spec)
                most[spec.name] = max(most.get(spec.name, 0.0), used)
    return sum(most.values())


def _traffic(kind: str, operator: Operator) -> tuple[float, float]:
    """Give all bytes that an operator moves, and those of its weights."""
    if kind in FREE:
        return 0.0, 0.0
    out = sum(nbytes(spec) for spec in operator.outputs)
    weights = _weight_bytes((operator,))
    if kind in PICKS:
        activations = [nbytes(spec) for spec in operator.inputs if spec.name not in operator.weights]
        return out + weights + sum(min(size, out) for size in activations), weights
    return out + weights + sum(nbytes(s) for s in operator.inputs if s.name not in operator.weights), weights


def _operations(kind: str, operator: Operator) -> float | None:
    if kind in FREE or kind in MOVES or kind in PICKS:
        return 0.0
    first_out = shape_at(operator.outputs, 0)
    if kind in REDUCTIONS:
        first_in = shape_at(operator.inputs, 0)
        return None if first_in is None else float(math.prod(first_in))
    if kind in ELEMENTWISE or kind in PER_OUTPUT:
        return None if first_out is None else PER_OUTPUT.get(kind, 1.0) * math.prod(first_out)
    formula = PRODUCTS.get(kind)
    products = formula(operator) if formula else None
    return None if products is None else 2.0 * products


def count_of(spec: TensorSpec) -> int | None:
    """Give a tensor's number of elements, or None where its shape is not known."""
    shape = concrete(spec)
    return None if shape is None else math.prod(shape)


CONSTANTS: Mapping[str, type[np.generic] | None] = {
    "value": None,
    "value_int": np.int64,
    "value_ints": np.int64,
    "value_float": np.float32,
    "value_floats": np.float32,
}
"""Dtype by the attribute in which a Constant holds its value; a tensor has its own."""

SHAPED_BY_VALUE = frozenset(
    (
        *("Reshape", "Expand", "ConstantOfShape", "Slice", "Tile", "Range", "Unsqueeze", "Squeeze", "Split", "Resize"),
        *(f"Reduce{name}" for name in ("Mean", "Sum", "Max", "Min", "Prod", "L1", "L2", "LogSum", "SumSquare")),
        *("ReduceLogSumExp", "Pad"),
    )
)
"""Operators whose output's shape follows from the value of an input behind the first."""


def operators_of(model: onnx.ModelProto, dims: Mapping[str, int], dtype: str = "float32") -> tuple[Operator, ...]:
    """List what one run of an ONNX model computes, with concrete shapes.

    Nodes that depend on constants and shapes alone are left out: engines compute them once, at load. A convolution
    or matrix product between DequantizeLinear nodes computes in int8: those nodes, and a QuantizeLinear that takes
    the result (directly or behind Relu or Clip), belong to it. Weights keep the width in which they are stored.

    Args:
        model: Any ONNX model. Shapes that inference cannot find, as behind operators of other domains or where they
            depend on data, stay unknown: such operators cannot be priced and their tensors count no bytes.
        dims: The length of each symbolic dimension of the inputs; one that is not named is 1.
        dtype: The precision in which the engine computes float32 operators.
    """
    graph = Graph(bind(model, dims))
    constant = _constants(graph)
    fused = _quantized_groups(graph)
    inside = {id(node) for group in fused.values() for node in group[1:]}
    listed = []
    for node in graph.model.graph.node:
        if id(node) in inside or all(name in constant for name in node.output):
            continue
        group = fused.get(id(node), (node,))
        if node.op_type == "DequantizeLinear" and _absorbed(node, graph, fused):
            continue
        listed.append(_operator(group, graph, constant, dtype))
    return tuple(listed)


def bind(model: onnx.ModelProto, dims: Mapping[str, int]) -> onnx.ModelProto:
    """Give the model with its symbolic dimensions set, as in ``operators_of``, and shapes inferred from them."""
    bound = onnx.ModelProto()
    bound.CopyFrom(model)
    for value in bound.graph.input:
        lengths = spec_of(value).concrete(dims)
        for axis, length in enumerate(lengths):
            value.type.tensor_type.shape.dim[axis].dim_value = length
    while True:
        for value in bound.graph.output:
            value.type.tensor_type.ClearField("shape")
        bound = infer_shapes(bound)
        if not _settle(bound):
            return bound


def _settle(model: onnx.ModelProto) -> int:
    """Write computed shapes that are known now as constants, and give their number: inference follows only those.

    Exporters compute the target of a Reshape by Shape, Gather, CastLike and Concat; ONNX's inference loses the thread.
    """
    for node in [n for n in model.graph.node if n.op_type == "Constant"]:
        kind = node.attribute[0].name if node.attribute else ""
        if kind in CONSTANTS:
            value = attribute(node, kind)
            array = numpy_helper.to_array(value) if kind == "value" else np.array(value, CONSTANTS[kind])
            model.graph.initializer.append(numpy_helper.from_array(array, node.output[0]))
            model.graph.node.remove(node)
    graph = Graph(model)
    shapes, made = Shapes(graph), 0
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            if node.op_type not in SHAPED_BY_VALUE or place == 0 or name not in graph.producers:
                continue
            known = shapes.value(name)
            if known is not None and known.static:
                made += 1
                fresh = f"{name}/settled/{made}/{len(model.graph.initializer)}"
                entries = np.array(known.entries[0] if known.scalar else known.entries, np.int64)
                model.graph.initializer.append(numpy_helper.from_array(entries, fresh))
                node.input[place] = fresh
    return made


def _constants(graph: Graph) -> frozenset[str]:
    """Name every tensor that is known before the run: weights, shapes, and what follows from these alone."""
    known = {"", *graph.initializers}
    for node in graph.model.graph.node:
        seeds = node.op_type in ("Constant", "Shape", "Size")
        follows = (
            any(node.input) and all(name in known for name in node.input) and not node.op_type.startswith("Random")
        )
        if seeds or (follows and not any(a.HasField("g") for a in node.attribute)):
            known.update(node.output)
    return frozenset(known)


def _quantized_groups(graph: Graph) -> dict[int, tuple[onnx.NodeProto, ...]]:
    """Find the products that compute in int8, each with the nodes behind it up to a QuantizeLinear, by ``id``."""
    found = {}
    for node in graph.model.graph.node:
        sources = [graph.producers.get(name) for name in node.input[:2]]
        if node.op_type in QUANTIZABLE and all(s is not None and s.op_type == "DequantizeLinear" for s in sources):
            found[id(node)] = (node, *_requantized(node, graph))
    return found


def _requantized(node: onnx.NodeProto, graph: Graph) -> tuple[onnx.NodeProto, ...]:
    behind: list[onnx.NodeProto] = []
    user = graph.only_consumer(node.output[0])
    while user is not None and user.op_type in ("Relu", "Clip"):
        behind.append(user)
        user = graph.only_consumer(user.output[0])
    return (*behind, user) if user is not None and user.op_type == "QuantizeLinear" else ()


def _absorbed(node: onnx.NodeProto, graph: Graph, fused: Mapping[int, tuple[onnx.NodeProto, ...]]) -> bool:
    users = graph.consumers.get(node.output[0], [])
    return bool(users) and node.output[0] not in graph.outputs and all(id(user) in fused for user in users)


def _operator(group: tuple[onnx.NodeProto, ...], graph: Graph, constant: frozenset[str], precision: str) -> Operator:
    node, last = group[0], group[-1]
    in_int8 = _computes_in_int8(node, graph)
    names = [_stored(name, graph, constant, in_int8) for name in node.input if name]
    inputs = tuple(graph.specs.get(name, _unknown(name)) for name in names)
    outputs = tuple(graph.specs.get(name, _unknown(name)) for name in last.output if name)
    own = outputs[0].dtype if outputs else "float32"
    return Operator(
        name=node.name or node.output[0],
        kind=node.op_type,
        dtype="int8" if in_int8 or own in ("int8", "uint8") else precision if own == "float32" else own,
        inputs=inputs,
        outputs=outputs,
        weights=tuple(dict.fromkeys(spec.name for spec in inputs if spec.name in constant)),
        sources=tuple(item.name or item.output[0] for item in group),
    )


def _computes_in_int8(node: onnx.NodeProto, graph: Graph) -> bool:
    if node.op_type.startswith(("QLinear", "QGemm", "QAttention")) or node.op_type in INTEGER_PRODUCTS:
        return True
    sources = [graph.producers.get(name) for name in node.input[:2]]
    return node.op_type in QUANTIZABLE and all(s is not None and s.op_type == "DequantizeLinear" for s in sources)


def _stored(name: str, graph: Graph, constant: frozenset[str], in_int8: bool) -> str:
    """Follow a dequantized tensor to where it is stored: always for a weight, for an activation in int8 only."""
    source = graph.producers.get(name)
    if source is not None and source.op_type == "DequantizeLinear" and (in_int8 or name in constant):
        return str(source.input[0])
    return name


def _unknown(name: str) -> TensorSpec:
    return TensorSpec(name, "float32", ("unknown",))
