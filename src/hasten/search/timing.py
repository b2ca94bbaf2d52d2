"""Blocks timed in an engine, many in one child process, each measured once on a host and kept."""

from __future__ import annotations

import contextlib
import hashlib
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
import onnx
from onnx import TensorProto, helper

from hasten.engine import Engine, Session
from hasten.errors import ChildCrashed, ChildHung, HastenError, OutOfMemory, StoreError, Unsupported
from hasten.graph.blocks import Block, block_feed, block_model
from hasten.graph.model import write_model
from hasten.host import this_host, versions
from hasten.isolation import Child, Limits, Progress, Reply
from hasten.measure.latency import timed_runs, without_gc
from hasten.plan import Part, load_part
from hasten.store import Store, database, writing
from hasten.tensors import Array, Feed
from hasten.transform import Context

FILE = "blocks.sqlite"
"""The kept times, in the store's root."""

SCHEMA = "CREATE TABLE IF NOT EXISTS times (key TEXT PRIMARY KEY, ns REAL, reason TEXT)"

TOGETHER = 12
"""Blocks that take turns: what drifts on the machine in the meantime drifts for all of them."""

ROUNDS = 5
"""Slices of each block, far apart in time. The fastest counts: what else the machine does can only slow one down."""

SLICE_S = 0.012

WARM_RUNS = 3

FIXES = "batch"
"""The setting of engines that fixes an open axis."""

NOTHING = "nothing"
"""The graph that does nothing, among the keys of blocks."""


@dataclass(frozen=True)
class Times:
    """What was measured of blocks: nanoseconds by ``Block.key``, and the reasons of those that cannot run."""

    ns: Mapping[str, float]
    failures: Mapping[str, str]
    call_ns: float = 0.0
    """What a call of the engine takes that computes nothing; it is not in ``ns``."""


@dataclass(frozen=True)
class TimeStore:
    """The times of one engine, with its settings, on this host, with these versions; one file holds all of them."""

    path: Path
    scope: str

    @classmethod
    def open(cls, root: Path, engine: Part) -> TimeStore:
        """Open the file in a store's root, making it where there is none.

        Raises:
            StoreError: it cannot be read or written.
        """
        told = [engine.name, sorted(engine.settings.items()), this_host().fingerprint, sorted(versions().items())]
        kept = cls(root / FILE, hashlib.sha256(msgspec.json.encode(told)).hexdigest()[:16])
        with writing(kept.path):
            root.mkdir(parents=True, exist_ok=True)
        with kept._connected() as db:
            db.execute(SCHEMA)
        return kept

    def read(self, keys: Sequence[str]) -> Times:
        """Give what is kept of these blocks, and of a call."""
        ns: dict[str, float] = {}
        failures: dict[str, str] = {}
        with self._connected() as db:
            for key in dict.fromkeys((NOTHING, *keys)):
                row = db.execute("SELECT ns, reason FROM times WHERE key = ?", (f"{self.scope} {key}",)).fetchone()
                if row is not None and row[0] is not None:
                    ns[key] = float(row[0])
                elif row is not None:
                    failures[key] = str(row[1])
        call_ns = ns.pop(NOTHING, 0.0)
        return Times(ns, failures, call_ns)

    def keep(self, times: Times) -> None:
        """Keep times and reasons."""
        rows = [(f"{self.scope} {key}", ns, None) for key, ns in (*times.ns.items(), (NOTHING, times.call_ns))]
        lost = [(f"{self.scope} {key}", None, reason) for key, reason in times.failures.items()]
        with self._connected() as db:
            db.executemany("INSERT OR REPLACE INTO times VALUES (?, ?, ?)", [*rows, *lost])

    def _connected(self) -> AbstractContextManager[sqlite3.Connection]:
        return database(self.path, "delete it, times are measured again")


def time_blocks(
    blocks: Sequence[Block],
    engine: Part,
    store: Store,
    *,
    limits: Limits,
    deadline: Callable[[], bool] = lambda: False,
    progress: Progress | None = None,
) -> Times:
    """Give the time of one run of each block, measured here where the store does not know it.

    A block's time is the least over slices of the median over runs, less that of a graph which does nothing: what the
    engine takes for a call as such is not the block's. A block that the engine refuses is a failure with its reason;
    one that ends the child too, and the next child goes on behind it.

    Args:
        blocks: What to time; of those with one key, one.
        engine: With its settings: threads, precision. A batch that it fixes is none of a block, which has no open axis.
        store: Its root holds the kept times, and scratch space.
        limits: Of the child; its processors decide on how many the blocks run.
        deadline: Asked before each batch of ``TOGETHER`` blocks; True ends it with what is known.
        progress: Told how far it is.

    Raises:
        StoreError: the disk fails. HastenError: the engine cannot even run the graph that does nothing.
    """
    engine = Part(engine.name, {name: value for name, value in engine.settings.items() if name != FIXES})
    kept = TimeStore.open(store.root, engine)
    wanted = {block.key: block for block in blocks}
    found = kept.read(list(wanted))
    ns, failures, call_ns = dict(found.ns), dict(found.failures), found.call_ns
    left = [block for key, block in wanted.items() if key not in ns and key not in failures]
    with contextlib.ExitStack() as stack:
        child: Child | None = None
        for start in range(0, len(left), TOGETHER):
            if deadline():
                break
            if progress:
                progress(f"timing {len(left)} kinds of blocks", start / len(left))
            batch = left[start : start + TOGETHER]
            if child is None:
                child = stack.enter_context(_start(engine, store, limits))
            try:
                made = _timed(child, batch)
            except StoreError:
                raise
            except HastenError:  # one of them crashed it, or hung: each in a child of its own tells which
                made = _one_by_one(batch, engine, store, limits)
                child = None
            call_ns = call_ns or made.call_ns
            kept.keep(replace(made, call_ns=call_ns))
            ns |= made.ns
            failures |= made.failures
    return Times(ns, failures, call_ns)


