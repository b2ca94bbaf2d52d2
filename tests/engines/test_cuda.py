"""Runs and recordings on a GPU: who waits for whom, and what is recorded. Without a GPU, but for the last tests."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from hasten.engines import onnxruntime_cuda as cuda
from hasten.engines.cuda import RECORDINGS, Recordings
from hasten.engines.onnxruntime import OnnxRuntime, _marks, _tried
from hasten.engines.onnxruntime_cuda import (
    ByShape,
    check_placement,
    check_repeatable,
    check_replay,
    plans_by_shape,
    provider_options,
)
from hasten.engines.onnxruntime_names import name_nodes
from hasten.errors import BuildFailed, StoreError, Unsupported
from hasten.store import Store
from hasten.tensors import Array, Signature, TensorSpec
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
    """A session on the processor, whose provider takes bindings too and records nothing; it keeps what it was asked.

    As ONNX Runtime's on a GPU, it records for each thread: ``recorded`` has the graphs and the threads.
    """

    def __init__(self, *, fails: bool = False) -> None:
        self.session = session_of(mlp())
        self.fails = fails
        """To record."""
        self.plain: list[int] = []
        """Rows of runs that are not recorded."""
        self.replayed: list[tuple[str, int]] = []
        """Graphs and rows of the others."""
        self.recorded: set[tuple[str, int]] = set()

    def run(self, names: list[str], feed: dict[str, Array], options: Any) -> list[Array]:
        assert options is None or options.get_run_config_entry("gpu_graph_id") == "-1"
        self.plain.append(len(feed["x"]))
        return self.session.run(names, feed, options)  # type: ignore[no-any-return]

    def io_binding(self) -> Any:
        return self.session.io_binding()

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        number = options.get_run_config_entry("gpu_graph_id")
        if (number, threading.get_ident()) not in self.recorded:
            if self.fails:
                raise RuntimeError("operation not permitted when stream is capturing")
            assert RECORDINGS._recording, "recorded beside others"
            self.recorded.add((number, threading.get_ident()))
        self.session.run_with_iobinding(binding, options)
        (made,) = binding.get_outputs()
        self.replayed.append((number, made.shape()[0]))


class Opened:
    """Runs by shape, and the sessions that they have opened."""

    def __init__(self, *, graphs: bool, apart: bool, fails: bool = False, room: int = 99, n_bytes: int = 0) -> None:
        self.fails, self.room = fails, room
        self.sessions: list[Watched] = []
        another = self.another if apart else None
        self.by_shape = ByShape(self.another(), another, ["x"], graphs=graphs, n_bytes=n_bytes, device="cpu")

    def another(self) -> Watched:
        if len(self.sessions) == self.room:
            raise BuildFailed("onnxruntime", "CUDA failure 2: out of memory")
        self.sessions.append(Watched(fails=self.fails))
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


def test_a_large_model_has_fewer_sessions() -> None:
    opened = Opened(graphs=False, apart=True, n_bytes=cuda.MOST_BYTES // 2)
    opened.check(1, 2, 3, 4)
    assert [session.plain for session in opened.sessions] == [[1], [2], [3, 4]]
    opened = Opened(graphs=False, apart=True, n_bytes=cuda.MOST_BYTES * 3)
    opened.check(1, 2, 3)
    assert [session.plain for session in opened.sessions] == [[1], [2, 3]]


def test_where_the_gpu_has_no_room_for_another_session_shapes_share_the_last(
    caplog: pytest.LogCaptureFixture,
) -> None:
    opened = Opened(graphs=True, apart=True, room=2)
    opened.check(1, 2, 3, 4, 3, 1)
    assert [session.plain for session in opened.sessions] == [[1], [2, 3, 4, 3]]
    assert [record.message for record in caplog.records if "no room for another session" in record.message] == [
        caplog.records[0].message
    ]


@pytest.mark.parametrize("counts", [(1, 2, 0, 0, 3), (1, 2, 3, 3, 0)])
def test_without_room_shapes_that_share_one_share_the_last(counts: tuple[int, ...]) -> None:
    opened = Opened(graphs=False, apart=True, room=2, n_bytes=cuda.MOST_BYTES // 2)
    opened.check(*counts)
    assert len(opened.sessions) == 2
    assert opened.sessions[1].plain == list(counts[1:])


def test_another_thread_that_cannot_record_is_answered_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    opened = Opened(graphs=True, apart=False)
    opened.check(2, 2)
    opened.sessions[0].fails = True
    with ThreadPoolExecutor(1) as pool:
        pool.submit(opened.check, 2, 2, 2).result(LONG_S)
    assert opened.sessions[0].plain == [2, 2, 2, 2]
    assert len([record for record in caplog.records if "another thread cannot record" in record.message]) == 1
    opened.check(2)
    assert len(opened.sessions[0].plain) == 4, "the thread that has recorded goes on to replay"


def test_a_session_whose_first_run_fails_is_used_for_the_next_shape() -> None:
    opened = Opened(graphs=False, apart=True)
    opened.check(1)
    for _ in range(3):
        with pytest.raises(cuda.FAILURES):
            opened.by_shape.run(["y"], {"x": np.zeros((2, 5), np.float32)})
    opened.check(3)
    assert len(opened.sessions) == 2


def test_without_room_for_the_first_session_that_is_told() -> None:
    opened = Opened(graphs=False, apart=True, room=1)
    opened.by_shape._opened()
    with pytest.raises(BuildFailed, match="out of memory"):
        opened.check(1)


@pytest.mark.parametrize(("apart", "sessions"), [(False, 1), (True, 2)])
def test_what_cannot_be_recorded_is_answered_all_the_same_and_not_tried_again(
    apart: bool, sessions: int, caplog: pytest.LogCaptureFixture
) -> None:
    opened = Opened(graphs=True, apart=apart, fails=True)
    opened.check(2, 2, 2)
    assert len(opened.sessions) == sessions
    assert sum(len(session.plain) for session in opened.sessions) == 3
    (told,) = [record.message for record in caplog.records]
    assert "[[2, 16]] cannot be recorded" in told
    assert opened.by_shape.recorded == 0


def test_another_thread_records_anew_and_alone() -> None:
    opened = Opened(graphs=True, apart=False)
    opened.check(2, 2)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(opened.check, 2, 2).result(LONG_S)
    assert len(opened.sessions[0].recorded) == 2, "one graph, two threads; ``Watched`` sees that each was alone"


class Stale(ByShape):
    """Gives the first answer again: a value was read on the processor when the run was recorded."""

    def run(self, names: Sequence[str], feed: dict[str, Array]) -> Sequence[Array]:
        self.first = getattr(self, "first", None) or list(super().run(names, feed))
        return self.first


def test_a_replay_that_does_not_follow_its_inputs_is_refused() -> None:
    feeds = tuple({"x": np.random.default_rng(seed).standard_normal((2, 16)).astype(np.float32)} for seed in (0, 1))
    expected = {"y": session_of(mlp()).run(None, feeds[1])[0]}
    check_replay(ByShape(Watched(), None, ["x"], graphs=True, device="cpu"), feeds, expected)
    with pytest.raises(Unsupported, match=r"'y' does not follow the inputs.*graphs=false"):
        check_replay(Stale(Watched(), None, ["x"], graphs=True, device="cpu"), feeds, expected)
    with pytest.raises(Unsupported, match=r"cannot be recorded.*graphs=false"):
        check_replay(ByShape(Watched(fails=True), None, ["x"], graphs=True, device="cpu"), feeds, expected)


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
        go_on.set()  # the recording waits by now
        with recordings.running():
            order.append("later")

    with ThreadPoolExecutor(4) as pool:
        runs = [pool.submit(run) for _ in range(2)]
        both.wait(LONG_S)  # two at once
        recorder = pool.submit(record)
        with recordings._changed:
            assert recordings._changed.wait_for(lambda: recordings._recording or _poked(recordings), LONG_S)
        last = pool.submit(later)
        for told in (*runs, recorder, last):
            told.result(LONG_S)
    assert order == ["run", "run", "recording", "later"], "one that waits goes before runs that come later"


def _poked(recordings: Recordings) -> bool:
    """Let others at the lock for a moment; a recording that begins to wait wakes nobody."""
    recordings._changed.wait(0.001)
    return recordings._recording


def test_runs_do_not_wait_for_an_opening_nor_for_a_recording_that_does() -> None:
    recordings, done = Recordings(), threading.Event()

    def record() -> None:
        with recordings.recording():
            done.set()

    with ThreadPoolExecutor(1) as pool:
        with recordings.opening():
            waiting = pool.submit(record)
            for _ in range(100):
                with recordings.running():
                    assert not done.is_set()
        waiting.result(LONG_S)
    assert done.is_set()


def test_what_fails_holds_up_nobody() -> None:
    recordings = Recordings()
    with pytest.raises(ValueError, match="run"), recordings.running():
        raise ValueError("run")
    with pytest.raises(ValueError, match="recording"), recordings.recording():
        raise ValueError("recording")
    with pytest.raises(ValueError, match="opening"), recordings.opening():
        raise ValueError("opening")
    with recordings.recording():
        assert not recordings._running
    with recordings.running():
        assert recordings._running == 1


def placed(model: onnx.ModelProto, tmp_path: Path) -> tuple[Any, onnx.ModelProto]:
    """A model as it is opened, all of it on the processor, with names."""
    onnx.save(model, tmp_path / "model.onnx")
    name_nodes(tmp_path / "model.onnx")
    named = onnx.load(tmp_path / "model.onnx")
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(named.SerializeToString(), options, providers=["CPUExecutionProvider"]), named


def scaled(kind: int, *, by_shape: bool) -> onnx.ModelProto:
    """x [n, 4] -> x, or the length of its first axis, times that length."""
    made = TensorProto.INT64 if by_shape else kind
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Gather", ["shape", "zero"], ["length"]),
        helper.make_node("Cast", ["length"], ["cast"], to=made),
        helper.make_node("Mul", ["cast" if by_shape else "x", "cast"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "scaled",
        [helper.make_tensor_value_info("x", kind, ["n", 4])],
        [helper.make_tensor_value_info("y", made, None)],
        [helper.make_tensor("zero", TensorProto.INT64, [1], [0])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])


def test_data_on_the_processor_is_refused_and_shapes_and_ids_are_not(tmp_path: Path) -> None:
    check_placement(*placed(scaled(TensorProto.FLOAT, by_shape=True), tmp_path))
    check_placement(*placed(scaled(TensorProto.INT64, by_shape=False), tmp_path))
    with pytest.raises(Unsupported, match=r"leaves Mul \(node 'Mul#\d'\) with its data on the processor"):
        check_placement(*placed(scaled(TensorProto.FLOAT, by_shape=False), tmp_path))
    with pytest.raises(Unsupported, match=r"leaves Erf \(node 'it'\)"):
        check_placement(*placed(one_node("Erf"), tmp_path))


def test_a_node_gets_a_name_where_it_has_none_and_keeps_the_one_it_has(tmp_path: Path) -> None:
    model = scaled(TensorProto.FLOAT, by_shape=True)
    model.graph.node[0].name = "mine"
    for node in model.graph.node[1:]:
        node.name = ""
    _, named = placed(model, tmp_path)
    names = [node.name for node in named.graph.node]
    assert names[0] == "mine"
    assert len(set(names)) == len(names)
    assert all(names)


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


def test_files_that_were_replaced_are_not_the_ones_that_were_opened(tmp_path: Path) -> None:
    """A shape that comes later must not get a session of another version's weights."""
    path, other = tmp_path / "model.onnx", tmp_path / "other"
    for place in (path, other):
        place.write_bytes(b"the same bytes")
    os.utime(other, ns=(0, path.stat().st_mtime_ns))
    seen = _marks([path])
    assert _marks([path]) == seen
    other.replace(path)
    assert _marks([path]) != seen
    path.unlink()
    with pytest.raises(StoreError, match="gone since it was opened"):
        _marks([path])


