"""Built models in child processes. The child finds ``ToyEngine`` by this module's name."""

import os
import signal
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Annotated, ClassVar

import numpy as np
import pytest

from hasten import registry
from hasten.errors import (
    BadInput,
    BuildFailed,
    ChildCrashed,
    ChildHung,
    InvalidSetting,
    OutOfMemory,
    SignatureMismatch,
    StoreError,
    UnknownName,
    Unsupported,
)
from hasten.isolation import Limits
from hasten.measure.compare import compare
from hasten.measure.latency import WarmUp
from hasten.measure.worker import SessionWorker, cpus_for, fixed_batch, open_isolated
from hasten.measurement import Operator
from hasten.plan import Inputs, Part, Plan, run_plan
from hasten.samples import Samples
from hasten.settings import Doc
from hasten.store import Store
from hasten.tensors import Signature, TensorSpec
from hasten.testing.models import mlp, random_samples, stored

QUICK = WarmUp(min_runs=4, min_s=0.002, max_s=0.05)
TOY = "toy-engine-of-test-worker"


@dataclass(frozen=True, kw_only=True)
class ToyEngine:
    """Opens any artifact as a session that gives each row's sum, and misbehaves as told."""

    name: ClassVar[str] = TOY
    uses_samples: ClassVar[bool] = False
    uses_training: ClassVar[bool] = False

    threads: int = 1
    precision: str = "float32"
    batch: Annotated[int | None, Doc("fixed batch")] = None
    after: Annotated[int, Doc("runs before it misbehaves")] = 0
    deed: Annotated[str, Doc("how it misbehaves")] = "none"

    def why_not(self, source):
        return None

    def apply(self, source, ctx):
        return source

    def open(self, built):
        if self.deed == "refuse":
            raise BuildFailed(self.name, "the file is broken")
        if self.deed == "hoard":
            return ToySession(self, np.ones(80 << 20, dtype=np.uint8))
        return ToySession(self, None)

    def operators(self, built, feed, *, runs):
        shape = (len(feed["x"]), 16)
        spec = TensorSpec("x", "float32", shape)
        return (Operator(name="sum", kind="Sum", dtype="float32", inputs=(spec,), outputs=(), time_ns=float(runs)),)


class ToySession:
    def __init__(self, engine, ballast):
        self.engine = engine
        self.ballast = ballast
        self.runs = 0
        batch = engine.batch or "batch"
        self.signature = Signature((TensorSpec("x", "float32", (batch, 16)),), (TensorSpec("y", "float32", (batch,)),))

    def run(self, feed):
        self.signature.check(feed)
        self.runs += 1
        y = feed["x"].sum(axis=1)
        if self.runs > self.engine.after:
            return DEEDS[self.engine.deed](y)
        return {"y": y}

    def close(self):
        self.ballast = None


def crash(y):
    os.kill(os.getpid(), signal.SIGSEGV)


def hang(y):
    while True:
        signal.pause()


def eat(y):
    hoard = b"x" * (400 << 20)
    hang(hoard)


