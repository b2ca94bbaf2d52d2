"""Work in a child process, with a time and a memory limit.

Runtimes leak, crash, pin threads and hold memory, so no build and no measurement happens in the user's process.
A child runs ``module:Class`` of an installed package; calls go to its methods as JSON frames with raw arrays
behind them, over two private pipes. Nothing is pickled. When the parent dies, however it dies, so does the child.

A frame is: length of the header (8 bytes, little-endian), the header in JSON, then each array's bytes.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import msgspec
import numpy as np
import psutil

from hasten import errors, registry
from hasten.artifact import Json
from hasten.host import this_host
from hasten.tensors import Array

MEMORY_POLL_S = 0.25
"""How often a child's memory is looked at while it works: rare enough not to disturb a measurement."""

PYTHON = (sys.executable, "-P", "-m")
"""What runs a module as another process: a file that lies in the current folder is not imported for a library."""

EXIT_S = 5.0
"""How long a child may take to end once it has closed its pipes."""

Progress = Callable[[str, float | None], None]
"""Called with what is being done and, where it is known, the share that is finished (0 to 1)."""


TRAINING_S = 30 * 86400.0
"""The limit of a call that trains, where there is no budget: it shows its progress and can be interrupted."""


def python_path() -> str:
    """Give the ``PYTHONPATH`` by which a child finds what this process does."""
    return os.pathsep.join(str(Path(path).absolute()) for path in sys.path)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a child may use. Its memory is four fifths of this machine's unless told.

    ``cpus`` are the processors it is pinned to; None leaves them as they are.
    """

    seconds: float = 600.0
    memory_bytes: int | None = None
    cpus: tuple[int, ...] | None = None

    @property
    def threads(self) -> int | None:
        """One thread a processor, or None where it is not pinned."""
        return len(self.cpus) if self.cpus else None


@dataclass(frozen=True)
class Reply:
    """What a method of the child gave back."""

    value: Json
    arrays: dict[str, Array] = field(default_factory=dict)


class Child:
    """A live child process. Use ``Child.start`` as a context manager. One thread at a time.

    The thread that starts it must outlive it: on Linux the child dies with its parent's thread.
    """

    def __init__(self, process: subprocess.Popen[bytes], pipes: tuple[IO[bytes], IO[bytes]], log: IO[bytes]) -> None:
        self._process = process
        self._requests, self._replies = pipes
        self._log = log
        self._limits = Limits()

    @classmethod
    def start(cls, target: str, /, *, limits: Limits | None = None, **settings: Json) -> Child:
        """Start a process that makes ``target`` ("module:Class") with ``settings``.

        Raises:
            ChildCrashed, ChildHung, OutOfMemory: it did not come up.
            HastenError: what the class itself raised, as the same class.
        """
        limits = limits or Limits()
        if limits.memory_bytes is None:
            limits = replace(limits, memory_bytes=this_host().memory_bytes * 4 // 5)
        request_read, request_write = os.pipe()
        reply_read, reply_write = os.pipe()
        log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the child
        threads = str(limits.threads or "")
        pinned = {name: threads for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS") if threads}
        process = subprocess.Popen(
            [*PYTHON, "hasten.isolation", str(request_read), str(reply_write)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=(request_read, reply_write),
            env={**os.environ, **pinned, "PYTHONPATH": python_path()},
            start_new_session=True,
        )
        os.close(request_read)
        os.close(reply_write)
        child = cls(process, (os.fdopen(request_write, "wb"), os.fdopen(reply_read, "rb", buffering=0)), log)
        child._limits = limits
        try:
            child.call(
                "__start__",
                target=target,
                settings=settings,
                cpus=list(limits.cpus or ()),
                plugins=[[kind, name, msgspec.to_builtins(entry)] for kind, name, entry in registry.registered()],
            )
        except BaseException:
            child.close()
            raise
        return child

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._process.pid

    def call(
        self,
        method: str,
        /,
        *,
        arrays: Mapping[str, Array] | None = None,
        timeout_s: float | None = None,
        progress: Progress | None = None,
        **params: Json,
    ) -> Reply:
        """Call a method of the child's object with ``params``, and ``arrays`` where there are any.

        Raises:
            ChildCrashed: the process died; the message has the signal and the last line it printed.
            ChildHung: no answer within the time limit. OutOfMemory: it went over its memory limit.
            HastenError: what the method raised, as the same class; anything else it raised is a BuildFailed.
        """
        if self._requests.closed:
            raise errors.ChildCrashed(method, "the child process has ended before; start another")
        deadline = time.monotonic() + (timeout_s or self._limits.seconds)
        try:
            write_frame(self._requests, {"method": method, "params": params}, arrays or {})
        except BrokenPipeError:
            raise self._crashed(method) from None
        while True:
            header, got = self._read_reply(method, deadline)
            if header["kind"] == "progress":
                if time.monotonic() > deadline:
                    raise self._hung(method)
                if progress:
                    progress(header["text"], header["share"])
                continue
            if header["kind"] == "error":
                raise _error_from(header, step=method)
            return Reply(header["value"], got)

    def _read_reply(self, method: str, deadline: float) -> tuple[dict[str, Any], dict[str, Array]]:
        self._check_memory(method)  # a child that reports progress all the time never comes to the loop
        while not select.select([self._replies], [], [], MEMORY_POLL_S)[0]:
            if time.monotonic() > deadline:
                raise self._hung(method)
            self._check_memory(method)
        frame = read_frame(self._replies)
        if frame is None:
            raise self._crashed(method)
        return frame

    def _check_memory(self, method: str) -> None:
        limit = self._limits.memory_bytes
        if limit is None:
            return
        try:
            used = psutil.Process(self.pid).memory_info().rss
        except psutil.NoSuchProcess:
            return
        if used > limit:
            self.close()
            raise errors.OutOfMemory(
                method, f"it took {used / 2**20:.0f} MiB of memory, more than the limit of {limit / 2**20:.0f} MiB"
            )

    def _hung(self, method: str) -> errors.ChildHung:
        self.close()
        return errors.ChildHung(method, "no answer within its time limit; it was stopped")

    def _crashed(self, method: str) -> errors.ChildCrashed:
        try:
            code = self._process.wait(timeout=EXIT_S)
        except subprocess.TimeoutExpired:  # it has closed its pipes and hangs on its way out
            self._process.kill()
            code = self._process.wait()
        how = f"died of {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
        self._log.seek(0)
        lines = [line for line in self._log.read().decode(errors="replace").splitlines() if line.strip()]
        last = f"; its last line: {lines[-1].strip()[:300]}" if lines else ""
        self.close()
        return errors.ChildCrashed("start" if method == "__start__" else method, f"the child process {how}{last}")

    def close(self) -> None:
        """End the child and whatever it started. Closing twice is fine."""
        for pipe in (self._requests, self._replies):
            with contextlib.suppress(OSError):
                pipe.close()
        if not self._log.closed:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)  # also what a child that is dead already has started
            self._process.wait()
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def run_isolated(
    target: str, /, *, limits: Limits | None = None, progress: Progress | None = None, **params: Json
) -> Json:
    """Call the function ``target`` ("module:function") once, in a child of its own.

    The function takes ``params`` and gives back a value that JSON can hold. Raises as ``Child.call`` does.
    """
    with Child.start("hasten.isolation:FunctionCall", limits=limits, target=target) as child:
        return child.call("run", progress=progress, **params).value


class FunctionCall:
    """What ``run_isolated`` starts in the child."""

    def __init__(self, target: str) -> None:
        self._function = _resolve(target)

    def run(self, **params: Json) -> Json:
        """Call the function."""
        return self._function(**params)


def report_progress(text: str, share: float | None = None) -> None:
    """Tell the parent what is being done. Outside a child it does nothing."""
    if _to_parent is not None:
        write_frame(_to_parent, {"kind": "progress", "text": text, "share": share}, {})


def write_frame(pipe: IO[bytes], header: Mapping[str, Json], arrays: Mapping[str, Array]) -> None:
    """Write one frame."""
    whole = {name: np.asarray(array, order="C") for name, array in arrays.items()}  # keeps a scalar a scalar
    for name, array in whole.items():
        if array.dtype.hasobject or array.dtype.names:
            raise errors.Unsupported("isolation", f"array {name!r} holds {array.dtype}; use a plain, fixed-width dtype")
    described = [[name, _dtype_code(array.dtype), list(array.shape)] for name, array in whole.items()]
    encoded = msgspec.json.encode({**header, "arrays": described})
    pipe.write(len(encoded).to_bytes(8, "little") + encoded)
    for array in whole.values():
        if array.nbytes:
            pipe.write(array.reshape(-1).view(np.uint8).data)
    pipe.flush()


def _dtype_code(dtype: np.dtype[Any]) -> str:
    """Name a dtype so that ``np.dtype`` understands it: "<f4" tells the byte order, but of bfloat16 only the size."""
    return dtype.name if dtype.kind == "V" else dtype.str


def read_frame(pipe: IO[bytes]) -> tuple[dict[str, Any], dict[str, Array]] | None:
    """Read one frame, or None where the other side has closed."""
    length = _read_exactly(pipe, 8)
    if length is None:
        return None
    encoded = _read_exactly(pipe, int.from_bytes(length, "little"))
    if encoded is None:
        return None
    header = msgspec.json.decode(encoded)
    arrays: dict[str, Array] = {}
    for name, dtype_name, shape in header.pop("arrays"):
        dtype = np.dtype(dtype_name)
        data = _read_exactly(pipe, int(np.prod(shape, dtype=np.int64)) * dtype.itemsize)
        if data is None:
            return None
        arrays[name] = np.frombuffer(data, dtype=dtype).reshape(shape)
    return header, arrays


def _read_exactly(pipe: IO[bytes], size: int) -> bytearray | None:
    data = bytearray(size)
    view, at = memoryview(data), 0
    while at < size:
        got = pipe.readinto(view[at:])  # type: ignore[attr-defined]
        if not got:
            return None
        at += got
    return data


def _error_from(header: Mapping[str, Any], *, step: str) -> errors.HastenError:
    cls = getattr(errors, header["class"], None)
    if not (isinstance(cls, type) and issubclass(cls, errors.HastenError)):
        return errors.BuildFailed(step, f"{header['class']}: {header['message']}")
    error = cls.__new__(cls)
    Exception.__init__(error, header["message"])
    error.__dict__.update(header["fields"])
    return error


def _resolve(target: str) -> Any:
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


_to_parent: IO[bytes] | None = None


def _serve(request_fd: int, reply_fd: int) -> None:
    """Run in the child: answer calls until the parent closes its end."""
    global _to_parent
    die_with_parent()
    requests, replies = os.fdopen(request_fd, "rb", buffering=0), os.fdopen(reply_fd, "wb")
    _to_parent = replies
    owner: Any = None
    while (frame := read_frame(requests)) is not None:
        header, arrays = frame
        try:
            if header["method"] == "__start__":
                owner, result = _make(header["params"]), None
            else:
                extra = {"arrays": arrays} if arrays else {}
                result = getattr(owner, header["method"])(**header["params"], **extra)
            reply = result if isinstance(result, Reply) else Reply(result)
            write_frame(replies, {"kind": "result", "value": reply.value}, reply.arrays)
        except Exception as error:  # noqa: BLE001 - every failure is told to the parent, which raises it there
            if not isinstance(error, errors.HastenError):
                traceback.print_exc()
            described = {"class": type(error).__name__, "message": _one_line(error), "fields": _json_fields(error)}
            write_frame(replies, {"kind": "error", **described}, {})


def _make(start: Mapping[str, Any]) -> Any:
    if start["cpus"]:
        os.sched_setaffinity(0, start["cpus"])
    for kind, name, entry in start["plugins"]:
        registry.register(kind, name, msgspec.convert(entry, registry.Entry))
    return _resolve(start["target"])(**start["settings"])


def die_with_parent() -> None:
    """Ask Linux to kill this process when its parent dies, so that a killed search leaves nothing behind."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:2000] or type(error).__name__


def _json_fields(error: BaseException) -> dict[str, Json]:
    return {key: value for key, value in vars(error).items() if isinstance(value, str | int | float | None)}


if __name__ == "__main__":
    # The module must be ``hasten.isolation`` for those who import it, not a second copy called ``__main__``.
    from hasten.isolation import _serve as serve

    serve(int(sys.argv[1]), int(sys.argv[2]))