def test_what_a_model_is_tried_with_is_different_from_try_to_try() -> None:
    specs = (TensorSpec("x", "float32", ("n", 3)), TensorSpec("k", "int64", (1,)), TensorSpec("m", "bool", ("n", "w")))
    first, second = (_tried(Signature(specs, specs), 4, seed) for seed in (0, 1))
    assert {name: array.shape for name, array in first.items()} == {"x": (4, 3), "k": (1,), "m": (4, 4)}
    assert first["k"] != second["k"]
    for name, array in first.items():
        assert not np.array_equal(array, second[name])
    assert set(first["k"]) | set(second["k"]) == {0, 1}


def top_k() -> onnx.ModelProto:
    """x [n, 8], k -> the k largest of each row."""
    graph = helper.make_graph(
        [helper.make_node("TopK", ["x", "k"], ["y", "places"])],
        "best",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 8]),
            helper.make_tensor_value_info("k", TensorProto.INT64, [1]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", "k"])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])


@pytest.mark.gpu
def test_a_value_that_is_read_on_the_processor_is_refused_or_followed(store: Store, ctx: Context) -> None:
    """Needs an NVIDIA GPU and onnxruntime-gpu."""
    engine, source = OnnxRuntime(provider="cuda", graphs=True), stored(top_k(), store)
    if reason := engine.why_not(source):
        pytest.skip(reason)
    try:
        session = engine.open(run_pass(engine, source, store, ctx))
    except Unsupported as error:
        assert "graphs=false" in str(error)
        return
    x = np.arange(16, dtype=np.float32).reshape(2, 8)
    for k in (3, 5, 1, 3):
        np.testing.assert_array_equal(session.run({"x": x, "k": np.array([k])})["y"], x[:, ::-1][:, :k])


@pytest.mark.gpu
def test_a_model_that_was_replaced_gives_no_new_shape_an_answer(store: Store, ctx: Context) -> None:
    """Needs an NVIDIA GPU and onnxruntime-gpu."""
    engine, source = OnnxRuntime(provider="cuda"), stored(convnet(), store)
    if reason := engine.why_not(source):
        pytest.skip(reason)
    built = run_pass(engine, source, store, ctx)
    session, samples = engine.open(built), random_samples(source, n=4)
    before = session.run(samples.feed(slice(0, 2)))["y"]
    os.utime(built.entry)
    np.testing.assert_array_equal(session.run(samples.feed(slice(0, 2)))["y"], before)
    with pytest.raises(StoreError, match="load the model again"):
        session.run(samples.feed(slice(0, 3)))


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
