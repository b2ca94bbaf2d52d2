"""The machine that a number was measured on: what it is, and how busy it was."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import platform
import resource
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil

INSTRUCTION_SETS = (
    *("avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_bf16", "amx_int8", "amx_fp16", "asimd", "asimddp", "i8mm", "bf16", "sve"),
)
"""The instruction-set flags that decide which kernels a runtime takes."""

DISTRIBUTIONS = ("hasten", "numpy", "onnx", "onnxruntime", "openvino", "torch")
"""The distributions whose versions travel with every number."""


@dataclass(frozen=True, kw_only=True)
class Host:
    """What does not change while the machine runs. ``quota`` is in cores: the cgroup's CPU limit, or None."""

    cpu: str
    flags: tuple[str, ...]
    cores: int
    quota: float | None
    memory_bytes: int
    system: str
    accelerators: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> str:
        """Twelve hex digits that differ where figures must not be compared: processor, flags, cores or quota."""
        parts = [self.cpu, *self.flags, str(self.cores), str(self.quota), *self.accelerators]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]

    @property
    def binding(self) -> str:
        """Twelve hex digits of what compiled code depends on: system, processor and flags, not how much of it."""
        parts = [self.system.split()[0], self.cpu, *self.flags, *self.accelerators]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]

    @property
    def usable_cores(self) -> int:
        """Whole cores that this process may keep busy, at least one."""
        return max(1, min(self.cores, int(self.quota) if self.quota else self.cores))


@dataclass(frozen=True, kw_only=True)
class Load:
    """How busy the machine was. Shares are of all cores, from 0 to 1."""

    load_average: float
    steal_share: float | None
    """Time that the hypervisor gave to others; None where the system cannot tell."""
    clock_mhz: float | None
    """Current clock; None where the system does not say."""


@dataclass(frozen=True)
class Ticks:
    """Processor time since boot, to take differences of."""

    total_s: float
    steal_s: float | None


@cache
def this_host() -> Host:
    """Describe this machine."""
    info = _cpuinfo()
    flags = set((info.get("flags") or info.get("Features") or "").split())
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Host(
        cpu=info.get("model name") or platform.processor() or platform.machine(),
        flags=tuple(name for name in INSTRUCTION_SETS if name in flags),
        cores=affinity,
        quota=_cgroup_quota(),
        memory_bytes=_memory_bytes(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        accelerators=_nvidia(),
    )


def ticks() -> Ticks:
    """Read the processor time spent so far."""
    times = psutil.cpu_times()
    return Ticks(total_s=sum(times[:8]), steal_s=getattr(times, "steal", None))


def load_since(start: Ticks) -> Load:
    """Say how busy the machine was since ``start``."""
    now = ticks()
    passed = max(now.total_s - start.total_s, 1e-9)
    steal = None if now.steal_s is None or start.steal_s is None else (now.steal_s - start.steal_s) / passed
    frequency = psutil.cpu_freq()
    return Load(
        load_average=psutil.getloadavg()[0],
        steal_share=steal,
        clock_mhz=frequency.current if frequency and frequency.current else None,
    )


def allow_files(wanted: int) -> int:
    """Let this process open ``wanted`` files at once, or as many as it may; give how many it may open now.

    Most systems start a process with 1,024, and let it have many more where it asks.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return sys.maxsize
    if soft < wanted and soft != hard:
        more = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with contextlib.suppress(OSError, ValueError):  # the system allows less than it says
            resource.setrlimit(resource.RLIMIT_NOFILE, (more, hard))
            return more
    return soft


@cache
def versions() -> dict[str, str]:
    """Give Python's version, and that of each distribution of ``DISTRIBUTIONS`` that is here."""
    found = {"python": platform.python_version()}
    for name in DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _cpuinfo() -> dict[str, str]:
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    lines = (line.partition(":") for line in path.read_text().split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in lines}


def _cgroup_quota() -> float | None:
    """Read the CPU limit in cores (cgroup v2's cpu.max, else v1's cfs quota)."""
    modern = Path("/sys/fs/cgroup/cpu.max")
    if modern.exists():
        quota, _, period = modern.read_text().strip().partition(" ")
        return None if quota == "max" else int(quota) / int(period)
    old = Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us")
    if old.exists():
        quota_us = int(old.read_text())
        return None if quota_us <= 0 else quota_us / int(old.with_name("cpu.cfs_period_us").read_text())
    return None


def _memory_bytes() -> int:
    total = psutil.virtual_memory().total
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        path = Path(name)
        if path.exists() and (text := path.read_text().strip()) != "max":
            return min(total, int(text))
    return total


def _nvidia() -> tuple[str, ...]:
    root = Path("/proc/driver/nvidia/gpus")
    if not root.exists():
        return ()
    models = []
    for card in sorted(root.iterdir()):
        lines = (card / "information").read_text().splitlines()
        models += [line.partition(":")[2].strip() for line in lines if line.startswith("Model:")]
    return tuple(models)
