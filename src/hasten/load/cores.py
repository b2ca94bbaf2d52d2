"""Where generators run: away from the server, where this machine has the cores for that."""

from __future__ import annotations

import contextlib
import os

import psutil

from hasten.load.target import Target


def cores_for(processes: int, target: Target) -> tuple[int, ...] | None:
    """Give a core for each generator, the last ones of this process's, none that a pinned local server has.

    None where that would leave no core for anybody else: the system shares them out then.
    """
    if not hasattr(os, "sched_getaffinity"):
        return None
    usable = sorted(os.sched_getaffinity(0))
    taken = server_cores(target)
    free = [core for core in usable if core not in taken] if taken and set(usable) - taken else usable
    if processes > len(free) or processes >= len(usable):
        return None
    return tuple(free[-processes:])


def away_from_server(cores: tuple[int, ...], target: Target) -> bool:
    """Say whether the server surely runs elsewhere: on another machine, or pinned to other cores of this one."""
    if target.protocol == "session":
        return False
    taken = server_cores(target)
    return not taken & set(cores) if taken else not _is_here(target)


def server_cores(target: Target) -> set[int]:
    """Give the cores of a server on this machine, where that can be seen; else none."""
    found: set[int] = set()
    for pid in _server_pids(target):
        with contextlib.suppress(psutil.AccessDenied, psutil.NoSuchProcess):
            found |= set(psutil.Process(pid).cpu_affinity())
    return found


def server_pid(target: Target) -> int | None:
    """Give the process on this machine that listens where a target points; None: it is elsewhere, or not to be seen."""
    return min(_server_pids(target), default=None)


def _server_pids(target: Target) -> set[int]:
    if not _is_here(target):
        return set()
    try:
        listening = [one for one in psutil.net_connections("tcp") if one.status == psutil.CONN_LISTEN]
    except psutil.AccessDenied:
        return set()
    port = target.address.port
    return {one.pid for one in listening if one.pid is not None and one.laddr and one.laddr[1] == port}


def _is_here(target: Target) -> bool:
    if target.protocol == "session":
        return False
    own = {address.address for addresses in psutil.net_if_addrs().values() for address in addresses}
    return target.address.host in own | {"localhost", "127.0.0.1", "::1"}
