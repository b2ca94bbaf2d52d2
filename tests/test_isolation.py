"""Child processes: what comes back from them, and what happens when they die, hang, or take too much.

The classes and functions of this file are run in the children: a child finds this module by its name.
"""

import ctypes
import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hasten import errors, registry
from hasten.isolation import Child, Limits, Reply, report_progress, run_isolated

HERE = "test_isolation"

DTYPES = st.one_of(
    hnp.boolean_dtypes(),
    hnp.integer_dtypes(endianness="?"),
    hnp.unsigned_integer_dtypes(endianness="?"),
    hnp.floating_dtypes(endianness="?"),
    hnp.complex_number_dtypes(),
    hnp.unicode_string_dtypes(endianness="=", max_len=5),
    hnp.byte_string_dtypes(max_len=5),
)


def test_a_file_in_the_current_folder_is_not_imported_for_a_library(tmp_path):
    (tmp_path / "psutil.py").write_text("raise SystemExit('this file was run')\n")
    told = "from hasten.isolation import run_isolated; print(run_isolated('os:getcwd'))"
    path = os.pathsep.join(str(Path(each).absolute()) for each in sys.path if each)
    ran = subprocess.run(
        [sys.executable, "-P", "-c", told],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ran.stdout.strip(), ran.stderr) == (str(tmp_path), "")


class Parrot:
    """Lives in the child."""

    def __init__(self, *, greeting: str = "hello") -> None:
        self.greeting = greeting
        self.calls = 0
        self.hoard = [b""]

    def echo(self, value=None, arrays=None):
        self.calls += 1
        return Reply(value, arrays or {})

    def count(self):
        return self.calls

    def greet(self):
        return self.greeting

    def die(self, number):
        os.kill(os.getpid(), number)
        signal.pause()

    def crash_in_c(self):
        os.write(1, b"about to read address zero\n")
        ctypes.string_at(0)

    def leave(self, code):
        os._exit(code)

    def sleep(self):
        while True:
            signal.pause()

    def chatter(self):
        while True:
            report_progress("still here", 0.5)

    def eat(self, size):
        self.hoard.append(b"x" * size)
        return self.sleep()

    def work(self):
        for i in range(3):
            report_progress(f"part {i}", i / 3)
        return "done"

    def raise_(self, kind):
        raise ERRORS[kind]

    def affinity(self):
        return [sorted(os.sched_getaffinity(0)), os.environ.get("OMP_NUM_THREADS")]

    def knows_engine(self, name):
        return name in registry.entries("engine")

    def objects(self):
        return Reply(None, {"names": np.array(["a", None], dtype=object)})


class StillBorn:
    def __init__(self) -> None:
        raise errors.BadInput("the file 'x' is empty; give another")


ERRORS = {
    "usage": errors.UsageError("no"),
    "name": errors.UnknownName("pass", "fols", ["fold", "fuse"]),
    "setting": errors.InvalidSetting("rank = -1"),
    "signature": errors.SignatureMismatch("input 'x' wants dtype float32, got int8"),
    "input": errors.BadInput("not a file"),
    "missing": errors.MissingDependency("openvino", "pip install 'hasten[openvino]'"),
    "unsupported": errors.Unsupported("openvino", "it has no kernel for NonZero"),
    "build": errors.BuildFailed("fold", "it broke"),
    "crash": errors.ChildCrashed("inner", "a grandchild died"),
    "hang": errors.ChildHung("inner", "a grandchild hung"),
    "memory": errors.OutOfMemory("inner", "a grandchild took too much"),
    "untrusted": errors.Untrusted("output 'y' is off by 1"),
    "store": errors.StoreError("the disk is full"),
    "other": ZeroDivisionError("float division by zero"),
}


def add(a, b):
    return a + b


@pytest.fixture(scope="module")
def parrot():
    with Child.start(f"{HERE}:Parrot") as child:
        yield child


@pytest.fixture
def mortal():
    with Child.start(f"{HERE}:Parrot", limits=Limits(seconds=20)) as child:
        yield child


def test_a_value_and_the_object_s_state_survive_between_calls(parrot):
    before = parrot.call("count").value
    assert parrot.call("echo", value={"a": [1, 2.5, None, "ü"]}).value == {"a": [1, 2.5, None, "ü"]}
    assert parrot.call("count").value == before + 1


def test_settings_reach_the_constructor():
    with Child.start(f"{HERE}:Parrot", greeting="hullo") as child:
        assert child.call("greet").value == "hullo"


def test_a_function_is_called_once_in_a_child_of_its_own():
    assert run_isolated(f"{HERE}:add", a=2, b=3) == 5


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_arrays_come_back_as_they_went(parrot, data):
    shapes = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
    arrays = data.draw(
        st.dictionaries(st.text(min_size=1, max_size=5), hnp.arrays(DTYPES, shapes), min_size=1, max_size=3)
    )
    back = parrot.call("echo", arrays=arrays).arrays
    assert back.keys() == arrays.keys()
    for name, array in arrays.items():
        assert (back[name].dtype, back[name].shape) == (array.dtype, array.shape)
        assert back[name].tobytes() == array.tobytes()


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.int4])
def test_dtypes_that_numpy_does_not_know_itself_come_back(parrot, dtype):
    array = np.arange(6).reshape(2, 3).astype(dtype)
    back = parrot.call("echo", arrays={"x": array}).arrays["x"]
    assert back.dtype == array.dtype
    np.testing.assert_array_equal(back, array)


