"""Runs and recordings on a GPU: who waits for whom, and what is recorded. Without a GPU, but for the last tests."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from hasten.engines import onnxruntime_cuda as cuda
from hasten.engines.cuda import Recordings
from hasten.engines.onnxruntime import OnnxRuntime
from hasten.engines.onnxruntime_cuda import ByShape, check_placement, check_repeatable, plans_by_shape, provider_options
from hasten.errors import Unsupported
from hasten.store import Store
from hasten.tensors import Array
from hasten.testing.models import Builder, convnet, encoder, mlp, random_samples, stored
from hasten.transform import Context, run_pass

LONG_S = 30.0


def session_of(model: onnx.ModelProto) -> Any:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def one_node(kind: str, outputs: int = 1, *, dtype: int = TensorProto.FLOAT) -> onnx.ModelProto:
    """A model of one operator on float x."""
    names = [f"y{n}" for n in range(outputs)]
    graph = helper.make_graph(
        [helper.make_node(kind, ["x"], names, name="it")],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info(name, dtype, None) for name in names],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])


class Watched:
    """A session on the processor, whose provider takes bindings too and records nothing; it keeps what it was asked."""

    def __init__(self) -> None:
        self.session = session_of(mlp())
        self.plain: list[int] = []
        """Rows of runs that are not recorded."""
        self.replayed: list[tuple[str, int]] = []
        """Graphs and rows of the others."""

    def run(self, names: list[str], feed: dict[str, Array], options: Any) -> list[Array]:
        assert options is None or options.get_run_config_entry("gpu_graph_id") == "-1"
        self.plain.append(len(feed["x"]))
        return self.session.run(names, feed, options)  # type: ignore[no-any-return]

    def io_binding(self) -> Any:
        return self.session.io_binding()

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        self.session.run_with_iobinding(binding, options)
        (made,) = binding.get_outputs()
        self.replayed.append((options.get_run_config_entry("gpu_graph_id"), made.shape()[0]))


class Opened:
    """Runs by shape, and the sessions that they have opened."""

    def __init__(self, *, graphs: bool, apart: bool) -> None:
        self.sessions = [Watched()]
        another = self.another if apart else None
        self.by_shape = ByShape(self.sessions[0], another, ["x"], graphs=graphs, device="cpu")

    def another(self) -> Watched:
        self.sessions.append(Watched())
        return self.sessions[-1]

    def check(self, *counts: int) -> None:
        """Run so many rows, each time others, and compare."""
        for seed, n in enumerate(counts):
            x = np.asfortranarray(np.random.default_rng(seed).standard_normal((n, 16)).astype(np.float32))
            (got,) = self.by_shape.run(["y"], {"x": x})
            np.testing.assert_allclose(got, self.sessions[0].session.run(None, {"x": x})[0], rtol=1e-5, atol=1e-6)


def test_each_shape_is_recorded_once_under_a_number_of_its_own_and_new_data_gives_new_answers() -> None:
    opened = Opened(graphs=True, apart=False)
    opened.check(1, 4, 1, 4, 1)
    (session,) = opened.sessions
    assert session.plain == [1, 4], "the first of each shape"
    assert session.replayed == [("1", 1), ("2", 4), ("1", 1), ("2", 4), ("1", 1)]


@pytest.mark.parametrize("graphs", [False, True])
def test_where_it_plans_by_shape_no_session_sees_two_shapes(graphs: bool) -> None:
    opened = Opened(graphs=graphs, apart=True)
    opened.check(1, 4, 9, 4, 1, 9)
    assert len(opened.sessions) == 3
    for session, rows in zip(opened.sessions, (1, 4, 9), strict=True):
        assert {*session.plain, *(n for _, n in session.replayed)} == {rows}
        assert bool(session.replayed) == graphs


def test_without_graphs_nothing_is_bound() -> None:
    opened = Opened(graphs=False, apart=False)
    opened.check(1, 4, 1)
    assert (opened.sessions[0].plain, opened.sessions[0].replayed) == ([1, 4, 1], [])


def test_shapes_beyond_the_limit_are_run_as_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "MOST_SHAPES", 2)
    opened = Opened(graphs=True, apart=False)
    opened.check(1, 2, 3, 1, 2, 3)
    (session,) = opened.sessions
    assert session.plain == [1, 2, 3, 3]
    assert [n for _, n in session.replayed] == [1, 2, 1, 2]


def test_sessions_beyond_the_limit_are_not_opened_but_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "MOST_SESSIONS", 2)
    opened = Opened(graphs=True, apart=True)
    opened.check(1, 2, 3, 4, 3, 1)
    assert [session.plain for session in opened.sessions] == [[1], [2], [3, 4, 3]]


def test_nothing_is_recorded_for_no_rows() -> None:
    opened = Opened(graphs=True, apart=False)
    opened.check(0, 1, 0)
    assert opened.sessions[0].plain == [0, 1, 0]


def test_convolutions_are_planned_by_shape() -> None:
    assert plans_by_shape(convnet())
    assert not plans_by_shape(encoder())


def test_runs_go_on_beside_each_other_and_a_recording_is_alone() -> None:
    recordings, order = Recordings(), []  # type: tuple[Recordings, list[str]]
    both, go_on = threading.Barrier(3), threading.Event()

    def run() -> None:
        with recordings.running():
            both.wait(LONG_S)
            go_on.wait(LONG_S)
            order.append("run")

    def record() -> None:
        with recordings.recording():
            order.append("recording")

    def later() -> None:
        with recordings.running():
            order.append("later")

    runs = [threading.Thread(target=run) for _ in range(2)]
    for thread in runs:
        thread.start()
    both.wait(LONG_S)  # two at once
    recorder = threading.Thread(target=record)
    recorder.start()
    while not recordings._recordings:
        threading.Event().wait(0)
    last = threading.Thread(target=later)
    last.start()
    go_on.set()
    for thread in (*runs, recorder, last):
        thread.join(LONG_S)
    assert order == ["run", "run", "recording", "later"], "one that waits goes before runs that come later"


def test_what_fails_holds_up_nobody() -> None:
    recordings = Recordings()
    with pytest.raises(ValueError, match="run"), recordings.running():
        raise ValueError("run")
    with pytest.raises(ValueError, match="recording"), recordings.recording():
        raise ValueError("recording")
    with recordings.recording():
        assert not recordings._running
    with recordings.running():
        assert recordings._running == 1


def test_data_on_the_processor_is_refused_and_shapes_are_not() -> None:
    with pytest.raises(Unsupported, match=r"cannot run Erf \(node 'it'\): the processor would"):
        check_placement(session_of(one_node("Erf")))
    check_placement(session_of(one_node("Shape", dtype=TensorProto.INT64)))


@pytest.mark.parametrize(("kind", "outputs"), [("NonZero", 1), ("RandomNormalLike", 1), ("Unique", 2)])
def test_work_that_depends_on_data_or_chance_is_not_replayed(kind: str, outputs: int) -> None:
    with pytest.raises(Unsupported, match=rf"node 'it' \({kind}\).*graphs=false"):
        check_repeatable(one_node(kind, outputs))
    check_repeatable(mlp())


def test_float32_is_not_cut_to_tf32() -> None:
    assert provider_options(graphs=False)["use_tf32"] == "0"
    assert [provider_options(graphs=graphs)["enable_cuda_graph"] for graphs in (False, True)] == ["0", "1"]


def test_graphs_without_a_gpu_are_refused(store: Store) -> None:
    assert "set provider=cuda" in str(OnnxRuntime(graphs=True).why_not(stored(mlp(), store)))


def shaped() -> onnx.ModelProto:
    """x [n, 4, 6] -> y [n, 24], as exporters write it: the shape is computed when it runs."""
    net = Builder(0)
    shape = net.add("Shape", "x")
    count = net.add("Gather", shape, net.constant(np.array([0], np.int64)))
    flat = net.add("Concat", count, net.constant(np.array([-1], np.int64)), axis=0)
    net.add("Relu", net.add("Reshape", "x", flat))
    return net.model(("x", ("n", 4, 6)), ("y", ("n", 24)))


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("make", [mlp, convnet, encoder, shaped])
def test_the_gpu_says_what_the_processor_says(make: Any, graphs: bool, store: Store, ctx: Context) -> None:
    """Needs an NVIDIA GPU and onnxruntime-gpu."""
    engine, source = OnnxRuntime(provider="cuda", graphs=graphs), stored(make(), store)
    if reason := engine.why_not(source):
        pytest.skip(reason)
    there = engine.open(run_pass(engine, source, store, ctx))
    here = OnnxRuntime().open(run_pass(OnnxRuntime(), source, store, ctx))
    samples = random_samples(source, n=16)
    for part in (slice(0, 1), slice(1, 4), slice(5, 6), slice(8, 11), slice(0, 16)):
        feed = samples.feed(part)
        got = there.run(feed)
        there.run({name: np.zeros_like(array) for name, array in feed.items()})  # an answer is the caller's to keep
        for name, expected in here.run(feed).items():
            np.testing.assert_allclose(got[name], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
def test_recordings_beside_runs_fail_neither(store: Store, ctx: Context) -> None:
    """Needs an NVIDIA GPU and onnxruntime-gpu."""
    engine, source = OnnxRuntime(provider="cuda", graphs=True), stored(convnet(), store)
    if reason := engine.why_not(source):
        pytest.skip(reason)
    built = run_pass(engine, source, store, ctx)
    expected = OnnxRuntime().open(run_pass(OnnxRuntime(), source, store, ctx))
    samples = random_samples(source, n=12)
    sessions = [engine.open(built) for _ in range(3)]

    def go(session: Any, order: list[int]) -> None:
        for n in order:
            feed = samples.feed(slice(0, n))
            np.testing.assert_allclose(session.run(feed)["y"], expected.run(feed)["y"], rtol=1e-4, atol=1e-5)

    orders = [[int(n) for n in np.random.default_rng(k).integers(1, 13, 200)] for k in range(3)]
    with ThreadPoolExecutor() as pool:
        for told in [pool.submit(go, session, order) for session, order in zip(sessions, orders, strict=True)]:
            told.result(LONG_S)
