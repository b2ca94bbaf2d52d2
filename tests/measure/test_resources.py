"""What this process takes."""

import threading

import numpy as np
import psutil

from hasten.measure import resources

MIB = 1 << 20


def test_memory_that_is_written_to_is_resident():
    before = resources.rss_bytes()
    block = np.ones(64 * MIB, dtype=np.uint8)
    assert resources.rss_bytes() - before > 60 * MIB
    assert block.nbytes == 64 * MIB


def test_the_peak_remembers_memory_that_was_given_back():
    resources.forget_peak()
    before = resources.rss_bytes()
    block = np.ones(96 * MIB, dtype=np.uint8)
    del block
    assert resources.rss_bytes() - before < 60 * MIB
    assert resources.peak_rss_bytes() - before > 90 * MIB


def test_the_peak_is_never_under_what_is_resident():
    assert resources.peak_rss_bytes() >= psutil.Process().memory_info().rss - MIB


def test_threads_are_counted():
    done = threading.Event()
    before = resources.threads_now()
    thread = threading.Thread(target=done.wait)
    thread.start()
    try:
        assert resources.threads_now() == before + 1
    finally:
        done.set()
        thread.join()