class BlockWorker:
    """What runs in the child: an engine, and a few blocks open at a time.

    Raises:
        HastenError: the engine cannot run the graph that does nothing.
    """

    def __init__(self, *, engine: str, store: str) -> None:
        self._engine: Engine = load_part("engine", msgspec.json.decode(engine, type=Part))
        self._store = Store(Path(store))
        self._sessions: dict[str, tuple[Session, Feed]] = {
            NOTHING: self._open(_nothing(), {"x": np.zeros(1, np.float32)})
        }

    def open(self, block: str) -> None:
        """Build and load one block (JSON of ``Block``). Raises what the engine does."""
        read = msgspec.json.decode(block, type=Block)
        self._sessions[read.key] = self._open(block_model(read), block_feed(read))

    def slices(self, rounds: int, seconds: float) -> Reply:
        """Run every open block and ``NOTHING`` in turns, and close them; array KEY [rounds] holds medians in ns."""
        found: dict[str, list[float]] = {key: [] for key in self._sessions}
        order = np.random.default_rng(0)
        with without_gc():
            for _ in range(rounds):
                for key in order.permutation(list(found)):
                    session, feed = self._sessions[str(key)]
                    session.run(feed)  # the others had the caches
                    times = timed_runs(lambda s=session, f=feed: s.run(f), seconds)  # type: ignore[misc]
                    found[str(key)].append(float(np.median(times)))
        for key in [key for key in self._sessions if key != NOTHING]:
            self._sessions.pop(key)[0].close()
        return Reply(rounds, {key: np.array(values) for key, values in found.items()})

    def _open(self, model: onnx.ModelProto, feed: dict[str, Array]) -> tuple[Session, Feed]:
        with self._store.scratch() as folder:
            (folder / "graph").mkdir()
            (folder / "built").mkdir()
            source = write_model(model, folder / "graph")
            quiet = Context(folder=folder / "built", samples=None, seed=0, progress=lambda text, share: None)
            if reason := self._engine.why_not(source):
                raise Unsupported(self._engine.name, reason)
            session = self._engine.open(self._engine.apply(source, quiet))
            for _ in range(WARM_RUNS):
                session.run(feed)
        return session, feed


def _start(engine: Part, store: Store, limits: Limits) -> Child:
    return Child.start(
        "hasten.search.timing:BlockWorker",
        limits=limits,
        engine=msgspec.json.encode(engine).decode(),
        store=str(store.root),
    )


def _timed(child: Child, blocks: Sequence[Block]) -> Times:
    failures: dict[str, str] = {}
    for block in blocks:
        try:
            child.call("open", block=msgspec.json.encode(block).decode())
        except HastenError as error:
            if isinstance(error, (StoreError, ChildCrashed, ChildHung, OutOfMemory)):
                raise
            failures[block.key] = f"{type(error).__name__}: {error}"
    slices = child.call("slices", rounds=ROUNDS, seconds=SLICE_S).arrays
    least = {key: float(each.astype(np.float64).min()) for key, each in slices.items()}
    nothing = least.pop(NOTHING)
    return Times({key: max(ns - nothing, 0.0) for key, ns in least.items()}, failures, nothing)


def _one_by_one(blocks: Sequence[Block], engine: Part, store: Store, limits: Limits) -> Times:
    ns: dict[str, float] = {}
    failures: dict[str, str] = {}
    call_ns = 0.0
    for block in blocks:
        with _start(engine, store, limits) as child:
            try:
                made = _timed(child, [block])
            except StoreError:
                raise
            except HastenError as error:
                failures[block.key] = f"{type(error).__name__}: {error}"
            else:
                ns |= made.ns
                failures |= made.failures
                call_ns = made.call_ns
    return Times(ns, failures, call_ns)


def _nothing() -> onnx.ModelProto:
    """Make the smallest graph there is: its run is what an engine takes for any."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"], name="nothing")], "nothing", ends[:1], ends[1:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
