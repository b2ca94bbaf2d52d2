"""The regions of system shared memory that clients have registered. Off unless the server is told.

A region is read and written by ``pread`` and ``pwrite`` on its file, not mapped: a client that cuts the file short, or
goes on writing, can neither kill this process nor change a tensor after it was checked. That is one copy, which a batch
makes anyway.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from hasten.errors import BadRequest
from hasten.protocol.binary_tensors import Buffer
from hasten.protocol.shared_memory import Place

FOLDER = Path("/dev/shm")  # noqa: S108 - where Linux keeps what shm_open makes
KEY = re.compile(r"/?([A-Za-z0-9_.-]{1,250})")
"""What a key may be: one name, with or without the slash that ``shm_open`` wants before it."""

MOST_REGIONS = 1024
LONGEST_NAME = 256

OFF = "shared memory is not enabled on this server; start it with --shared-memory"


@dataclass(frozen=True, kw_only=True)
class Region:
    """A piece of a client's shared memory, open while it is registered."""

    name: str
    key: str
    offset: int
    size_bytes: int
    file: int
    """The descriptor."""

    def json(self) -> dict[str, str | int]:
        """Give it as the extension has it."""
        return {"name": self.name, "key": self.key, "offset": self.offset, "byte_size": self.size_bytes}


class SharedMemory:
    """The registered regions, by name. Every method on the event loop's thread."""

    def __init__(self, *, largest_bytes: int, folder: Path = FOLDER) -> None:
        self.largest_bytes = largest_bytes
        self._folder = folder
        self._regions: dict[str, Region] = {}

    def register(self, name: str, key: str, *, offset: int, size_bytes: int) -> None:
        """Open a region.

        Raises:
            BadRequest: there is no such shared memory, or it is smaller, or the name is taken.
        """
        if name in self._regions:
            raise BadRequest(f"region {name!r} is registered already; unregister it first")
        if not name or len(name) > LONGEST_NAME or not name.isprintable():
            raise BadRequest(f"{name[:LONGEST_NAME]!r} is no name of a region")
        if len(self._regions) >= MOST_REGIONS:
            raise BadRequest(f"{MOST_REGIONS} regions are registered, the limit; unregister some")
        if not 0 <= offset < 2**63 or not 0 < size_bytes < 2**63:
            raise BadRequest(f"region {name!r} has offset {offset} and byte_size {size_bytes}; it has a byte or more")
        file = self._open(key)
        held = os.fstat(file)
        problem = None
        if not stat.S_ISREG(held.st_mode):
            problem = f"the key {key!r} is no shared memory"
        elif offset + size_bytes > held.st_size:
            problem = f"the shared memory {key!r} has {held.st_size} bytes; the region ends at {offset + size_bytes}"
        if problem is not None:
            os.close(file)
            raise BadRequest(problem)
        self._regions[name] = Region(name=name, key=key, offset=offset, size_bytes=size_bytes, file=file)

    def unregister(self, name: str | None) -> None:
        """Close a region, or all. One that is not there is none the less gone."""
        for each in [*self._regions] if name is None else [name]:
            region = self._regions.pop(each, None)
            if region is not None:
                os.close(region.file)

    def status(self, name: str | None) -> list[Region]:
        """Give the regions, or one. Raises BadRequest."""
        return [*self._regions.values()] if name is None else [self._region(name)]

    def read(self, place: Place) -> memoryview:
        """Give a copy of what lies there; see ``protocol.shared_memory.Regions``."""
        region = self._found(place)
        data = bytearray(place.size_bytes)
        view, at = memoryview(data), 0
        while at < len(data):
            try:
                count = os.preadv(region.file, [view[at:]], region.offset + place.offset + at)
            except OSError as error:
                raise BadRequest(f"region {place.region!r} cannot be read: {error.strerror}") from error
            if not count:
                raise BadRequest(f"region {place.region!r} has become smaller than it was when it was registered")
            at += count
        return view

    def write(self, place: Place, data: Buffer) -> None:
        """Write there; see ``protocol.shared_memory.Regions``."""
        region, view = self._found(place), memoryview(data).cast("B")
        if len(view) > place.size_bytes:
            raise BadRequest(
                f"an output of {len(view)} bytes does not fit its {place.size_bytes} bytes of region {place.region!r}"
            )
        if os.fstat(region.file).st_size < region.offset + place.offset + len(view):
            raise BadRequest(f"region {place.region!r} has become smaller than it was when it was registered")
        at = 0
        while at < len(view):
            try:
                at += os.pwrite(region.file, view[at:], region.offset + place.offset + at)
            except OSError as error:  # a file with holes, and no memory left to fill them
                raise BadRequest(f"region {place.region!r} cannot be written: {error.strerror}") from error

    def _found(self, place: Place) -> Region:
        region = self._region(place.region)
        if place.offset + place.size_bytes > region.size_bytes:
            raise BadRequest(
                f"region {place.region!r} has {region.size_bytes} bytes; {place.size_bytes} were asked for from "
                f"{place.offset} on"
            )
        return region

    def _region(self, name: str) -> Region:
        region = self._regions.get(name)
        if region is None:
            raise BadRequest(f"no region is registered as {name[:LONGEST_NAME]!r}")
        return region

    def _open(self, key: str) -> int:
        known = KEY.fullmatch(key)
        if known is None or known[1] in (".", ".."):
            raise BadRequest(f"{key[:LONGEST_NAME]!r} is no key of shared memory; it is a name as shm_open takes it")
        try:
            # Not blocking: a pipe that someone laid there must not hold the server up.
            flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
            return os.open(self._folder / known[1], flags)
        except OSError as error:
            raise BadRequest(f"the shared memory {key!r} cannot be opened: {error.strerror}") from error
