"""Where generators run: away from the server, where this machine has the cores for that."""

from __future__ import annotations

import os

import psutil

from hasten.load.target import Target

LOCAL = ("localhost", "127.0.0.1", "::1")


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
    return not taken & set(cores) if taken else target.address.host not in LOCAL


def server_cores(target: Target) -> set[int]:
    """Give the cores of a server on this machine, where that can be seen; else none."""
    if target.protocol == "session" or target.address.host not in LOCAL:
        return set()
    found: set[int] = set()
    try:
        for connection in psutil.net_connections("tcp"):
            listens = connection.status == psutil.CONN_LISTEN and connection.laddr[1:] == (target.address.port,)
            if listens and connection.pid is not None:
                found |= set(psutil.Process(connection.pid).cpu_affinity())
    except (psutil.AccessDenied, psutil.NoSuchProcess):
        return set()
    return found
