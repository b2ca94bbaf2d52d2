"""How Linux schedules a thread: its policy, and the length of its slices, which Python's own calls do not know.

Since Linux 6.12 a thread of a usual policy may ask for slices of 0.1 to 100 ms (sched_setattr(2), ``sched_runtime``).
One that asks for longer ones is interrupted less often, and gets no more of the core. Older systems take no notice.
"""

from __future__ import annotations

import ctypes
import os
import platform

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


def slice_ns(thread: int = 0) -> int:
    """Give the length of a thread's slices; 0 where it cannot be set. ``thread``: 0 for the calling one."""
    calls, found = CALLS.get(platform.machine()), Attributes()
    if calls is None or not hasattr(os, "sched_setscheduler"):
        return 0
    if ctypes.CDLL(None).syscall(calls[1], thread, ctypes.byref(found), ctypes.sizeof(found), 0):
        return 0
    return int(found.runtime_ns)


def schedule(thread: int, policy: int, slice_ns: int = 0) -> None:
    """Give a thread one of the usual policies and slices of that length; 0: the system's own. Its nice value stays.

    Raises:
        OSError: the system does not allow it.
    """
    calls = CALLS.get(platform.machine())
    if calls is None:  # Python's own call leaves slices as they are
        os.sched_setscheduler(thread, policy, os.sched_param(0))
        return
    nice = os.getpriority(os.PRIO_PROCESS, thread)
    wanted = Attributes(ctypes.sizeof(Attributes), policy, 0, nice, 0, slice_ns, 0, 0)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(calls[0], thread, ctypes.byref(wanted), 0):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