DEEDS = {
    "none": lambda y: {"y": y},
    "hoard": lambda y: {"y": y},
    "crash": crash,
    "hang": hang,
    "eat": eat,
    "nan": lambda y: {"y": np.where(y > 0, np.nan, y)},
    "scalar": lambda y: {"y": y.sum()},
    "wrong-rows": lambda y: {"y": y[:-1]},
    "strings": lambda y: {"y": np.array([f"row {v:.3f}" for v in y], dtype=object)},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A stored network, what ONNX Runtime built of it, and 20 saved samples."""
    root = tmp_path_factory.mktemp("home")
    store = Store(root / "store")
    source = stored(mlp(), store)
    samples = random_samples(source, n=20, seed=3)
    samples.save(root / "samples")
    plan = Plan(Part("onnxruntime"))
    built = run_plan(plan, source, Inputs(store=store))
    return SimpleNamespace(store=store, source=source, samples=samples, folder=root / "samples", plan=plan, built=built)


@pytest.fixture(autouse=True)
def toy():
    registry.register("engine", TOY, registry.Entry("test_worker:ToyEngine"))
    yield
    registry._registered["engine"].pop(TOY)


def opened(home, part=None, *, batch=1, limits=None, seed=0, folder=None, warm_up=QUICK):
    return open_isolated(
        part or home.plan.engine,
        home.source if part else home.built,
        home.store,
        folder or home.folder,
        batch=batch,
        limits=limits or Limits(seconds=30),
        seed=seed,
        warm_up=warm_up,
    )


def toy_part(**settings):
    return Part(TOY, settings)


@pytest.fixture(scope="module")
def real(home):
    with opened(home, limits=Limits(seconds=30, cpus=cpus_for(1))) as session:
        yield session


def test_a_slice_times_every_run(real):
    times = real.slice(0.01)
    assert times.dtype == np.int64
    assert len(times) > 10
    assert (times > 0).all()
    assert 0.009e9 < times.sum() < 1e9


def test_outputs_are_those_of_the_same_session_here(real, home):
    session = home.plan.load_engine().open(home.built)
    wanted = session.run(home.samples.feed(slice(3, 17)))
    session.close()
    got = real.outputs(3, 17, 4)
    assert got.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_allclose(got[name], array, rtol=1e-5)


def test_resources_are_over_those_of_the_runtime_alone(real, home):
    used = real.resources()
    assert used.file_bytes == home.built.size_bytes
    assert used.load_ns > 0
    assert 0 <= used.rss_bytes <= used.peak_rss_bytes < 500 << 20


def test_memory_that_a_model_holds_is_counted(home):
    with opened(home, toy_part(deed="hoard")) as session:
        used = session.resources()
    assert 78 << 20 < used.rss_bytes < 100 << 20
    assert used.peak_rss_bytes >= used.rss_bytes - (1 << 20)


def test_the_session_s_signature_and_first_run_are_told(real, home):
    session = home.plan.load_engine().open(home.built)
    assert real.signature == session.signature
    session.close()
    assert real.first_run_ns > 0


def test_operators_come_back_as_the_engine_tells_them(home):
    with opened(home, toy_part(), batch=5) as session:
        (operator,) = session.operators(runs=7)
    assert operator == Operator(
        name="sum",
        kind="Sum",
        dtype="float32",
        inputs=(TensorSpec("x", "float32", (5, 16)),),
        outputs=(),
        time_ns=7.0,
    )


def test_the_operators_of_a_real_engine_add_up_to_a_time(real):
    operators = real.operators(runs=3)
    assert operators
    assert all(operator.time_ns is None or operator.time_ns >= 0 for operator in operators)


def test_a_session_with_one_processor_runs_one_thread_of_its_own(home):
    with opened(home, toy_part(), limits=Limits(cpus=cpus_for(1))) as session:
        assert session.threads_now() == 1


def test_twins_are_compared_end_to_end(home):
    with opened(home) as one, opened(home) as other:
        comparison = compare([one, other], budget_s=0.5, slice_s=0.005, precision=0.5, min_blocks=4)
        assert not comparison.failures
        assert one.name != other.name
        assert comparison.ratio(one.name, other.name).n >= 4
        assert comparison.latency(one.name).first_run_ns == one.first_run_ns


@pytest.mark.parametrize(
    ("deed", "error"), [("crash", ChildCrashed), ("hang", ChildHung), ("eat", OutOfMemory)], ids=str
)
def test_a_session_that_fails_in_the_middle_is_an_outcome_and_the_other_goes_on(home, deed, error):
    limits = Limits(seconds=60, memory_bytes=350 << 20)
    bad_part = toy_part(deed=deed, after=400)
    never = WarmUp(min_runs=2, min_s=0, max_s=0)
    with (
        opened(home, toy_part(), warm_up=never) as good,
        opened(home, bad_part, limits=limits, warm_up=never) as bad,
    ):
        if deed == "hang":
            bad.child._limits = Limits(seconds=0.5)  # only now: it may take longer to come up
        comparison = compare([good, bad], budget_s=0.6, slice_s=0.01, precision=1e-9, min_blocks=2)
    assert type(comparison.failures[bad.name]) is error
    assert len(comparison.slices[good.name]) >= 2
    assert good.name not in comparison.failures


def test_values_that_are_not_finite_are_passed_on(home):
    with opened(home, toy_part(deed="nan")) as session:
        y = session.outputs(0, 20, 8)["y"]
    assert np.isnan(y).any()
    assert np.isfinite(y).any()


@pytest.mark.parametrize("deed", ["scalar", "wrong-rows"])
def test_outputs_without_a_row_for_each_sample_are_refused(home, deed):
    with opened(home, toy_part(deed=deed)) as session, pytest.raises(Unsupported, match="output 'y' has shape"):
        session.outputs(0, 20, 8)


def test_strings_come_back_as_strings(home):
    with opened(home, toy_part(deed="strings")) as session:
        y = session.outputs(0, 3, 2)["y"]
    assert list(y) == [f"row {v:.3f}" for v in home.samples.inputs["x"][:3].sum(axis=1)]


def test_a_fixed_batch_is_filled_up_and_cut_again(home):
    with opened(home, toy_part(batch=8), batch=8) as session:
        y = session.outputs(1, 20, 64)["y"]
    np.testing.assert_allclose(y, home.samples.inputs["x"][1:20].sum(axis=1), rtol=1e-6)


def test_a_fixed_batch_wants_exactly_that_batch(home):
    with pytest.raises(SignatureMismatch, match="'x' wants length 8 on axis 0"):
        opened(home, toy_part(batch=8), batch=4)


def test_a_batch_larger_than_the_samples_wraps_around(home):
    with opened(home, toy_part(), batch=50) as session:
        assert len(session.slice(0)) == 1


@pytest.mark.parametrize(("start", "stop", "batch"), [(0, 21, 4), (5, 5, 4), (-1, 4, 4), (0, 4, 0)])
def test_rows_that_are_not_there_are_refused(real, start, stop, batch):
    with pytest.raises(BadInput, match="there are 20 samples"):
        real.outputs(start, stop, batch)


def test_samples_that_do_not_fit_are_refused(home, tmp_path):
    Samples({"x": np.zeros((4, 15), np.float32)}).save(tmp_path)
    with pytest.raises(SignatureMismatch, match="wants length 16"):
        opened(home, toy_part(), folder=tmp_path)


def test_what_cannot_be_opened_is_told_as_what_it_is(home, tmp_path):
    with pytest.raises(BuildFailed, match="the file is broken"):
        opened(home, toy_part(deed="refuse"))
    with pytest.raises(UnknownName, match="did you mean 'onnxruntime'"):
        opened(home, Part("onnxruntim"))
    with pytest.raises(StoreError, match="no readable samples"):
        opened(home, toy_part(), folder=tmp_path / "nowhere")
    with pytest.raises(InvalidSetting, match="batch = 0"):
        opened(home, toy_part(), batch=0)


def test_the_runs_take_different_rows_in_turn(home):
    worker = SessionWorker(
        engine=f'{{"name": "{TOY}"}}',
        artifact=home.source.digest,
        store=str(home.store.root),
        samples=str(home.folder),
        batch=2,
    )
    fed = [worker._run()["y"].tobytes() for _ in range(16)]
    assert len(set(fed)) == 8
    assert fed[:8] == fed[8:]


def test_the_last_processors_are_taken():
    usable = sorted(os.sched_getaffinity(0))
    assert cpus_for(1) == (usable[-1],)
    assert cpus_for(len(usable)) == tuple(usable)
    for wrong in (0, len(usable) + 1):
        with pytest.raises(InvalidSetting, match=f"{wrong} threads"):
            cpus_for(wrong)


def test_inputs_of_different_fixed_batches_are_refused():
    def signature(*firsts):
        return Signature(tuple(TensorSpec(f"x{i}", "float32", (n, 3)) for i, n in enumerate(firsts)), ())

    assert fixed_batch(signature(4, "batch")) == 4
    assert fixed_batch(signature("batch")) is None
    with pytest.raises(SignatureMismatch):
        fixed_batch(signature(4, 5))
