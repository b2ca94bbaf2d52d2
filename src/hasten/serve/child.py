"""A session in a child process: tensors in memory that both share, a few bytes over a pipe for each run, no pickle.

A slot is a part of an anonymous file (memfd) that both map: inputs in its first part, outputs in the second, each sized
from the signature. A run writes its inputs there once, sends where they lie, and waits for where the outputs lie; these
are copied out, since a later run takes the slot again. There are two slots: while one run goes on the next is written
into the other and waits in the pipe, so that the child does not wait for its parent in between.
``hasten.isolation.Child`` sends arrays through its pipe and looks at the child's memory for each call: right for
builds, too slow for requests of microseconds.

A descriptor is its length (4 bytes, little-endian), then MessagePack.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import select
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from hasten import registry
from hasten.artifact import Artifact
from hasten.deployment import Deployment
from hasten.engine import Engine
from hasten.errors import BuildFailed, ChildCrashed, HastenError, Unsupported
from hasten.isolation import PYTHON, die_with_parent, python_path
from hasten.plan import Part, load_part
from hasten.serve.runner import Ahead
from hasten.store import read_artifact
from hasten.tensors import DTYPES, Array, Feed, TensorSpec

ALIGN = 64
"""Bytes at whose multiples arrays begin: a cache line."""

OPEN_SLOT_BYTES = 64 << 20
"""Size of a slot's part where open axes leave it untold; its memory is taken only as far as it is written."""

START_S = 120.0
"""How long a child may take to load its model."""

SLOTS = 2
"""Runs that a child may have at once: one that goes on, and one that waits for it."""

LONGEST_BYTES = 1 << 20
"""A longer descriptor is none."""


class Start(msgspec.Struct, frozen=True):
    """What a child is told first."""

    model: str
    engine: str
    settings: dict[str, Any]
    input_bytes: int
    output_bytes: int
    plugins: list[tuple[registry.Kind, str, registry.Entry]]


class Where(msgspec.Struct, frozen=True, array_like=True):
    """Where an array lies in its part of the slot."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int


class Run(msgspec.Struct, frozen=True, array_like=True):
    """A run that is asked for: its slot, and where the inputs lie there."""

    slot: int
    inputs: list[Where]


class Answer(msgspec.Struct, frozen=True):
    """What a run gave: where the outputs lie, or why there are none."""

    outputs: list[Where] = []
    error: str | None = None


@dataclass(frozen=True)
class Region:
    """One part of the slot: memory in which arrays are laid one after the other."""

    buffer: memoryview

    def array(self, where: Where) -> Array:
        """Give an array as a view."""
        dtype = DTYPES[where.dtype]
        count = math.prod(where.shape)
        return np.frombuffer(self.buffer, dtype, count=count, offset=where.offset).reshape(where.shape)

    def place(self, name: str, shape: tuple[int, ...], *, dtype: str, after: int) -> Where:
        """Find room behind ``after``.

        Raises:
            BuildFailed: there is not enough.
        """
        offset = -(-after // ALIGN) * ALIGN
        needed = offset + math.prod(shape) * DTYPES[dtype].itemsize
        if needed > len(self.buffer):
            raise BuildFailed(
                "shared memory", f"{name!r} of shape {list(shape)} needs {needed} bytes; raise serving.slot_bytes"
            )
        return Where(name, dtype, shape, offset)

    def end(self, where: Where) -> int:
        """Give the offset behind an array."""
        return where.offset + math.prod(where.shape) * DTYPES[where.dtype].itemsize


def part_bytes(specs: tuple[TensorSpec, ...], *, rows: int, told: int | None) -> int:
    """Give the size of a part that holds ``specs`` with ``rows`` on their first axis.

    Raises:
        Unsupported: a tensor holds text, which has no fixed size.
    """
    for spec in specs:
        if spec.dtype == "string":
            raise Unsupported("isolation", f"{spec.name!r} holds text, which has no fixed size; use isolation 'thread'")
    if told is not None:
        return told
    if any(isinstance(dim, str) for spec in specs for dim in spec.shape[1:]):
        return OPEN_SLOT_BYTES
    shapes = [
        (spec, (rows if isinstance(spec.shape[0], str) else spec.shape[0], *spec.shape[1:]))
        for spec in specs
        if spec.shape
    ]
    sizes = [math.prod(d for d in shape if isinstance(d, int)) * DTYPES[spec.dtype].itemsize for spec, shape in shapes]
    return sum(-(-size // ALIGN) * ALIGN for size in sizes) + ALIGN * len(specs)


def input_bytes(deployment: Deployment, artifact: Artifact, largest: int) -> int:
    """Give the size of a slot's first part. Raises Unsupported, as ``part_bytes`` does."""
    return part_bytes(artifact.signature.inputs, rows=largest, told=deployment.serving.slot_bytes)


