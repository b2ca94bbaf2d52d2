"""What this host can do: operations and bytes per second, measured here, never read from a data sheet.

A peak is the best rate ever seen over several sizes, kernels and repeats, because it serves as an upper bound:
products of matrices and convolutions in NumPy and in every engine that is installed (``PROBES``), each in a child
process pinned to as many processors as threads are asked for.

Bandwidth is measured for growing amounts of data that are gone over again and again, each split among the threads:
what fits into a cache is served faster, and a model's weights may stay in a cache from run to run. The largest amount
is twice the last-level cache (1 GiB at most), so its rate is that of memory. In a virtual machine the last-level cache
is the whole socket's and shared with others; then the rates between are what the neighbours leave.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec
import numpy as np
from numpy.lib.stride_tricks import as_strided

from hasten import registry
from hasten.artifact import Json
from hasten.errors import HastenError, InvalidSetting
from hasten.host import Host, this_host, versions
from hasten.isolation import Limits, run_isolated
from hasten.measurement import Peaks
from hasten.store import write_atomically

PROBES: Mapping[str, str] = {
    "onnxruntime": "hasten.measure.peaks_onnxruntime:measure",
    "openvino": "hasten.measure.peaks_openvino:measure",
}
"""What measures arithmetic through an engine, by its registry name; each file imports its runtime at the top."""

SMALLEST_BYTES = 1 << 14
MOST_BYTES = 1 << 30
"""The smallest and the largest amount of data whose bandwidth is measured, whatever the caches' size."""

PROBE_S = 0.08
"""How long one product is repeated for; the fastest repeat counts."""

PASS_S = 0.03
"""How long one amount of data is gone over for; the fastest pass counts."""

CHILD_S = 120.0


class _Kept(msgspec.Struct, frozen=True):
    """The file that peaks are kept in."""

    peaks: Peaks
    versions: dict[str, str]


def measure_peaks(threads: int, *, home: Path | None = None) -> Peaks:
    """Give this host's peaks for a number of threads, measured once.

    Args:
        threads: Processors to use.
        home: Folder to keep them in: ``peaks/FINGERPRINT-THREADS.json``; None measures anew and keeps nothing.
            What was kept under other versions of the libraries is measured again.

    Raises:
        InvalidSetting: there are not so many processors.
        BuildFailed: a child process failed.
    """
    host = this_host()
    processors = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(host.cores))
    if not 1 <= threads <= len(processors):
        raise InvalidSetting(f"threads = {threads}: this host has {len(processors)} processors")
    path = None if home is None else home / "peaks" / f"{host.fingerprint}-{threads}.json"
    if path is not None and (kept := _read(path)) is not None:
        return kept
    limits = Limits(seconds=CHILD_S, cpus=tuple(processors[:threads]))
    found = [run_isolated("hasten.measure.peaks:measure", limits=limits, threads=threads, amounts=_amounts(host))]
    for name, target in PROBES.items():
        if not registry.entries("engine")[name].missing:
            try:
                found.append(run_isolated(target, limits=limits, threads=threads, dtypes=_dtypes(host)))
            except HastenError:
                if name == "onnxruntime":  # another runtime that does not work here cannot set the peak either
                    raise
    peaks = _joined(found, threads, host.fingerprint)
    if path is not None:
        write_atomically(path, msgspec.json.encode(_Kept(peaks=peaks, versions=versions())))
    return peaks


def measure(*, threads: int, amounts: list[int]) -> Json:
    """Measure in a child process what NumPy can: the product of two float32 matrices, and bandwidth by amount."""
    rates = []
    for size in (384, 1024):
        a = np.random.default_rng(0).standard_normal((size, size)).astype(np.float32)
        out = np.empty_like(a)
        rates.append(best_rate(lambda a=a, out=out: np.matmul(a, a, out=out), 2.0 * size**3))  # type: ignore[misc]
    memory = np.ones(max(amounts) // 4, dtype=np.float32)
    return {
        "operations_per_s": {"float32": max(rates)},
        "bytes_per_s": [[amount, _bandwidth(memory, amount, threads)] for amount in amounts],
    }


def best_rate(run: Callable[[], object], work: float, *, seconds: float = PROBE_S) -> float:
    """Repeat ``run`` for a while, at least three times, and give the best rate of ``work`` per second."""
    run()
    best, repeats, start = math.inf, 0, time.perf_counter()
    while repeats < 3 or time.perf_counter() - start < seconds:
        before = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - before)
        repeats += 1
    return work / best


