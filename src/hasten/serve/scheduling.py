"""How the threads of a server are scheduled: their policy, and the length of their slices.

Since Linux 6.12 a thread of a usual policy may ask for slices of 0.1 to 100 ms (sched_setattr(2), ``sched_runtime``).
One that asks for longer ones is interrupted less often, and gets no more of the core. Older systems take no notice.
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import sys
import threading
from functools import cache
from typing import Protocol

logger = logging.getLogger(__name__)

TICK_NS = 4_000_000
"""Linux looks this often, with its usual clock, whether a slice is over. Its own slices are shorter."""

CALLS = {"x86_64": (314, 315), "aarch64": (274, 275), "riscv64": (274, 275)}
"""The numbers of sched_setattr and sched_getattr, by machine: the C library of most systems does not have them."""


class Attributes(ctypes.Structure):
    """``struct sched_attr``, as its first version has it."""

    _fields_ = (
        ("size", ctypes.c_uint32),
        ("policy", ctypes.c_uint32),
        ("flags", ctypes.c_uint64),
        ("nice", ctypes.c_int32),
        ("priority", ctypes.c_uint32),
        ("runtime_ns", ctypes.c_uint64),
        ("deadline_ns", ctypes.c_uint64),
        ("period_ns", ctypes.c_uint64),
    )


_SET, _GET = CALLS.get(platform.machine(), (0, 0)) if sys.platform == "linux" else (0, 0)


@cache
def _libc() -> ctypes.PyDLL:
    """Give the C library, which is called with the interpreter's lock held: such a call takes a microsecond."""
    return ctypes.PyDLL(None, use_errno=True)


def _call(number: int, thread: int, attributes: Attributes, *more: int) -> None:
    words = [ctypes.c_long(word) for word in (number, thread)]
    rest = [ctypes.c_ulong(word) for word in more]
    if _libc().syscall(*words, ctypes.byref(attributes), *rest) != 0:
        failed = ctypes.get_errno()
        raise OSError(failed, os.strerror(failed))


def slice_of(thread: int = 0) -> int:
    """Give the length of a thread's slices in nanoseconds, 0 where it cannot be set; thread 0: the calling one."""
    if not _GET:
        return 0
    found = Attributes()
    try:
        _call(_GET, thread, found, ctypes.sizeof(found), 0)
    except OSError:  # an old system, or a sandbox
        return 0
    return int(found.runtime_ns)


def schedule(thread: int, policy: int, slice_ns: int = 0) -> None:
    """Give a thread one of the usual policies, and slices of that length; 0: they stay. Its nice value stays.

    Raises:
        OSError: the system does not allow it.
    """
    if not slice_ns or not _SET:
        os.sched_setscheduler(thread, policy, os.sched_param(0))
        return
    nice = os.getpriority(os.PRIO_PROCESS, thread)
    wanted = Attributes(ctypes.sizeof(Attributes), policy, 0, nice, 0, slice_ns, 0, 0)
    _call(_SET, thread, wanted, 0)


class Scheduler(Protocol):
    """How the threads of a server are scheduled. Lengths are in nanoseconds; 0: as the system does."""

    def yields(self, slice_ns: int) -> int:
        """Let the event loop's thread yield to slices of that length; give how long it may have to wait for one.

        0 where the system lets nobody yield.
        """

    def insists(self) -> bool:
        """Let it yield no more; False where that failed."""

    def gives(self, thread: int, slice_ns: int) -> None:
        """Let a thread that runs a model have slices of that length."""


class Unchanged:
    """Threads are scheduled as they are: they belong to somebody else's program."""

    def yields(self, slice_ns: int) -> int:
        """Yield to nobody."""
        return 0

    def insists(self) -> bool:
        """It does."""
        return True

    def gives(self, thread: int, slice_ns: int) -> None:
        """Give nothing."""


class OwnThreads:
    """Schedules the threads of a process that is a server's own. Made in the event loop's thread."""

    def __init__(self, usual: int) -> None:
        self._loop = threading.get_native_id()
        self._usual = usual
        """The policy of all of them."""
        self._usual_ns = slice_of(self._loop)

    def yields(self, slice_ns: int) -> int:
        """Yield, see ``Scheduler``."""
        wanted_ns = max(slice_ns, self._usual_ns) if self._usual_ns else 0
        if not self._scheduled(self._loop, os.SCHED_BATCH, wanted_ns):
            return 0
        return -(-max(wanted_ns, 1) // TICK_NS) * TICK_NS

    def insists(self) -> bool:
        """Yield no more."""
        return self._scheduled(self._loop, self._usual, self._usual_ns)

    def gives(self, thread: int, slice_ns: int) -> None:
        """Give slices of at least the usual length to a thread that nobody else has given a policy."""
        wanted_ns = max(slice_ns, self._usual_ns)
        if not self._usual_ns or slice_of(thread) == wanted_ns:
            return
        try:
            foreign = os.sched_getscheduler(thread) != self._usual
        except OSError as error:
            logger.debug("the slices of thread %d are left as they are: %s", thread, error)
            return
        if not foreign:
            self._scheduled(thread, self._usual, wanted_ns)

    def _scheduled(self, thread: int, policy: int, slice_ns: int) -> bool:
        try:
            schedule(thread, policy, slice_ns)
        except OSError as error:  # a sandbox may forbid it
            logger.debug("the scheduling of thread %d is left as it is: %s", thread, error)
            return False
        return True


def own_threads() -> Scheduler:
    """Make the scheduler of this process, in the event loop's thread. A policy that somebody has set is left alone."""
    if not hasattr(os, "SCHED_BATCH"):
        return Unchanged()
    try:
        usual = os.sched_getscheduler(0)
    except OSError:  # a sandbox may forbid to ask
        return Unchanged()
    return OwnThreads(usual) if usual == os.SCHED_OTHER else Unchanged()