class ChildRunner:
    """A session in a process of its own. Start it with ``start``; the thread that does must outlive it."""

    copies = True
    lends = False

    def __init__(
        self, process: subprocess.Popen[bytes], pipes: tuple[int, int], slots: list[tuple[Region, Region]]
    ) -> None:
        self._process = process
        self.thread = process.pid
        self._to_child, self._from_child = pipes
        self._slots = slots
        self._at = 0
        """The slot of the next run."""
        self._begun: deque[int] = deque()
        """Slots of the runs that were begun, the oldest first."""
        self._placed: dict[str, tuple[Where, Array]] = {}
        self._end = 0

    @classmethod
    def start(cls, deployment: Deployment, artifact: Artifact, *, largest: int) -> ChildRunner:
        """Start a process and load the model there.

        Raises:
            Unsupported: its tensors cannot be shared. ChildCrashed: it did not come up. BuildFailed: it says why.
        """
        outputs = part_bytes(artifact.signature.outputs, rows=largest, told=deployment.serving.slot_bytes)
        sizes = [input_bytes(deployment, artifact, largest), outputs]
        memory = os.memfd_create("hasten-slot")
        os.ftruncate(memory, SLOTS * sum(sizes))
        (to_read, to_write), (from_read, from_write) = os.pipe(), os.pipe()
        try:
            with _deaf():
                process = subprocess.Popen(
                    [*PYTHON, "hasten.serve.child", str(to_read), str(from_write), str(memory)],
                    stdin=subprocess.DEVNULL,
                    stdout=2,
                    pass_fds=(to_read, from_write, memory),
                    env={**os.environ, "PYTHONPATH": python_path()},
                    start_new_session=True,
                )
        except OSError as error:
            for fd in (to_read, to_write, from_read, from_write, memory):
                os.close(fd)
            raise ChildCrashed("worker", f"no process can be started: {error.strerror or error}") from error
        slots = _mapped(memory, *sizes)
        for fd in (to_read, from_write, memory):
            os.close(fd)
        runner = cls(process, (to_write, from_read), slots)
        start = Start(
            model=str(artifact.folder.resolve()),
            engine=deployment.engine,
            settings=deployment.settings,
            input_bytes=sizes[0],
            output_bytes=sizes[1],
            plugins=registry.registered(),
        )
        try:
            runner._tell(msgspec.msgpack.encode(start))
            runner._hear(START_S)
        except HastenError:
            runner.close()
            raise
        return runner

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._process.pid

    @property
    def ahead(self) -> Ahead:
        """Itself: it has two slots."""
        return self

    def buffer(self, name: str, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> Array:
        """Give an input's place in the slot of the next run. Raises BuildFailed where it does not fit."""
        if name in self._placed:
            self._forget()
        inputs, _ = self._slots[self._at]
        where = inputs.place(name, shape, dtype=dtype.name, after=self._end)
        self._end = inputs.end(where)
        array = inputs.array(where)
        self._placed[name] = where, array
        return array

    def run(self, feed: Feed) -> dict[str, Array]:
        """Run once in the child. Raises ChildCrashed and BuildFailed, as ``begin`` and ``finish`` do."""
        self.begin(feed)
        return self.finish()

    def begin(self, feed: Feed) -> None:
        """Send a run off. Inputs that do not lie in its slot yet are copied there.

        Raises:
            ChildCrashed: the child died.
        """
        if any(name not in self._placed or self._placed[name][1] is not array for name, array in feed.items()):
            self._forget()
            for name, array in feed.items():
                self.buffer(name, array.shape, array.dtype)[...] = array
        run = Run(self._at, [where for where, _ in self._placed.values()])
        self._forget()
        self._tell(msgspec.msgpack.encode(run))
        self._begun.append(self._at)
        self._at = (self._at + 1) % len(self._slots)

    def finish(self) -> dict[str, Array]:
        """Wait for the oldest run that was begun; its outputs are copies.

        Raises:
            ChildCrashed: the child died. BuildFailed: what its session raised.
        """
        _, outputs = self._slots[self._begun.popleft()]
        return {where.name: outputs.array(where).copy() for where in self._hear(None).outputs}

    def answers_within(self, seconds: float) -> bool:
        """Wait for an answer for so long; True also where the child has gone."""
        return bool(_events(self._from_child, seconds))

    def alive(self) -> bool:
        """Say whether the child can be asked: it has not closed its pipe. From any thread."""
        answers = self._from_child  # once: another thread may close it meanwhile
        return self._to_child >= 0 and answers >= 0 and not _events(answers, 0.0) & ~select.POLLIN

    def kill(self) -> None:
        """Kill the child: a run in it ends with ``ChildCrashed``."""
        self._process.kill()

    def close(self) -> None:
        """End the child. Closing twice is fine."""
        if self._to_child >= 0:
            pipes = self._to_child, self._from_child
            self._to_child = self._from_child = -1  # first: nobody may ask a number that is another file's by then
            self._process.kill()
            self._process.wait()
            for fd in pipes:
                os.close(fd)

    def _forget(self) -> None:
        self._placed = {}
        self._end = 0

    def _tell(self, message: bytes) -> None:
        try:
            _send(self._to_child, message)
        except OSError as error:
            raise self._gone(error) from error

    def _hear(self, timeout_s: float | None) -> Answer:
        try:
            if timeout_s is not None and not _events(self._from_child, timeout_s):
                self.kill()
            reply = _receive(self._from_child)
        except OSError as error:
            raise self._gone(error) from error
        if reply is None:
            code = self._process.wait()
            how = f"died of {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
            raise ChildCrashed("worker", f"its process {how}")
        answer = msgspec.msgpack.decode(reply, type=Answer)
        if answer.error is not None:
            raise BuildFailed("worker", answer.error)
        return answer

    def _gone(self, error: OSError) -> ChildCrashed:
        return ChildCrashed("worker", f"its pipe broke: {error.strerror or error}")


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    """Let a child that is started meanwhile hear no signal that tells a server to end: it ends with its server.

    Service managers signal every process of a service, and a server that is told to end still needs its workers.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT, signal.SIGHUP))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _events(fd: int, timeout_s: float) -> int:
    """Wait for something to read, or for the other side to close; 0 where neither came. Poll objects are not shared."""
    ears = select.poll()
    ears.register(fd, select.POLLIN)
    return sum(event for _, event in ears.poll(timeout_s * 1000))


def _mapped(memory: int, input_bytes: int, output_bytes: int) -> list[tuple[Region, Region]]:
    """Give the slots: inputs and outputs of each."""
    size = input_bytes + output_bytes
    whole = memoryview(mmap.mmap(memory, SLOTS * size))
    parts = [whole[at * size : (at + 1) * size] for at in range(SLOTS)]
    return [(Region(part[:input_bytes]), Region(part[input_bytes:])) for part in parts]


def _send(fd: int, message: bytes) -> None:
    left = memoryview(len(message).to_bytes(4, "little") + message)
    while left:
        left = left[os.write(fd, left) :]


def _receive(fd: int) -> bytes | None:
    """Read one descriptor, and nothing of the next; None where the other side has closed."""
    head = _read(fd, 4)
    if head is None:
        return None
    size = int.from_bytes(head, "little")
    if size > LONGEST_BYTES:
        raise OSError(f"a descriptor of {size} bytes")
    return _read(fd, size)


def _read(fd: int, size: int) -> bytes | None:
    data = b""
    while len(data) < size:
        got = os.read(fd, size - len(data))
        if not got:
            return None
        data += got
    return data


def _serve(requests: int, replies: int, memory: int) -> None:
    """Run in the child: load the model, then run what is asked until the parent closes its end."""
    die_with_parent()
    first = _receive(requests)
    if first is None:
        return
    start = msgspec.msgpack.decode(first, type=Start)
    for kind, name, entry in start.plugins:
        registry.register(kind, name, entry)
    slots = _mapped(memory, start.input_bytes, start.output_bytes)
    try:
        engine: Engine = load_part("engine", Part(start.engine, start.settings))
        session = engine.open(read_artifact(Path(start.model)))
    except HastenError as error:
        _send(replies, msgspec.msgpack.encode(Answer(error=str(error))))
        return
    _send(replies, msgspec.msgpack.encode(Answer()))
    while (message := _receive(requests)) is not None:
        run = msgspec.msgpack.decode(message, type=Run)
        inputs, outputs = slots[run.slot]
        feed = {where.name: inputs.array(where) for where in run.inputs}
        try:
            answer = Answer(outputs=_written(session.run(feed), outputs))
        except Exception as error:  # noqa: BLE001 - whatever a plug-in's session raises is told to the parent
            text = " ".join(str(error).split())[:2000]
            answer = Answer(error=text if isinstance(error, HastenError) else f"{type(error).__name__}: {text}")
        _send(replies, msgspec.msgpack.encode(answer))


def _written(results: Mapping[str, Array], part: Region) -> list[Where]:
    places, end = [], 0
    for name, array in results.items():
        where = part.place(name, array.shape, dtype=array.dtype.name, after=end)
        part.array(where)[...] = array
        places.append(where)
        end = part.end(where)
    return places


if __name__ == "__main__":
    # The module must be ``hasten.serve.child`` for those who import it, not a second copy called ``__main__``.
    from hasten.serve.child import _serve as serve

    serve(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
