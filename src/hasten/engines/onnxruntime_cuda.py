"""ONNX Runtime on an NVIDIA GPU: what is asked of its provider, and what may stay on the processor."""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto
from onnxruntime.capi import onnxruntime_pybind11_state as state

from hasten.engines.cuda import RECORDINGS
from hasten.engines.onnxruntime_names import all_nodes
from hasten.errors import BuildFailed, Unsupported
from hasten.tensors import Array, Feed, relative_error

logger = logging.getLogger(__name__)

NAME = "onnxruntime"
PROVIDER = "CUDAExecutionProvider"
DEVICE = "cuda"

SHAPE_OPS = frozenset(
    (
        *("Shape", "Size", "Constant", "ConstantOfShape", "Range", "Identity", "Cast", "Tile", "Trilu"),
        *("Gather", "Slice", "Squeeze", "Unsqueeze", "Concat", "Split", "Reshape", "Expand", "Flatten", "Transpose"),
        *("Add", "Sub", "Mul", "Div", "Mod", "Neg", "Abs", "Max", "Min", "Floor", "Ceil", "Round", "Sqrt", "Pow"),
        *("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Not", "And", "Or", "Where"),
        *("ReduceProd", "ReduceSum", "ReduceMax", "ReduceMin", "CumSum", "ScatterND"),
    )
)
"""Operators that compute with shapes: ONNX Runtime leaves those on the processor, where shapes are needed."""

WHOLE = frozenset(
    (
        *(TensorProto.INT8, TensorProto.INT16, TensorProto.INT32, TensorProto.INT64, TensorProto.BOOL),
        *(TensorProto.UINT8, TensorProto.UINT16, TensorProto.UINT32, TensorProto.UINT64),
    )
)
"""Dtypes of ids, masks and lengths."""

UNREPEATABLE = frozenset(
    (
        *("NonZero", "Unique", "Compress", "NonMaxSuppression", "Dropout"),
        *("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial"),
    )
)
"""Operators whose outputs' lengths depend on data, or that must not give the same again: replayed, they would be wrong.
"""

MOST_SHAPES = 64
"""Shapes whose work is recorded, each with buffers of its own on the GPU; others are run as they come."""

MOST_SESSIONS = 16
"""Shapes that have a session of their own, with the weights in it; others share one."""

MOST_BYTES = 8 << 30
"""Of weights, in all these sessions: the larger a model, the fewer it has."""

FAILURES: tuple[type[Exception], ...] = (
    RuntimeError,
    *(found for found in vars(state).values() if isinstance(found, type) and issubclass(found, Exception)),
)
"""What ONNX Runtime raises: its own exceptions have no root in common but Exception."""

Run = Callable[[Sequence[str], Feed], Sequence[Array]]
"""Takes the outputs' names and the inputs, gives the outputs in order."""

REPLAYED = 0.05
"""A replay's outputs may be off by so much, relative, from a plain run, whose kernels may be others: low precisions."""

REPLAYED_OTHERS = 0.25
"""The share of whole numbers that may be others."""

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


_loading = threading.Lock()


def load_libraries() -> None:
    """Load CUDA's and cuDNN's libraries from where pip installed them, once; else the system's are looked for."""
    with _loading:  # what stands for standard output meanwhile is the whole process's
        _load_libraries()


@functools.cache
def _load_libraries() -> None:
    with contextlib.redirect_stdout(sys.stderr):  # it prints what it does not find
        onnxruntime.preload_dlls()


def check_placement(session: Any, model: onnx.ModelProto) -> None:
    """Check that nothing but shapes, and what is told by ids and masks, is computed on the processor.

    Args:
        session: Opened from ``model`` as it is, with ``session.record_ep_graph_assignment_info``.
        model: Its nodes have names.

    Raises:
        Unsupported: names an operator that is.
    """
    left = {
        node.name
        for part in session.get_provider_graph_assignment_info()
        if part.ep_name != PROVIDER
        for node in part.get_nodes()
    }
    here = {value.name for value in model.graph.input if value.type.tensor_type.elem_type in WHOLE}
    here |= {value.name for value in model.graph.initializer}
    for node in all_nodes(model.graph):
        if node.op_type in ("Shape", "Size", "Constant"):
            here |= set(node.output)
        elif node.name in left:
            standard = node.domain in ("", "ai.onnx")
            if not standard or node.op_type not in SHAPE_OPS or not here.issuperset(filter(None, node.input)):
                raise Unsupported(
                    NAME, f"on a GPU it leaves {node.op_type} (node {node.name!r}) with its data on the processor"
                )
            here |= set(node.output)


