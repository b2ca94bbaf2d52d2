"""ONNX Runtime: the graph that it optimizes once is what is stored, opened and measured."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import onnx
import onnxruntime
from google.protobuf.message import DecodeError
from msgspec import Meta

from hasten.artifact import Artifact
from hasten.engines.batch import open_batch, why_not_batch, with_batch
from hasten.engines.built import built_from, check_built
from hasten.engines.cuda import RECORDINGS
from hasten.engines.feeds import FeedCheck
from hasten.engines.onnxruntime_cuda import (
    ByShape,
    Run,
    check_placement,
    check_repeatable,
    check_replay,
    load_libraries,
    plans_by_shape,
    provider_options,
)
from hasten.engines.onnxruntime_names import name_nodes, settle_names
from hasten.engines.onnxruntime_profile import read_operators
from hasten.engines.onnxruntime_refusal import refusal
from hasten.errors import BuildFailed, HastenError, StoreError, Unsupported
from hasten.graph.model import EXTERNAL_FROM_BYTES
from hasten.measurement import Operator
from hasten.settings import Choice, Doc
from hasten.tensors import DTYPES, Array, Feed, Signature
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
TRIED_LENGTHS = (1, 8, 32, 224, 640)
"""What an open axis is tried with on a GPU."""
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
    graphs: Annotated[
        bool, Doc("on a GPU: the work of each shape is recorded once, as a CUDA graph, and replayed from then on")
    ] = False

    @property
    def device(self) -> str:
        """Where it runs: "cpu" or "cuda"."""
        return self.provider

    def why_not(self, source: Artifact) -> str | None:
        """Say in a sentence why it cannot take ``source``, or None."""
        if source.format != "onnx":
            return f"it builds from ONNX, not from {source.format!r}"
        if PROVIDERS[self.provider] not in onnxruntime.get_available_providers():
            return f"this build of ONNX Runtime has no {PROVIDERS[self.provider]}; install onnxruntime-gpu"
        if self.graphs and self.provider == "cpu":
            return "graphs are of a GPU: set provider=cuda with them"
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
        if self.provider != "cpu":
            name_nodes(target)
            self._check_on_gpu(
                target, source.signature if self.batch is None else with_batch(source.signature, self.batch)
            )
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
        check_built(built, engine=NAME)
        if self.provider == "cpu":
            return OnnxRuntimeSession(
                built.signature, self._session(str(built.entry), self._options(LEVELS["none"])).run
            )
        return GpuSession(built.signature, self._by_shape(built.entry, built.signature).run)

    def operators(self, built: Artifact, feed: Feed, *, runs: int) -> tuple[Operator, ...]:
        """Profile ``runs`` runs and read back every node: concrete shapes, dtype, median time.

        On a GPU the times are those of launching each node's kernels: these run later, one behind the other.
        """
        built.signature.check(feed)
        check_built(built, engine=NAME)
        return read_operators(
            lambda options: self._session(str(built.entry), options),
            self._options(LEVELS["none"]),
            built.entry,
            feed,
            runs,
        )

    def _options(self, level: Any) -> Any:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = SILENT
        options.graph_optimization_level = level
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        options.add_session_config_entry("session.intra_op.allow_spinning", "1" if self.spin else "0")
        if self.provider != "cpu":
            options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
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

    def _by_shape(self, entry: Path, signature: Signature) -> ByShape:
        """Open what was built on a GPU.

        Raises:
            Unsupported: the processor would compute, or work that is not the same each time would be replayed.
        """
        model = onnx.load(entry, load_external_data=False)
        if self.graphs:
            check_repeatable(model)
        files = sorted(path for path in entry.parent.rglob("*") if path.is_file())
        seen = _marks(files)

        def another() -> Any:
            if _marks(files) != seen:  # a shape's session must not have the weights of another version
                raise StoreError(f"{entry} was changed or replaced since it was opened; load the model again")
            return self._session(str(entry), self._options(LEVELS["none"]), graphs=self.graphs)

        session = another()
        check_placement(session, model)
        return ByShape(
            session,
            another if plans_by_shape(model) else None,
            [spec.name for spec in signature.inputs],
            graphs=self.graphs,
            n_bytes=sum(path.stat().st_size for path in files),
        )

    def _session(self, model: str | bytes, options: Any, *, graphs: bool = False) -> Any:
        if self.provider == "cpu":
            return _started(model, options, PROVIDERS["cpu"])
        load_libraries()
        with RECORDINGS.opening():
            session = _started(model, options, (PROVIDERS["cuda"], provider_options(graphs=graphs)))
        if session.get_providers()[0] != PROVIDERS["cuda"]:
            raise Unsupported(
                NAME,
                "its GPU provider does not start here, and the processor would run it; nvidia-smi shows whether there "
                "is a GPU, and pip install 'onnxruntime-gpu[cuda,cudnn]' brings the libraries that it needs",
            )
        return session

    def _check_on_gpu(self, target: Path, signature: Signature) -> None:
        """Check where it computes and, with graphs, that what is replayed follows its inputs.

        Raises:
            Unsupported: it does not.
        """
        by_shape = self._by_shape(target, signature)
        if not self.graphs:
            return
        plain = GpuSession(signature, replace(self, graphs=False)._by_shape(target, signature).run)
        for length in TRIED_LENGTHS:
            first, second = (_tried(signature, length, seed) for seed in (0, 1))
            try:
                expected = [plain.run(feed) for feed in (first, second)]
            except BuildFailed:  # another length may do
                continue
            check_replay(by_shape, (first, second), expected[1])
            return
        raise Unsupported(
            NAME,
            f"it runs with none of the lengths {TRIED_LENGTHS} of open axes, so that replays cannot be checked; fix "
            "the model's shapes, or set graphs=false",
        )


class OnnxRuntimeSession:
    """A loaded model. One thread at a time."""

    def __init__(self, signature: Signature, run: Run) -> None:
        self._signature = signature
        self._run: Run | None = run
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
        if self._run is None:
            raise BuildFailed(NAME, "this session is closed; open the model again")
        try:
            results = self._run(self._outputs, feed)
        except HastenError:
            raise
        except Exception as error:
            raise refusal(NAME, error, running=True) from error
        if len(results) == 1:
            return {self._outputs[0]: results[0]}
        return dict(zip(self._outputs, results, strict=True))

    def close(self) -> None:
        """Free it. Closing twice is fine."""
        self._run = None


class GpuSession(OnnxRuntimeSession):
    """A model that is loaded on a GPU. One thread at a time."""

    def close(self) -> None:
        """Free it, beside no recording. Closing twice is fine."""
        with RECORDINGS.running():
            super().close()


def _started(model: str | bytes, options: Any, provider: str | tuple[str, dict[str, str]]) -> Any:
    try:
        return onnxruntime.InferenceSession(model, options, providers=[provider], enable_fallback=0)
    except Exception as error:
        # ONNX Runtime's exceptions have no common root but Exception, and their class tells little.
        raise refusal(NAME, error) from error


def _marks(files: Sequence[Path]) -> list[tuple[int, int, int, int]]:
    """Give what tells files from others of the same names.

    Raises:
        StoreError: one is not there.
    """
    try:
        return [(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns) for found in map(os.stat, files)]
    except OSError as error:
        raise StoreError(f"a file of the model is gone since it was opened: {error}") from error


def _tried(signature: Signature, length: int, seed: int) -> dict[str, Array]:
    """Give inputs to try a model with: an open axis is ``length`` long, whole numbers are 0 and 1."""
    random, feed = np.random.default_rng(seed), {}
    for spec in signature.inputs:
        shape = tuple(dim if isinstance(dim, int) else length for dim in spec.shape)
        if DTYPES[spec.dtype].kind in "biu":  # each number is another one for another seed
            feed[spec.name] = ((np.arange(math.prod(shape)) + 1 + seed) % 2).reshape(shape).astype(DTYPES[spec.dtype])
        else:
            feed[spec.name] = random.standard_normal(shape).astype(DTYPES[spec.dtype])
    return feed


def _computed_in_float32(path: Path) -> onnx.NodeProto | None:
    """Give the first node that ONNX Runtime runs in float32 between casts of its own, or None."""
    nodes: Sequence[onnx.NodeProto] = onnx.load(path, load_external_data=False).graph.node
    casts = {name for node in nodes if node.name.startswith(CAST_BACK) for name in node.output}
    for node in nodes:
        if node.op_type != "Cast" and (node.name.startswith(CAST_BACK) or casts & set(node.input)):
            return node
    return None
