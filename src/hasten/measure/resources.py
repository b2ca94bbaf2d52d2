"""What this process takes: resident memory now and at its peak, and threads."""

from __future__ import annotations

import resource
from pathlib import Path

import psutil

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def rss_bytes() -> int:
    """Read the resident memory of this process."""
    return int(psutil.Process().memory_info().rss)


def peak_rss_bytes() -> int:
    """Read the largest resident memory of this process so far, or since ``forget_peak``."""
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return max(int(line.split()[1]) * 1024, rss_bytes())  # the kernel updates VmHWM lazily
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB on Linux


def forget_peak() -> bool:
    """Set the peak back to what is resident now (man proc_pid_clear_refs, value 5). False where that is not allowed."""
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


def threads_now() -> int:
    """Count the threads of this process."""
    return int(psutil.Process().num_threads())
