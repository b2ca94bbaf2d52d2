"""ONNX Runtime on an NVIDIA GPU: what is asked of its provider, and what may stay on the processor."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime

from hasten.engines.cuda import RECORDINGS
from hasten.errors import Unsupported
from hasten.tensors import Array, Feed

NAME = "onnxruntime"
PROVIDER = "CUDAExecutionProvider"
DEVICE = "cuda"

SHAPE_OPS = frozenset(
    (
        *("Shape", "Size", "Constant", "ConstantOfShape", "Range", "Identity", "Cast"),
        *("Gather", "Slice", "Squeeze", "Unsqueeze", "Concat", "Split", "Reshape", "Expand", "Flatten"),
        *("Add", "Sub", "Mul", "Div", "Mod", "Neg", "Abs", "Max", "Min", "Floor", "Ceil", "Sqrt"),
        *("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Not", "And", "Or", "Where"),
        *("ReduceProd", "ReduceSum", "ReduceMax", "ReduceMin", "CumSum", "ScatterND"),
    )
)
"""Operators that compute with shapes. ONNX Runtime leaves those on the processor, where shapes are needed; that any
of them computes with data there would mean that a GPU has no kernel for it, and it has one for each."""

UNREPEATABLE = frozenset(
    (
        *("NonZero", "Unique", "Compress", "NonMaxSuppression"),
        *("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial"),
    )
)
"""Operators whose outputs' lengths depend on data, or that must not give the same again: replayed, they would be wrong.
"""

MOST_SHAPES = 64
"""Shapes whose work is recorded, each with buffers of its own on the GPU; others are run as they come."""

MOST_SESSIONS = 16
"""Shapes that have a session of their own, with the weights in it; others share one."""

Run = Callable[[Sequence[str], Feed], Sequence[Array]]
"""Takes the outputs' names and the inputs, gives the outputs in order."""

NOT_RECORDED = -1
"""The number of a run that is neither recorded nor replayed (ONNX Runtime's ``kGraphAnnotationSkip``)."""


def provider_options(*, graphs: bool) -> dict[str, str]:
    """Give the provider's options. float32 is float32: TF32, which it takes by itself, keeps 10 bits of 23.

    Kernels for a convolution are chosen by what cuDNN knows of them: to try them all took four times as long for each
    new shape, and what was found ran no faster (docs/decisions/0011).
    """
    return {
        "use_tf32": "0",
        "cudnn_conv_algo_search": "HEURISTIC",
        "enable_cuda_graph": "1" if graphs else "0",
    }


@functools.cache
def load_libraries() -> None:
    """Load CUDA's and cuDNN's libraries from where pip installed them, once; else the system's are looked for."""
    with contextlib.redirect_stdout(sys.stderr):  # it prints what it does not find
        onnxruntime.preload_dlls()


def check_placement(session: Any) -> None:
    """Check that nothing but shapes is computed on the processor.

    Args:
        session: Opened with ``session.record_ep_graph_assignment_info``.

    Raises:
        Unsupported: names an operator that is.
    """
    for part in session.get_provider_graph_assignment_info():
        if part.ep_name != PROVIDER:
            for node in part.get_nodes():
                if node.domain not in ("", "ai.onnx") or node.op_type not in SHAPE_OPS:
                    raise Unsupported(
                        NAME, f"its GPU provider cannot run {node.op_type} (node {node.name!r}): the processor would"
                    )


def check_repeatable(model: onnx.ModelProto) -> None:
    """Check that the work of a run depends on shapes alone.

    Raises:
        Unsupported: names a node for which that does not hold.
    """
    for node in model.graph.node:
        if node.op_type in UNREPEATABLE:
            raise Unsupported(
                NAME,
                f"node {node.name!r} ({node.op_type}) does not do the same work each time, so that it cannot be "
                "replayed; set graphs=false",
            )


def plans_by_shape(model: onnx.ModelProto) -> bool:
    """Say whether ONNX Runtime plans for one shape at a time: its convolutions keep the plan of the last shape alone.

    Whoever comes with another shape waits for a new plan, some 40 ms for a small network; and a graph that was recorded
    holds kernels of a plan that may be gone.
    """
    return any("Conv" in node.op_type for node in model.graph.node)


