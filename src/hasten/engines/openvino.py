"""OpenVINO on the processor: ONNX becomes its own format once; what it compiled is read back."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import onnx
from msgspec import Meta
from onnx import numpy_helper

from hasten.artifact import Artifact
from hasten.engines.batch import open_batch, why_not_batch
from hasten.engines.built import built_from, check_built
from hasten.engines.feeds import FeedCheck
from hasten.engines.openvino_profile import executed, read_operators
from hasten.errors import BuildFailed, HastenError, SignatureMismatch, StoreError, Unsupported
from hasten.measurement import Operator
from hasten.settings import Choice, Doc
from hasten.tensors import Array, Feed, Signature
from hasten.transform import Context

# OpenVINO's import sends an event to a server, unless this module cannot be imported: then it takes its own stub.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
import openvino  # noqa: E402

NAME = "openvino"
ENTRY = "model.xml"
HINTS = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
CAPABILITIES = {"float32": "FP32", "float16": "FP16", "bfloat16": "BF16"}
"""What ``OPTIMIZATION_CAPABILITIES`` of a processor calls each precision. One that is not there is emulated."""
ARITHMETIC = frozenset({"Convolution", "Deconvolution", "FullyConnected", "MatMul", "RNNCell", "RNNSeq", "MHA"})
"""The layers that hold nearly all arithmetic: in them the precision must be the one that was asked for."""
NO_ARRAYS = ("bfloat16", "string")
"""Dtypes that its Python interface cannot hand over as NumPy arrays."""
NARROWED = ("float64", "uint64")
"""Dtypes that the CPU plugin computes in 32 bits, without a word."""
CHECKED = ("int64", "uint32")
"""Dtypes of inputs that it computes as int32: right for numbers that fit, which ids and lengths do."""
INT32 = np.iinfo(np.int32)
ENDLESS = 1 << 62
"""An int64 as large as this means "to the end", as in a Slice; it is cut to the largest int32, which means that too."""
FAILURES = (
    RuntimeError,
    openvino.frontend.GeneralFailure,
    openvino.frontend.InitializationFailure,
    openvino.frontend.NotImplementedFailure,
    openvino.frontend.OpConversionFailure,
    openvino.frontend.OpValidationFailure,
)
"""What OpenVINO raises: its own exceptions have no root in common."""
NUMBERED = re.compile(r"_\d+$")
NO_CONVERSION = re.compile(r"No conversion rule found for operations: (.+?)(?: To facilitate| --|$)")
UNREADABLE = ("Unable to read the model", "Could not open", "src/frontends/ir/")
OP_FAILED = re.compile(r"-- Conversion is failed for: (\S+)")


@dataclass(frozen=True, kw_only=True)
class OpenVino:
    """Run with OpenVINO on the processor, one stream, for the shortest single answer."""

    name: ClassVar[str] = NAME
    uses_samples: ClassVar[bool] = False
    uses_training: ClassVar[bool] = False

    threads: Annotated[int, Doc("threads that one run may use"), Meta(ge=1)] = 1
    precision: Annotated[
        Literal["float32", "bfloat16", "float16"], Doc("dtype in which float operators must really compute")
    ] = "float32"
    batch: Annotated[Annotated[int, Meta(ge=1)] | None, Doc("fixed length of the batch axis; none keeps it open")] = (
        None
    )
    dynamic_quantization: Annotated[
        int,
        Doc("activations that share a scale where they meet compressed weights; 0 computes those in float"),
        Choice((0, 32)),
        Meta(ge=0),
    ] = 0
    pin: Annotated[bool, Doc("bind its threads to cores: for a machine that runs nothing else")] = False

    def why_not(self, source: Artifact) -> str | None:
        """Say in a sentence why it cannot take ``source``, or None."""
        if source.format != "onnx":
            return f"it builds from ONNX, not from {source.format!r}"
        for spec in (*source.signature.inputs, *source.signature.outputs):
            if spec.dtype in NO_ARRAYS:
                return f"its Python interface takes no {spec.dtype} arrays, and {spec.name!r} is one"
            if spec.dtype in NARROWED:
                return f"it computes {spec.dtype} in 32 bits, and {spec.name!r} is one"
        return None if self.batch is None else why_not_batch(source.signature, self.batch)

    def apply(self, source: Artifact, ctx: Context) -> Artifact:
        """Convert to OpenVINO's format, compile once, and check what it will run.

        Raises:
            Unsupported: it has no conversion for an operator, would compute in another precision than asked, or cut a
                constant of 64 bits to 32. BuildFailed: it refuses the model for another reason.
        """
        core = openvino.Core()
        if CAPABILITIES[self.precision] not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise Unsupported(NAME, f"this processor has no {self.precision} arithmetic; it would emulate or ignore it")
        model = _converted(source)
        _check_constants(source)
        if self.batch is not None:
            name = open_batch(source.signature)
            shapes = {
                spec.name: openvino.PartialShape([self.batch if d == name else _size(d) for d in spec.shape])
                for spec in source.signature.inputs
            }
            _translated(model.reshape, shapes)
        _rename(model, source)
        # Half-precision weights are a compression with its own loss: only the pass "cast" may decide on it.
        _translated(openvino.save_model, model, ctx.folder / ENTRY, compress_to_fp16=False)
        self._check_precision(self._compiled(core, ctx.folder / ENTRY))
        return built_from(source, ctx.folder, ENTRY, engine=NAME, batch=self.batch)

    def open(self, built: Artifact) -> OpenVinoSession:
        """Load and compile what ``apply`` wrote.

        Raises:
            StoreError: the files are not what this engine writes, or were checked on another processor.
            BuildFailed: OpenVINO refuses them. Unsupported: it would take another precision than asked.
        """
        return OpenVinoSession(built.signature, self._opened(built))

    def operators(self, built: Artifact, feed: Feed, *, runs: int) -> tuple[Operator, ...]:
        """Run with performance counters and read back the layers that ran. Their times are means, not medians."""
        built.signature.check(feed)
        return read_operators(self._opened(built, PERF_COUNT=True), self._opened(built), feed, runs)

    def _opened(self, built: Artifact, **extra: Any) -> Any:
        check_built(built, engine=NAME)
        compiled = self._compiled(openvino.Core(), built.entry, **extra)
        self._check_precision(compiled)
        return compiled

    def _compiled(self, core: Any, path: Path, **extra: Any) -> Any:
        options = {
            "INFERENCE_PRECISION_HINT": HINTS[self.precision],
            "INFERENCE_NUM_THREADS": self.threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "ENABLE_CPU_PINNING": self.pin,
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": self.dynamic_quantization,
            # Mapped weights would change, or end the process, where someone writes over the file. Read, they cost
            # their size in memory of each process's own, and no more at the peak; loading takes little longer.
            "ENABLE_MMAP": False,
            **extra,
        }
        return _translated(core.compile_model, path, "CPU", options)

    def _check_precision(self, compiled: Any) -> None:
        taken = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        if taken != HINTS[self.precision]:
            raise Unsupported(NAME, f"asked for {self.precision}, it took {taken}")
        threads = compiled.get_property("INFERENCE_NUM_THREADS")
        if threads != self.threads:
            raise Unsupported(NAME, f"asked for {self.threads} threads, it took {threads}")
        for layer in executed(compiled):
            if layer.kind in ARITHMETIC and layer.dtype not in (self.precision, "int8"):
                raise Unsupported(NAME, f"it runs {layer.kind} {layer.name!r} in {layer.dtype}, not {self.precision}")


class OpenVinoSession:
    """A loaded model. One thread at a time."""

    def __init__(self, signature: Signature, compiled: Any) -> None:
        self._signature = signature
        self._request = compiled.create_infer_request()
        self._outputs = [(spec.name, compiled.output(spec.name)) for spec in signature.outputs]
        self._check = FeedCheck(signature)
        self._checked = [spec.name for spec in signature.inputs if spec.dtype in CHECKED]

    @property
    def signature(self) -> Signature:
        """What it takes and gives."""
        return self._signature

    def run(self, feed: Feed) -> dict[str, Array]:
        """Run once. The arrays that come back are the caller's to keep.

        Raises:
            SignatureMismatch: ``feed`` does not fit the signature, or holds a number that OpenVINO's int32 does not.
            BuildFailed: OpenVINO failed, or it is closed.
        """
        self._check(feed)
        for name in self._checked:
            if feed[name].size and not INT32.min <= feed[name].min() <= feed[name].max() <= INT32.max:
                raise SignatureMismatch(f"input {name!r} holds a number beyond 32 bits, in which {NAME} computes it")
        if self._request is None:
            raise BuildFailed(NAME, "this session is closed; open the model again")
        results = _translated(self._request.infer, feed, share_inputs=True)
        return {name: results[port] for name, port in self._outputs}

    def close(self) -> None:
        """Free it. Closing twice is fine."""
        self._request = None
        self._outputs = []


def _converted(source: Artifact) -> Any:
    if not source.entry.is_file():
        raise StoreError(f"{source.entry} is not there; import the model again")
    frontend = openvino.frontend.FrontEndManager().load_by_framework("onnx")
    return _translated(lambda: frontend.convert(frontend.load(str(source.entry))))


def _check_constants(source: Artifact) -> None:
    """Check that no integer of the graph is cut. Raises Unsupported."""
    graph = onnx.load(source.entry, load_external_data=False).graph
    held = [tensor for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.INT64]
    held += [
        attribute.t
        for node in graph.node
        if node.op_type == "Constant"
        for attribute in node.attribute
        if attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type == onnx.TensorProto.INT64
    ]
    for tensor in held:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            continue
        values = numpy_helper.to_array(tensor)
        cut = ((values < INT32.min) & (values > -ENDLESS)) | ((values > INT32.max) & (values < ENDLESS))
        if cut.any():
            raise Unsupported(
                NAME, f"it computes int64 in 32 bits, and the constant {tensor.name!r} has {values[cut][0]}"
            )


def _rename(model: Any, source: Artifact) -> None:
    """Give a name by position to each node that OpenVINO has numbered: its counter runs on from model to model."""
    graph = onnx.load(source.entry, load_external_data=False).graph
    given = {name for node in graph.node for name in (node.name, *node.output)}
    given |= {value.name for value in (*graph.input, *graph.initializer)}
    for index, op in enumerate(model.get_ordered_ops()):
        name = op.get_friendly_name()
        if NUMBERED.search(name) and name not in given:
            op.set_friendly_name(f"{op.get_type_name()}_at{index}")


def _size(dim: int | str) -> int:
    return dim if isinstance(dim, int) else -1


def _translated(call: Any, /, *arguments: Any, **named: Any) -> Any:
    """Call into OpenVINO, whose failures are several lines long.

    Raises:
        Unsupported: it names an operator without conversion. StoreError: it cannot read the file.
        BuildFailed: anything else.
    """
    try:
        return call(*arguments, **named)
    except FAILURES as error:
        raise _refusal(" ".join(str(error).split())) from error


def _refusal(text: str) -> HastenError:
    if found := NO_CONVERSION.search(text) or OP_FAILED.search(text):
        return Unsupported(NAME, f"it has no conversion for {found[1]}")
    reason = re.sub(r"Exception from \S+: |Check '.*?' failed at \S+: |FrontEnd API failed with \w+: ?", "", text)
    if any(sign in text for sign in UNREADABLE):
        return StoreError(f"{NAME} cannot read the model: {reason[:300]}")
    return BuildFailed(NAME, reason[:500])
