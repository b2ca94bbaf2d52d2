"""What a server's processes got of the processor while they were under load, sampled where they are on this host.

Threads' time on a core and in the queue for one is read from /proc (``schedstat``), throttling from the server's own
cgroup (``cpu.stat``, version 2 or 1), stolen time from the machine. What the system does not tell is -1.
"""

from __future__ import annotations

import contextlib
import io
import os
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil

from hasten.errors import StoreError
from hasten.load.run import Ints
from hasten.store import write_atomically

EVERY_S = 0.02
"""A fifth of the cgroup's usual period: one throttled period is seen, and sampling takes about a per cent of a core."""

FILE = "host.npy"
LARGEST_BYTES = 256 << 20
FAMILY_EVERY = 100
"""Looking for the server's children reads all of /proc, so it is done once in so many samples."""

TICK_NS = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
"""In which a process's own count of its time goes."""

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")

COLUMNS = ("at_unix_ns", "cpu_ns", "waiting_ns", "throttled_ns", "steal_ns", "rss_bytes", "cores")


@dataclass(frozen=True, kw_only=True)
class HostSamples:
    """Columns [m], ascending in time; all but the first and the last count from the processes' or machine's start."""

    at_unix_ns: Ints
    cpu_ns: Ints
    """Time on a core, of all threads of all processes of the server."""
    waiting_ns: Ints
    """Time that threads could have run and had no core."""
    throttled_ns: Ints
    """Time that the server's cgroup was held back for its quota."""
    steal_ns: Ints
    """Time that the hypervisor gave to others, of all cores."""
    rss_bytes: Ints
    cores: Ints
    """Cores that the server may run on."""

    def spent(self, column: str, first_unix_ns: int, last_unix_ns: int) -> float | None:
        """Give how much a column grew between two times, by straight lines between samples; None: not known."""
        values = getattr(self, column)
        if len(values) < 2 or values[0] < 0 or last_unix_ns <= first_unix_ns:
            return None
        at = self.at_unix_ns
        if first_unix_ns < at[0] or last_unix_ns > at[-1]:
            return None
        ends = np.interp([first_unix_ns, last_unix_ns], at, values)
        return float(ends[1] - ends[0])

    def held_back(self, first_unix_ns: int, last_unix_ns: int) -> float | None:
        """Give for how long threads waited for a core that others had, between two times; None: not known.

        A server that keeps all of its cores busy itself has threads that wait for each other: that is its own load.
        """
        waiting = self.spent("waiting_ns", first_unix_ns, last_unix_ns)
        worked = self.spent("cpu_ns", first_unix_ns, last_unix_ns)
        if waiting is None or worked is None:
            return None
        free_ns = float(self.cores[0]) * (last_unix_ns - first_unix_ns) - worked
        return min(waiting, max(free_ns, 0.0))

    @property
    def cores_used(self) -> float | None:
        """The server's mean number of cores kept busy."""
        passed = self._passed_ns()
        return None if passed is None or self.cpu_ns[0] < 0 else float(self.cpu_ns[-1] - self.cpu_ns[0]) / passed

    @property
    def throttled_share(self) -> float | None:
        """The share of the time in which the server's cgroup was held back."""
        passed = self._passed_ns()
        if passed is None or self.throttled_ns[0] < 0:
            return None
        return float(self.throttled_ns[-1] - self.throttled_ns[0]) / passed

    @property
    def waiting_share(self) -> float | None:
        """Time that the server's threads waited for a core, over the time that passed."""
        passed = self._passed_ns()
        if passed is None or self.waiting_ns[0] < 0:
            return None
        return float(self.waiting_ns[-1] - self.waiting_ns[0]) / passed

    @property
    def peak_rss_bytes(self) -> int | None:
        """The most resident memory that was seen."""
        return int(self.rss_bytes.max()) if len(self.rss_bytes) and self.rss_bytes[0] >= 0 else None

    def _passed_ns(self) -> float | None:
        return float(self.at_unix_ns[-1] - self.at_unix_ns[0]) if len(self.at_unix_ns) > 1 else None