class ByShape:
    """Runs of a model on a GPU. One thread at a time.

    Where ONNX Runtime plans by shape, each shape has a session of its own. What a small network costs on a GPU is
    mostly the launching of its kernels one by one; with ``graphs`` the work of each shape is recorded once and launched
    at once (CUDA C++ Programming Guide, "CUDA Graphs"), with fixed places in the GPU's memory for inputs and outputs.
    """

    def __init__(
        self,
        session: Any,
        another: Callable[[], Any] | None,
        inputs: Sequence[str],
        *,
        graphs: bool,
        device: str = DEVICE,
    ) -> None:
        """Make it ready.

        Args:
            session: An open session.
            another: Opens another one, for each shape; None: one is enough for all.
            inputs: The inputs' names.
            graphs: Record and replay; then the sessions were opened with ``enable_cuda_graph``.
            device: Where the places are.
        """
        self._spare: Any = session
        self._another = another
        self._inputs = list(inputs)
        self._graphs, self._device = graphs, device
        self._known: dict[tuple[tuple[int, ...], ...], Run] = {}
        self._rest: Run | None = None
        """For shapes that are too many, or empty."""

    def run(self, names: Sequence[str], feed: Feed) -> Sequence[Array]:
        """Run once. The first run of a shape takes as long as some hundred others: it is planned, and recorded.

        Args:
            names: Of the outputs, all of them in order.
            feed: The inputs.

        Raises:
            Exception: as ONNX Runtime's session.
        """
        known = self._known.get(tuple(feed[name].shape for name in self._inputs))
        return self._first(names, feed) if known is None else known(names, feed)

    def _first(self, names: Sequence[str], feed: Feed) -> Sequence[Array]:
        most = MOST_SHAPES if self._another is None else MOST_SESSIONS
        if len(self._known) >= most or not all(feed[name].size for name in self._inputs):
            if self._rest is None:
                self._rest = self._plain(self._opened())
            return self._rest(names, feed)
        session = self._opened()
        plain = self._plain(session)
        made = plain(names, feed)
        known = plain
        if self._graphs and all(array.size for array in made):
            with RECORDINGS.recording():
                known = self._recorded(session, names, feed, made)
        self._known[tuple(feed[name].shape for name in self._inputs)] = known
        return made

    def _opened(self) -> Any:
        """Give a session that has run no other shape, where that matters."""
        session = self._spare
        if self._another is None:
            return session
        self._spare = None
        return self._another() if session is None else session

    def _plain(self, session: Any) -> Run:
        options = _options(NOT_RECORDED) if self._graphs else None

        def run(names: Sequence[str], feed: Feed) -> Sequence[Array]:
            with RECORDINGS.running():
                return session.run(names, feed, options)  # type: ignore[no-any-return]

        return run

    def _recorded(self, session: Any, names: Sequence[str], feed: Feed, made: Sequence[Array]) -> Run:
        """Record a run, and give what replays it. ``made`` are its outputs."""
        binding, options = session.io_binding(), _options(len(self._known) + 1)
        inputs = {name: self._place(feed[name]) for name in self._inputs}
        outputs = [self._place(array) for array in made]
        for name, value in inputs.items():
            value.update_inplace(np.ascontiguousarray(feed[name]))
            binding.bind_ortvalue_input(name, value)
        for name, value in zip(names, outputs, strict=True):
            binding.bind_ortvalue_output(name, value)
        session.run_with_iobinding(binding, options)

        def replay(names: Sequence[str], feed: Feed) -> Sequence[Array]:
            with RECORDINGS.running():
                for name, value in inputs.items():
                    value.update_inplace(np.ascontiguousarray(feed[name]))
                session.run_with_iobinding(binding, options)
                return [value.numpy() for value in outputs]

        return replay

    def _place(self, array: Array) -> Any:
        """Give a place on the GPU for arrays like this one."""
        return onnxruntime.OrtValue.ortvalue_from_shape_and_type(array.shape, array.dtype.type, self._device, 0)


def _options(number: int) -> Any:
    options = onnxruntime.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(number))
    return options