def check_repeatable(model: onnx.ModelProto) -> None:
    """Check that the work of a run depends on shapes alone.

    Raises:
        Unsupported: names a node for which that does not hold.
    """
    for node in all_nodes(model.graph):
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
    return any("Conv" in node.op_type for node in all_nodes(model.graph))


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
        n_bytes: int = 0,
        device: str = DEVICE,
    ) -> None:
        """Make it ready.

        Args:
            session: An open session.
            another: Opens another one, for each shape; None: one is enough for all.
            inputs: The inputs' names.
            graphs: Record and replay; then the sessions were opened with ``enable_cuda_graph``.
            n_bytes: The model's size.
            device: Where the places are.
        """
        self._spare: Any = session
        self._another = another
        self._inputs = list(inputs)
        self._graphs, self._device = graphs, device
        fitting = min(MOST_SESSIONS, max(1, MOST_BYTES // max(n_bytes, 1)))
        self._most = MOST_SHAPES if another is None else fitting
        self._known: dict[tuple[tuple[int, ...], ...], Run] = {}
        self._last: Run | None = None
        """The session that was opened last, for what it comes to where there is no room for one more."""
        self._rest: Run | None = None
        """For shapes that are too many, or empty."""
        self.recorded = 0
        """Shapes whose work is replayed."""

    def run(self, names: Sequence[str], feed: Feed) -> Sequence[Array]:
        """Run once. The first run of a shape takes as long as some hundred others: it is planned, and recorded.

        Args:
            names: Of the outputs, all of them in order.
            feed: The inputs.

        Raises:
            Exception: as ONNX Runtime's session. HastenError: as ``another``.
        """
        known = self._known.get(tuple(feed[name].shape for name in self._inputs))
        return self._first(names, feed) if known is None else known(names, feed)

    def _first(self, names: Sequence[str], feed: Feed) -> Sequence[Array]:
        empty = not all(feed[name].size for name in self._inputs)
        if empty or len(self._known) >= self._most:
            return self._others()(names, feed)
        try:
            session = self._opened()
        except BuildFailed as error:
            return self._shared(error)(names, feed)
        plain = self._plain(session)
        try:
            made = plain(names, feed)
        except FAILURES:
            self._spare = session  # for the next: that shape has not been planned
            raise
        self._last = plain
        self._known[tuple(feed[name].shape for name in self._inputs)] = (
            self._replayed(session, plain, names, feed, made)
            if self._graphs and all(array.size for array in made)
            else plain
        )
        return made

    def _others(self) -> Run:
        """Give what runs shapes that have no session."""
        if self._rest is None:
            try:
                self._rest = self._plain(self._opened())
            except BuildFailed as error:
                self._rest = self._shared(error)
        return self._rest

    def _shared(self, error: BuildFailed) -> Run:
        """Give what runs further shapes where no session can be opened any more. Raises ``error`` where none was."""
        if self._last is None:
            raise error
        logger.warning("there is no room for another session on the GPU, so other shapes share one: %s", error)
        self._most, self._rest = len(self._known), self._last
        return self._last

    def _replayed(self, session: Any, plain: Run, names: Sequence[str], feed: Feed, made: Sequence[Array]) -> Run:
        """Record a run; where that fails, go on without: what could not be recorded need not be lost too."""
        number = self.recorded + 1
        try:
            replay = self._recorded(session, plain, number, names, feed, made)
        except FAILURES as error:
            shapes = [list(feed[name].shape) for name in self._inputs]
            logger.warning("the work of the shapes %s cannot be recorded, and is run each time: %s", shapes, error)
            return plain if self._another is None else self._plain(self._another())
        self.recorded = number
        return replay

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

    def _recorded(
        self, session: Any, plain: Run, number: int, names: Sequence[str], feed: Feed, made: Sequence[Array]
    ) -> Run:
        """Record a run under a number, and give what replays it. ``made`` are its outputs."""
        binding, options = session.io_binding(), _options(number)
        here = threading.local()
        """ONNX Runtime keeps a recording for each thread: one that comes later records anew."""
        with RECORDINGS.opening():
            inputs = {name: self._place(feed[name]) for name in self._inputs}
            outputs = [self._place(array) for array in made]
            for name, value in inputs.items():
                binding.bind_ortvalue_input(name, value)
            for name, value in zip(names, outputs, strict=True):
                binding.bind_ortvalue_output(name, value)

        def replay(names: Sequence[str], feed: Feed) -> Sequence[Array]:
            with RECORDINGS.running() if hasattr(here, "done") else RECORDINGS.recording():
                for name, value in inputs.items():
                    value.update_inplace(np.ascontiguousarray(feed[name]))
                session.run_with_iobinding(binding, options)
                here.done = True
                return [value.numpy() for value in outputs]

        def replay_or_run(names: Sequence[str], feed: Feed) -> Sequence[Array]:
            if hasattr(here, "failed"):
                return plain(names, feed)
            try:
                return replay(names, feed)
            except FAILURES as error:
                if hasattr(here, "done"):
                    raise
                here.failed = True
                logger.warning("another thread cannot record the work of %s, and runs it each time: %s", shapes, error)
                return plain(names, feed)

        shapes = [list(feed[name].shape) for name in self._inputs]
        replay(names, feed)
        return replay_or_run

    def _place(self, array: Array) -> Any:
        """Give a place on the GPU for arrays like this one."""
        return onnxruntime.OrtValue.ortvalue_from_shape_and_type(array.shape, array.dtype.type, self._device, 0)


def check_replay(by_shape: ByShape, feeds: tuple[Feed, Feed], expected: Feed) -> None:
    """Check that runs are recorded, and that a replay follows its inputs as a plain run does.

    A value that a kernel reads on the processor, as how many a TopK gives, is in the recording, and stays what it was.

    Args:
        by_shape: Records and replays.
        feeds: Two of the same shapes, with other values.
        expected: What a plain run gives for the second.

    Raises:
        Unsupported: that does not hold.
    """
    names = list(expected)
    by_shape.run(names, feeds[0])
    if not by_shape.recorded:
        raise Unsupported(NAME, "its work cannot be recorded as a CUDA graph; set graphs=false")
    for name, array in zip(names, by_shape.run(names, feeds[1]), strict=True):
        if not _follows(expected[name], array):
            told = f"replayed, {name!r} does not follow the inputs, of which one is read on the processor"
            raise Unsupported(NAME, f"{told}; set graphs=false")


def _follows(expected: Array, got: Array) -> bool:
    """Say whether a replay's output is that of a plain run, but for kernels that add up in another order."""
    if expected.shape != got.shape:
        return False
    if expected.dtype.kind in "biu":  # of places that are nearly as good, another may be named
        return float(np.mean(expected != got)) <= REPLAYED_OTHERS
    return relative_error(expected, got) <= REPLAYED


def _options(number: int) -> Any:
    options = onnxruntime.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(number))
    return options