@dataclass
class Spent:
    """Nanoseconds on a core, and waiting for one, of processes whose threads come and go: both only ever rise.

    Each thread's growth since it was last seen is added up. What threads spent that lived between two samples alone is
    in the process's own count, which is coarser.
    """

    _threads: dict[Path, tuple[int, int]] = field(default_factory=dict)
    _grown: dict[int, int] = field(default_factory=dict)
    """By process: what its threads spent, as far as it was seen."""
    _unseen: dict[int, int] = field(default_factory=dict)
    """By process: what its own count is ahead of that from the start."""
    _most: dict[int, int] = field(default_factory=dict)
    """By process: what it spent so far."""
    _waiting: int = 0
    _told: bool = True

    def until_now(self, processes: Sequence[psutil.Process]) -> tuple[int, int]:
        """Give both so far; -1 each where this system does not tell."""
        for process in processes:
            pid = process.pid
            grown, waited = self._of_threads(pid)
            self._grown[pid] = so_far = self._grown.get(pid, 0) + grown
            self._waiting += waited
            with contextlib.suppress(psutil.NoSuchProcess):
                told = process.cpu_times()
                whole = int((told.user + told.system) * 1e9)
                unseen = self._unseen.setdefault(pid, whole - so_far)
                so_far = max(so_far, whole - unseen - TICK_NS)
            self._most[pid] = max(self._most.get(pid, 0), so_far)
        return (sum(self._most.values()), self._waiting) if self._told else (-1, -1)

    def _of_threads(self, pid: int) -> tuple[int, int]:
        cpu = waiting = 0
        try:
            tasks = list((PROC / str(pid) / "task").iterdir())
        except OSError:
            return 0, 0  # it has just ended
        for task in tasks:
            try:
                on_core, queued, _ = (int(each) for each in (task / "schedstat").read_text().split())
            except ProcessLookupError:
                continue
            except FileNotFoundError:
                self._told = self._told and not task.exists()  # a thread that has ended, or no such file here at all
                continue
            except (OSError, ValueError):
                self._told = False
                continue
            was = self._threads.get(task, (0, 0))
            self._threads[task] = (on_core, queued)
            cpu += max(on_core - was[0], 0)
            waiting += max(queued - was[1], 0)
        return cpu, waiting


@dataclass
class Sampling:
    """Samples as they come; ``samples()`` gives those so far."""

    pid: int
    _rows: list[tuple[int, ...]] = field(default_factory=list)
    _family: list[psutil.Process] = field(default_factory=list)
    _spent: Spent = field(default_factory=Spent)

    def take(self) -> bool:
        """Take one sample; False where the process is gone. A child that is gone is left out from then on."""
        try:
            if len(self._rows) % FAMILY_EVERY == 0:
                server = psutil.Process(self.pid)
                self._family = [server, *server.children(recursive=True)]
            rss, seen = 0, set()
            for process in list(self._family):
                try:
                    rss += process.memory_info().rss
                    seen.update(process.cpu_affinity())
                except psutil.NoSuchProcess:
                    if process.pid == self.pid:
                        return False
                    self._family.remove(process)
        except (psutil.Error, OSError):
            return False
        cores = len(seen)
        cpu, waiting = self._spent.until_now(self._family)
        steal = getattr(psutil.cpu_times(), "steal", None)
        steal_ns = -1 if steal is None else int(steal * 1e9)
        self._rows.append((time.time_ns(), cpu, waiting, _throttled_ns(self.pid), steal_ns, rss, cores))
        return True

    def samples(self) -> HostSamples:
        """Give what was sampled so far."""
        table = np.array(self._rows, np.int64).reshape(-1, len(COLUMNS))
        return HostSamples(**dict(zip(COLUMNS, table.T, strict=True)))


@contextlib.contextmanager
def sampling(pid: int, *, every_s: float = EVERY_S) -> Iterator[Sampling]:
    """Sample a process and its children in a thread of its own while the block runs."""
    found = Sampling(pid)
    stop = threading.Event()

    def work() -> None:
        while found.take() and not stop.wait(every_s):
            continue

    thread = threading.Thread(target=work, name="host samples", daemon=True)
    thread.start()
    try:
        yield found
    finally:
        stop.set()
        thread.join()


def _throttled_ns(pid: int) -> int:
    """Read how long the process's cgroup was held back so far; -1 where it is not told."""
    try:
        lines = (PROC / str(pid) / "cgroup").read_text().splitlines()
    except OSError:
        return -1
    for line in lines:
        _, controllers, place = line.split(":", 2)
        names = controllers.split(",")
        if controllers == "" or "cpu" in names:
            found = _read_stat(CGROUPS / ("cpu" if "cpu" in names else "") / place.lstrip("/") / "cpu.stat")
            if found >= 0:
                return found
    return -1


def _read_stat(path: Path) -> int:
    try:
        pairs = dict(line.split(maxsplit=1) for line in path.read_text().splitlines() if " " in line)
    except OSError:
        return -1
    if "throttled_usec" in pairs:
        return int(pairs["throttled_usec"]) * 1000
    return int(pairs.get("throttled_time", -1))


def write_host(samples: HostSamples, folder: Path) -> Path:
    """Write samples beside a record of load. Raises StoreError: the disk cannot be written."""
    table = np.stack([getattr(samples, name) for name in COLUMNS])
    held = io.BytesIO()
    np.lib.format.write_array(held, table, allow_pickle=False)
    write_atomically(folder / FILE, held.getvalue())
    return folder / FILE


def read_host(folder: Path) -> HostSamples | None:
    """Read samples that ``write_host`` wrote; None where there are none.

    Raises:
        StoreError: they are damaged, or too large.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        if path.stat().st_size > LARGEST_BYTES:
            raise StoreError(f"{path} has {path.stat().st_size} bytes, more than the {LARGEST_BYTES} that are read")
        table = np.lib.format.read_array(io.BytesIO(path.read_bytes()), allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise StoreError(f"{path} cannot be read: {error}") from error
    if table.dtype != np.int64 or table.ndim != 2 or len(table) != len(COLUMNS):
        raise StoreError(f"{path} is damaged: it holds {table.dtype} {list(table.shape)}; measure again")
    return HostSamples(**dict(zip(COLUMNS, table, strict=True)))
