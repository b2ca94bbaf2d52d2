"""Time on a core, of processes whose threads and children come and go."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import psutil
import pytest

from hasten.analyse.host_samples import TICK_NS, Sampling, Spent

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def busy(seconds: float) -> None:
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        sum(range(1000))


def test_threads_that_live_between_two_samples_are_counted() -> None:
    spent, own = Spent(), [psutil.Process()]
    first, before = spent.until_now(own)[0], time.process_time_ns()
    seen = [first]
    for _ in range(20):
        thread = threading.Thread(target=busy, args=(0.02,))
        thread.start()
        thread.join()
        seen.append(spent.until_now(own)[0])
    real = time.process_time_ns() - before
    assert seen == sorted(seen), "time never goes back"
    assert seen[-1] - first == pytest.approx(real, abs=0.15 * real + 3 * TICK_NS)


def test_a_child_that_ends_does_not_end_the_samples() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    found = Sampling(os.getpid())
    assert found.take()
    assert child.pid in {process.pid for process in found._family}
    child.communicate(b"\n")
    assert not psutil.pid_exists(child.pid)
    assert found.take()
    assert child.pid not in {process.pid for process in found._family}


def test_a_server_that_is_gone_ends_them() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    found = Sampling(child.pid)
    assert found.take()
    child.communicate(b"\n")
    assert not found.take()