def _bandwidth(memory: np.ndarray[tuple[int], np.dtype[np.float32]], amount: int, threads: int) -> float:
    """Go over ``amount`` bytes with every thread on a part of its own, and add the threads' rates up."""
    part = amount // 4 // threads
    rates = [0.0] * threads
    gate = threading.Barrier(threads)

    def work(index: int) -> None:
        own = memory[index * part : (index + 1) * part]
        for move, moved in _moves(own):
            gate.wait()
            rates[index] = max(rates[index], best_rate(move, moved, seconds=PASS_S))

    workers = [threading.Thread(target=work, args=(index,)) for index in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(rates)


def _moves(memory: np.ndarray[tuple[int], np.dtype[np.float32]]) -> list[tuple[Callable[[], object], float]]:
    """Give ways to go over some memory, each with the bytes that it reads and writes: copy, read, add in place.

    The last one adds one row to another many times in one call: in the first-level cache a call of its own for each
    pass would take longer than the pass.
    """
    half = len(memory) // 2
    source, target = memory[:half], memory[half : 2 * half]
    times = max(1, (1 << 22) // memory.nbytes)
    rows = as_strided(source, (times + 1, half), (0, 4))
    return [
        (lambda: np.copyto(target, source), 8.0 * half),
        (lambda: np.dot(source, target), 8.0 * half),
        (lambda: np.add.reduce(rows, axis=0, out=target), 12.0 * half * times),
    ]


def _amounts(host: Host) -> list[int]:
    """Give the amounts of data to measure bandwidth with: four times as much each, to twice the last-level cache."""
    largest = min(max(2 * _last_level_bytes(), 1 << 26), MOST_BYTES, host.memory_bytes // 8)
    sizes = [SMALLEST_BYTES]
    while sizes[-1] * 4 < largest:
        sizes.append(sizes[-1] * 4)
    return [*sizes, largest // 64 * 64] if largest > sizes[-1] else sizes


def _last_level_bytes() -> int:
    """Read the size of the largest cache, 32 MiB where the system does not tell."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    sizes = [1 << 25]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        if text[:-1].isdigit() and text[-1] in units:
            sizes.append(int(text[:-1]) * units[text[-1]])
    return max(sizes)


def _dtypes(host: Host) -> list[str]:
    """Name the dtypes to measure: bfloat16 only where the processor multiplies in it."""
    really = any(flag in host.flags for flag in ("avx512_bf16", "amx_bf16", "bf16"))
    return ["float32", "int8", *(["bfloat16"] if really else [])]


def _joined(found: list[Json], threads: int, fingerprint: str) -> Peaks:
    operations: dict[str, float] = {}
    for part in found:
        for dtype, rate in part["operations_per_s"].items():
            operations[dtype] = max(operations.get(dtype, 0.0), float(rate))
    # Half the width is at least as fast: an engine that lacks a kernel of its own can always widen.
    for narrow in ("bfloat16", "int8"):
        if narrow in operations:
            operations[narrow] = max(operations[narrow], operations["float32"])
    falling: dict[int, float] = {}
    for amount, rate in sorted(found[0]["bytes_per_s"], reverse=True):
        falling[int(amount)] = max(float(rate), *falling.values(), 0.0)
    cached = dict(sorted(falling.items()))
    memory = cached.pop(max(cached))
    return Peaks(
        threads=threads,
        operations_per_s=operations,
        bytes_per_s=memory,
        fingerprint=fingerprint,
        cached_bytes_per_s=cached,
    )


def _read(path: Path) -> Peaks | None:
    """Read kept peaks; None where there are none, they cannot be read, or the libraries have changed since."""
    try:
        kept = msgspec.json.decode(path.read_bytes(), type=_Kept)
    except (FileNotFoundError, msgspec.DecodeError):
        return None
    return kept.peaks if kept.versions == versions() else None
