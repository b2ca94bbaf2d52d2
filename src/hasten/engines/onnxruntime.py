"""ONNX Runtime: the graph that it optimizes once is what is stored, opened and measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import onnx
import onnxruntime
from google.protobuf.message import DecodeError
from msgspec import Meta

from hasten.artifact import Artifact
from hasten.engines.batch import open_batch, why_not_batch
from hasten.engines.built import built_from, check_built
from hasten.engines.feeds import FeedCheck
from hasten.engines.onnxruntime_names import settle_names
from hasten.engines.onnxruntime_profile import read_operators
from hasten.engines.onnxruntime_refusal import refusal
from hasten.errors import BuildFailed, StoreError, Unsupported
from hasten.graph.model import EXTERNAL_FROM_BYTES
from hasten.measurement import Operator
from hasten.settings import Choice, Doc
from hasten.tensors import Array, Feed, Signature
from hasten.transform import Context

NAME = "onnxruntime"
ENTRY = "model.onnx"
LEVELS = {
    "all": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
    "extended": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "basic": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "none": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
}
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
SILENT = 4
"""Only fatal messages are printed; every other failure comes back as an exception with the same text."""
CAST_BACK = "InsertedPrecisionFreeCast_"
"""How ONNX Runtime names a cast to float32 that it puts around an operator without a kernel in the graph's dtype,
and what it fuses into it."""


@dataclass(frozen=True, kw_only=True)
class OnnxRuntime:
    """Run with ONNX Runtime on the processor, or on an NVIDIA GPU."""

    name: ClassVar[str] = NAME
    uses_samples: ClassVar[bool] = False
    uses_training: ClassVar[bool] = False

    threads: Annotated[int, Doc("threads that one run may use"), Meta(ge=1)] = 1
    precision: Annotated[
        Literal["float32", "float16", "bfloat16"],
        Doc("dtype in which float operators must really compute; float32 is what the graph says"),
    ] = "float32"
    optimization: Annotated[
        Literal["all", "extended", "basic", "none"], Doc("how far ONNX Runtime rewrites the graph")
    ] = "all"
    batch: Annotated[Annotated[int, Meta(ge=1)] | None, Doc("fixed length of the batch axis; none keeps it open")] = (
        None
    )
    spin: Annotated[
        bool, Doc("idle threads wait by spinning: faster answers, busy processors"), Choice((True, False))
    ] = True
    provider: Annotated[Literal["cpu", "cuda"], Doc("where it runs; falling back to another is an error")] = "cpu"

    def why_not(self, source: Artifact) -> str | None:
        """Say in a sentence why it cannot take ``source``, or None."""
        if source.format != "onnx":
            return f"it builds from ONNX, not from {source.format!r}"
        if PROVIDERS[self.provider] not in onnxruntime.get_available_providers():
            return f"this build of ONNX Runtime has no {PROVIDERS[self.provider]}; install onnxruntime-gpu"
        for spec in (*source.signature.inputs, *source.signature.outputs):
            if spec.dtype == "bfloat16":
                return f"its Python interface takes no bfloat16 arrays, and {spec.name!r} is one"
        if self.precision != "float32" and self.precision not in source.traits:
            return f"it computes in the graph's dtype: to have {self.precision}, put the pass 'cast' before it"
        return None if self.batch is None else why_not_batch(source.signature, self.batch)

    def apply(self, source: Artifact, ctx: Context) -> Artifact:
        """Write the graph that ONNX Runtime really runs.

        Raises:
            Unsupported: it lacks a kernel or an operator, or would compute in another precision than asked.
            BuildFailed: it refuses the model for another reason.
        """
        options = self._options(LEVELS[self.optimization])
        target = ctx.folder / ENTRY
        options.optimized_model_filepath = str(target)
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(source.entry.parent.resolve())
        )
        if source.size_bytes >= EXTERNAL_FROM_BYTES or set(source.files) != {source.entry_name}:
            # Weights beside the source must go beside the result: else it would point into the source's folder.
            options.add_session_config_entry("session.optimized_model_external_initializers_file_name", f"{ENTRY}.data")
            options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
        self._session(self._prepared(source), options)
        settle_names(target)
        if self.precision != "float32" and (node := _computed_in_float32(target)):
            raise Unsupported(
                NAME,
                f"it has no {self.precision} kernel for {node.op_type} (node {node.name!r}): it casts to float32",
            )
        return built_from(source, ctx.folder, ENTRY, engine=NAME, batch=self.batch)

    def open(self, built: Artifact) -> OnnxRuntimeSession:
        """Load what ``apply`` wrote, and change nothing in it.

        Raises:
            StoreError: the files are not what this engine writes, or were written for another processor.
            BuildFailed: ONNX Runtime refuses them.
        """
        return OnnxRuntimeSession(built.signature, self._opened(built, self._options(LEVELS["none"])))

    def operators(self, built: Artifact, feed: Feed, *, runs: int) -> tuple[Operator, ...]:
        """Profile ``runs`` runs and read back every node: concrete shapes, dtype, median time."""
        built.signature.check(feed)
        return read_operators(
            lambda options: self._opened(built, options), self._options(LEVELS["none"]), built.entry, feed, runs
        )

    def _options(self, level: Any) -> Any:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = SILENT
        options.graph_optimization_level = level
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        options.add_session_config_entry("session.intra_op.allow_spinning", "1" if self.spin else "0")
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "0" if self.provider == "cpu" else "1")
        return options

    def _prepared(self, source: Artifact) -> bytes:
        """Give the model without its inner shapes, which ONNX Runtime infers anew, and with its batch fixed."""
        try:
            model = onnx.load(source.entry, load_external_data=False)
        except (OSError, ValueError, DecodeError) as error:
            raise StoreError(f"{source.entry} cannot be read: {error}") from error
        del model.graph.value_info[:]
        if self.batch is not None:
            name = open_batch(source.signature)
            for value in (*model.graph.input, *model.graph.output):
                for axis, dim in enumerate(value.type.tensor_type.shape.dim):
                    if not dim.HasField("dim_value") and (dim.dim_param or f"{value.name}_dim{axis}") == name:
                        dim.dim_value = self.batch
        return bytes(model.SerializeToString())

    def _opened(self, built: Artifact, options: Any) -> Any:
        check_built(built, engine=NAME)
        return self._session(str(built.entry), options)

    def _session(self, model: str | bytes, options: Any) -> Any:
        try:
            session = onnxruntime.InferenceSession(model, options, providers=[PROVIDERS[self.provider]])
        except Exception as error:
            # ONNX Runtime's exceptions have no common root but Exception, and their class tells little.
            raise refusal(NAME, error) from error
        if session.get_providers()[0] != PROVIDERS[self.provider]:
            raise Unsupported(NAME, f"{PROVIDERS[self.provider]} does not start here; it would run on the processor")
        return session


class OnnxRuntimeSession:
    """A loaded model. One thread at a time."""

    def __init__(self, signature: Signature, session: Any) -> None:
        self._signature = signature
        self._session = session
        self._outputs = [spec.name for spec in signature.outputs]
        self._check = FeedCheck(signature)

    @property
    def signature(self) -> Signature:
        """What it takes and gives."""
        return self._signature

    def run(self, feed: Feed) -> dict[str, Array]:
        """Run once. The arrays that come back are the caller's to keep.

        Raises:
            SignatureMismatch: ``feed`` does not fit the signature. BuildFailed: ONNX Runtime failed, or it is closed.
        """
        self._check(feed)
        if self._session is None:
            raise BuildFailed(NAME, "this session is closed; open the model again")
        try:
            results = self._session.run(self._outputs, feed)
        except Exception as error:
            raise refusal(NAME, error, running=True) from error
        if len(results) == 1:
            return {self._outputs[0]: results[0]}
        return dict(zip(self._outputs, results, strict=True))

    def close(self) -> None:
        """Free it. Closing twice is fine."""
        self._session = None


def _computed_in_float32(path: Path) -> onnx.NodeProto | None:
    """Give the first node that ONNX Runtime runs in float32 between casts of its own, or None."""
    nodes: Sequence[onnx.NodeProto] = onnx.load(path, load_external_data=False).graph.node
    casts = {name for node in nodes if node.name.startswith(CAST_BACK) for name in node.output}
    for node in nodes:
        if node.op_type != "Cast" and (node.name.startswith(CAST_BACK) or casts & set(node.input)):
            return node
    return None
