"""PyTorch on the trainable view: node by node, or compiled ahead of time into one library."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import msgspec
import onnx
import torch
from google.protobuf.message import DecodeError
from msgspec import Meta

from hasten.artifact import Artifact, hash_file
from hasten.engines import torch_compiled as compiled
from hasten.engines.batch import why_not_batch, with_batch
from hasten.engines.built import built_from, check_built
from hasten.engines.cuda import RECORDINGS
from hasten.engines.feeds import FeedCheck
from hasten.engines.torch_eager import Eager, check_precision
from hasten.engines.torch_profile import read_compiled, read_eager
from hasten.errors import BuildFailed, StoreError, Unsupported
from hasten.host import this_host
from hasten.isolation import Limits, run_isolated
from hasten.measurement import Operator
from hasten.settings import Doc
from hasten.tensors import DTYPES, Array, Feed, Signature, TensorSpec
from hasten.transform import Context

NAME = "torch"
ARITHMETIC: Mapping[str, frozenset[str]] = {
    "bfloat16": frozenset(("avx512_bf16", "amx_bf16", "bf16")),
    "float16": frozenset(("avx512_fp16", "amx_fp16")),
}
"""The instruction sets of which a processor needs one: without, PyTorch computes in float32 and rounds."""

FAILURES = (RuntimeError, ValueError, IndexError, TypeError)
"""What PyTorch raises when it runs."""

BUILD_S = 3600.0

Run = Callable[[list[torch.Tensor]], Sequence[torch.Tensor]]
"""Takes the inputs and gives the outputs, both in order."""


@dataclass(frozen=True, kw_only=True)
class Torch:
    """Run with PyTorch: eager, or compiled by Inductor with the weights frozen into the library."""

    name: ClassVar[str] = NAME
    uses_samples: ClassVar[bool] = False
    uses_training: ClassVar[bool] = False

    threads: Annotated[int, Doc("threads that one run may use"), Meta(ge=1)] = 1
    precision: Annotated[
        Literal["float32", "bfloat16", "float16"], Doc("dtype in which convolutions and products must really compute")
    ] = "float32"
    batch: Annotated[Annotated[int, Meta(ge=1)] | None, Doc("fixed length of the batch axis; none keeps it open")] = (
        None
    )
    mode: Annotated[
        Literal["eager", "compiled"],
        Doc("node by node, or compiled for fixed shapes, with int8 kernels for quantized products"),
    ] = "eager"
    device: Annotated[Literal["cpu", "cuda"], Doc("where it runs; falling back to another is an error")] = "cpu"

    def why_not(self, source: Artifact) -> str | None:
        """Say in a sentence why it cannot take ``source``, or None."""
        if source.format != "onnx":
            return f"it builds from ONNX, not from {source.format!r}"
        if self.device == "cuda" and not torch.cuda.is_available():
            return "PyTorch finds no CUDA device here; install a build of PyTorch with CUDA, or run on the processor"
        for spec in (*source.signature.inputs, *source.signature.outputs):
            if spec.dtype == "string":
                return f"PyTorch has no strings, and {spec.name!r} is one"
        if self.batch is not None and (reason := why_not_batch(source.signature, self.batch)):
            return reason
        return self._why_not_compiled(self._signature(source)) if self.mode == "compiled" else None

    def apply(self, source: Artifact, ctx: Context) -> Artifact:
        """Check that every operator can be run and in which precision, then keep the graph or compile it.

        Raises:
            Unsupported: the view lacks an operator, or products would compute in another precision than asked.
            BuildFailed: PyTorch refuses the model for another reason.
        """
        self._check_arithmetic()
        signature = self._signature(source)
        try:
            if self.mode == "compiled":
                entry = self._compile(source, signature, ctx)
            else:
                entry = self._copy(source, signature, ctx)
        except Unsupported as error:
            raise Unsupported(NAME, error.reason) from error
        return built_from(source, ctx.folder, entry, engine=NAME, batch=self.batch)

    def open(self, built: Artifact) -> TorchSession:
        """Load what ``apply`` wrote.

        Raises:
            StoreError: the files are not what this engine writes, or were written for another processor.
        """
        self._check_built(built)
        with contextlib.nullcontext() if self.device == "cpu" else RECORDINGS.opening():  # weights go to the GPU
            if self.mode == "compiled":
                return TorchSession(built.signature, self._loaded(built).run, self)
            eager = self._eager(built)
            return TorchSession(built.signature, eager.run, self, constants=eager.tensors.values())

    def operators(self, built: Artifact, feed: Feed, *, runs: int) -> tuple[Operator, ...]:
        """Eager: each node that runs, timed one by one. Compiled: each kernel of the schedule, timed by its profile."""
        built.signature.check(feed)
        self._check_built(built)
        inputs = [to_tensor(feed[spec.name], self.device) for spec in built.signature.inputs]
        with threads_set(self.threads), torch.inference_mode():
            if self.mode == "eager":
                return read_eager(self._eager(built), inputs, runs)
            return read_compiled(self._loaded(built), inputs, runs)

    def _compile(self, source: Artifact, signature: Signature, ctx: Context) -> str:
        """Compile in a process of its own: what the compiler numbers and keeps would show in the next library."""
        ctx.progress("compiling", None)
        run_isolated(
            "hasten.engines.torch_compiled:build",
            limits=Limits(seconds=BUILD_S),
            model=str(source.entry),
            folder=str(ctx.folder),
            inputs=compiled.shapes_of(signature.inputs),
            threads=self.threads,
            precision=self.precision,
            device=self.device,
        )
        return compiled.LIBRARY

    def _copy(self, source: Artifact, signature: Signature, ctx: Context) -> str:
        eager = self._eager(source)
        if self.precision != "float32":
            zeros = _zeros(signature, self.device)
            check_precision(lambda: eager.run(zeros), self.precision)
        for name in source.files:
            (ctx.folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source.folder / name, ctx.folder / name)
        return source.entry_name

    def _why_not_compiled(self, signature: Signature) -> str | None:
        compiler = os.environ.get("CXX", "g++")
        if shutil.which(compiler) is None:
            return f"compiling needs a C++ compiler, and there is no {compiler!r} here; install g++, or set CXX to one"
        for spec in signature.inputs:
            if found := [dim for dim in spec.shape if isinstance(dim, str)]:
                return f"it compiles for fixed shapes, and {spec.name!r} has the open axis {found[0]!r}; fix the batch"
        return None

    def _signature(self, source: Artifact) -> Signature:
        return source.signature if self.batch is None else with_batch(source.signature, self.batch)

    def _check_arithmetic(self) -> None:
        if self.precision == "float32":
            return
        if self.device == "cpu":
            here = bool(ARITHMETIC[self.precision] & set(this_host().flags))
        else:
            here = self.precision == "float16" or torch.cuda.is_bf16_supported(including_emulation=False)
        if not here:
            raise Unsupported(NAME, f"this processor has no {self.precision} arithmetic; it would only emulate it")

    def _check_built(self, built: Artifact) -> None:
        check_built(built, engine=NAME)
        if (built.entry_name == compiled.LIBRARY) != (self.mode == "compiled"):
            raise StoreError(f"{built.entry} was not built for the mode {self.mode!r}; build it again")

    def _eager(self, artifact: Artifact) -> Eager:
        try:
            model = onnx.load(artifact.entry)
        except (OSError, DecodeError) as error:
            raise StoreError(f"{NAME} cannot read the model {artifact.entry}: {error}") from error
        return Eager.of(model, precision=self.precision, device=self.device)

    def _loaded(self, built: Artifact) -> compiled.Compiled:
        if hash_file(built.entry) != built.files[built.entry_name]:  # loading a damaged one would end this process
            raise StoreError(f"{built.entry} is not the library that was built; delete that folder and build it again")
        try:
            return compiled.Compiled(built.folder, [spec.name for spec in built.signature.inputs], self.device)
        except (RuntimeError, msgspec.DecodeError) as error:
            raise StoreError(f"{NAME} cannot load {built.entry}: {' '.join(str(error).split())[:300]}") from error


class TorchSession:
    """A loaded model. One thread at a time."""

    def __init__(
        self,
        signature: Signature,
        run: Run,
        engine: Torch,
        *,
        constants: Iterable[torch.Tensor] = (),
    ) -> None:
        self._signature = signature
        self._run: Run | None = run
        self._check = FeedCheck(signature)
        self._threads = engine.threads
        self._device = engine.device
        self._constants = frozenset(tensor.untyped_storage().data_ptr() for tensor in constants)

    @property
    def signature(self) -> Signature:
        """What it takes and gives."""
        return self._signature

    def run(self, feed: Feed) -> dict[str, Array]:
        """Run once. The arrays that come back are the caller's to keep.

        Raises:
            SignatureMismatch: ``feed`` does not fit the signature. BuildFailed: PyTorch failed, or it is closed.
        """
        self._check(feed)
        if self._run is None:
            raise BuildFailed(NAME, "this session is closed; open the model again")
        if torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)
        if self._device == "cpu":
            return self._ran(feed, self._run)
        with RECORDINGS.running():
            return self._ran(feed, self._run)

    def _ran(self, feed: Feed, run: Run) -> dict[str, Array]:
        inputs = [to_tensor(feed[spec.name], self._device) for spec in self._signature.inputs]
        try:
            with torch.inference_mode():
                results = run(inputs)
        except FAILURES as error:
            raise BuildFailed(f"{NAME} run", " ".join(str(error).split())[:500]) from error
        taken = {*self._constants, *(tensor.untyped_storage().data_ptr() for tensor in inputs)}
        made = {}
        for spec, result in zip(self._signature.outputs, results, strict=True):
            made[spec.name] = to_array(result, spec, taken)
            taken.add(result.untyped_storage().data_ptr())
        return made

    def close(self) -> None:
        """Free it. Closing twice is fine."""
        with contextlib.nullcontext() if self._device == "cpu" else RECORDINGS.running():
            self._run = None


def to_tensor(array: Array, device: str) -> torch.Tensor:
    """Give an array as a tensor that shares its memory, where it can: one that cannot be written to is copied."""
    whole = array if array.flags.writeable and array.flags.c_contiguous else array.copy(order="C")
    if whole.dtype == DTYPES["bfloat16"]:
        tensor = torch.from_numpy(whole.view("int16")).view(torch.bfloat16)
    else:
        tensor = torch.from_numpy(whole)
    return tensor if device == "cpu" else tensor.to(device)


def to_array(tensor: torch.Tensor, spec: TensorSpec, taken: set[int]) -> Array:
    """Give a tensor as an array in its signature's dtype; one whose memory is ``taken`` is copied."""
    wanted = getattr(torch, spec.dtype)
    whole = tensor.to("cpu", wanted).contiguous()
    if whole.untyped_storage().data_ptr() in taken:
        whole = whole.clone()
    if wanted is torch.bfloat16:
        return whole.view(torch.int16).numpy().view(DTYPES["bfloat16"])  # type: ignore[no-any-return]
    return whole.numpy()  # type: ignore[no-any-return]


@contextlib.contextmanager
def threads_set(threads: int) -> Iterator[None]:
    """Let PyTorch use so many threads meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _zeros(signature: Signature, device: str) -> list[torch.Tensor]:
    """Give inputs of zeros; an open axis is 1 long."""
    return [
        torch.zeros(spec.concrete({}), dtype=getattr(torch, spec.dtype), device=device) for spec in signature.inputs
    ]