def test_an_array_that_is_a_view_with_gaps_comes_back_whole(parrot):
    array = np.arange(24, dtype=np.float32).reshape(4, 6)[::2, ::3].T
    np.testing.assert_array_equal(parrot.call("echo", arrays={"x": array}).arrays["x"], array)


def test_an_array_of_several_megabytes_comes_back(parrot):
    array = np.random.default_rng(0).standard_normal(1 << 19)
    np.testing.assert_array_equal(parrot.call("echo", arrays={"x": array}).arrays["x"], array)


def test_an_array_of_python_objects_is_refused_without_pickle(parrot):
    with pytest.raises(errors.Unsupported, match="'names' holds object"):
        parrot.call("objects")
    assert parrot.call("echo", value=1).value == 1  # the child lives on


@pytest.mark.parametrize("kind", [kind for kind in ERRORS if kind != "other"])
def test_an_error_keeps_its_class_message_and_fields(parrot, kind):
    with pytest.raises(errors.HastenError) as caught:
        parrot.call("raise_", kind=kind)
    wanted = ERRORS[kind]
    assert type(caught.value) is type(wanted)
    assert str(caught.value) == str(wanted)
    assert vars(caught.value) == vars(wanted)


def test_any_other_error_becomes_a_failed_build_that_names_it(parrot):
    with pytest.raises(errors.BuildFailed, match="raise_: ZeroDivisionError: float division by zero"):
        parrot.call("raise_", kind="other")


def test_an_error_of_the_constructor_is_raised_in_the_parent():
    with pytest.raises(errors.BadInput, match="the file 'x' is empty"):
        Child.start(f"{HERE}:StillBorn")


def test_progress_is_passed_on_in_order(parrot):
    told = []
    assert parrot.call("work", progress=lambda text, share: told.append((text, share))).value == "done"
    assert told == [("part 0", 0.0), ("part 1", 1 / 3), ("part 2", 2 / 3)]


def test_a_child_that_is_killed_is_a_crash_with_the_signal(mortal):
    with pytest.raises(errors.ChildCrashed, match="die: the child process died of SIGABRT"):
        mortal.call("die", number=int(signal.SIGABRT))


def test_a_crash_in_native_code_tells_the_last_line_that_was_printed(mortal):
    with pytest.raises(errors.ChildCrashed, match="SIGSEGV; its last line: about to read address zero"):
        mortal.call("crash_in_c")


def test_a_child_that_leaves_is_a_crash_with_its_code(mortal):
    with pytest.raises(errors.ChildCrashed, match="exited with code 7"):
        mortal.call("leave", code=7)


def test_a_child_that_hangs_is_stopped_at_its_time_limit(mortal):
    with pytest.raises(errors.ChildHung, match="sleep: no answer within its time limit"):
        mortal.call("sleep", timeout_s=0.1)
    assert not psutil.pid_exists(mortal.pid)


def test_a_child_that_only_reports_progress_is_stopped_at_its_time_limit(mortal):
    with pytest.raises(errors.ChildHung):
        mortal.call("chatter", timeout_s=0.1)


def test_a_child_that_has_ended_refuses_further_calls_in_one_line(mortal):
    mortal.close()
    mortal.close()
    with pytest.raises(errors.ChildCrashed, match="echo: the child process has ended before"):
        mortal.call("echo")


def test_a_child_over_its_memory_limit_is_stopped():
    with Child.start(f"{HERE}:Parrot", limits=Limits(seconds=20, memory_bytes=300 << 20)) as child:
        with pytest.raises(errors.OutOfMemory, match=r"eat: it took \d+ MiB of memory, more than the limit of 300 MiB"):
            child.call("eat", size=400 << 20)
        assert not psutil.pid_exists(child.pid)


def test_a_child_is_pinned_to_its_processors_and_told_how_many_threads():
    cpu = max(os.sched_getaffinity(0))
    with Child.start(f"{HERE}:Parrot", limits=Limits(cpus=(cpu,))) as child:
        assert child.call("affinity").value == [[cpu], "1"]


def test_a_registered_engine_is_known_in_the_child():
    registry.register("engine", "of-this-test", registry.Entry(f"{HERE}:Parrot"))
    try:
        with Child.start(f"{HERE}:Parrot") as child:
            assert child.call("knows_engine", name="of-this-test").value is True
    finally:
        registry._registered["engine"].pop("of-this-test")


def test_no_pipe_or_process_is_left_open():
    gc.collect()
    before = psutil.Process().num_fds()
    for _ in range(2):
        with Child.start(f"{HERE}:Parrot") as child:
            child.call("echo")
    assert psutil.Process().num_fds() == before
    assert not psutil.pid_exists(child.pid)


PARENT = f"""
import sys
sys.path[:0] = {[str(Path(__file__).parent)]!r}
from hasten.isolation import Child
child = Child.start("{HERE}:Parrot")
print(child.pid, flush=True)
child.call("sleep")
"""


def test_a_killed_parent_takes_its_busy_child_with_it():
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE)
    with parent:
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    deadline = time.monotonic() + 10
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        os.sched_yield()
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
