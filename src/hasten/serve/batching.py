"""Which requests run together, and when: a pure data structure driven by the times it is given.

Requests wait by shape (only equal shapes of the other axes can share a run), in the order of priority, then of the
time they are due, then of arrival: earliest deadline first. A batch closes when it is full, when waiting would miss
the earliest time due, or when waiting would not pay. With an idle instance and ``w`` rows waiting, going now finishes
them at t(w), and the row that comes after ``gap`` at max(gap, t(w)) + t(1); waiting for it finishes all w + 1 at
gap + t(w + 1). Whichever has the smaller sum of finishing times is done. That is a look one arrival ahead, repeated
at each arrival; the hope is given up when nothing came for two gaps, since clients that wait for their answers send
nothing meanwhile.

t(n) is learnt from runs alone, so what it makes nobody run would never be learnt anew: once a slowdown has passed, a
request that looks hopeless is run all the same where nothing else is, and a size that is passed over is tried again.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterable, Sequence
from typing import Final, Generic, TypeVar

from hasten.serve.costs import CostCurve
from hasten.tensors import Feed

NEVER: Final = (1 << 62) - 1
"""A time in nanoseconds that does not come: the largest number that compiled code keeps in a machine word."""

GAP_WEIGHT: Final = 0.125
"""Share of a new gap between arrivals in the running average."""

TRIED_AGAIN: Final = 16
"""A full batch that would take longer for each row than a smaller one runs all the same, one time in so many."""

LONGEST_GAP_NS: Final = 1_000_000_000
"""A longer pause says no more than that nothing comes."""


class Entry:
    """Rows that wait together: one request, or a piece of a large one. Only those with the same ``key`` share a run.

    ``n_bytes``: of the feed, as the bounds of the queue count it.
    """

    def __init__(
        self, feed: Feed, rows: int, key: Hashable, arrived_ns: int, priority: int = 1, n_bytes: int = 0
    ) -> None:
        self.feed = feed
        self.rows = rows
        self.key = key
        self.arrived_ns = arrived_ns
        self.priority = priority
        self.n_bytes = n_bytes
        self.due_ns = NEVER
        """When its answer is wanted."""
        self.deadline_ns = NEVER
        """When its answer becomes useless."""
        self.waiting = False


E = TypeVar("E", bound=Entry)
_Heap = list[tuple[int, int, int, E]]
"""(priority, due, arrival number, entry): the number is unique, so entries are never compared."""


class Batch(Generic[E]):
    """Entries that run together, in order; ``size`` is the allowed size that ``rows`` are padded to."""

    def __init__(self, entries: Sequence[E], rows: int, size: int, closed_ns: int) -> None:
        self.entries = entries
        self.rows = rows
        self.size = size
        self.closed_ns = closed_ns


class Taken(Generic[E]):
    """What a look at the queue gave: a batch, or None and when to look again unless something arrives.

    ``dropped``: entries whose deadline is over, or cannot be met by t(n) even if they ran next: they wait no more.
    """

    def __init__(self, batch: Batch[E] | None, again_ns: int, dropped: Sequence[E] = ()) -> None:
        self.batch = batch
        self.again_ns = again_ns
        self.dropped = dropped


class Batcher(Generic[E]):
    """The entries that wait. One thread at a time.

    ``waits``: it may hold a batch open for arrivals; else it batches only what is already there.
    """

    def __init__(self, costs: CostCurve, *, waits: bool = False) -> None:
        self.costs = costs
        self.waits = waits
        self.rows = 0
        self.n_bytes = 0
        self._rows_at: dict[int, int] = {}
        self._heaps: dict[Hashable, _Heap[E]] = {}
        self._arrivals = 0
        self._gone = 0
        self._last_ns = 0
        self._gap_ns = float(LONGEST_GAP_NS)
        self._passed_over = 0
        """Full batches for which a smaller one was taken."""

    def put(self, entry: E, now_ns: int) -> None:
        """Add an entry of at most ``costs.largest`` rows."""
        entry.waiting = True
        due, rows, priority = entry.due_ns, entry.rows, entry.priority
        if entry.deadline_ns < due:
            due = entry.deadline_ns
        heap = self._heaps.get(entry.key)
        if heap is None:
            heap = self._heaps[entry.key] = []
        self._arrivals = number = self._arrivals + 1
        heapq.heappush(heap, (priority, due, number, entry))
        self.rows += rows
        self.n_bytes += entry.n_bytes
        self._rows_at[priority] = self._rows_at.get(priority, 0) + rows
        if self.waits:
            gap = min(now_ns - self._last_ns, LONGEST_GAP_NS)
            self._gap_ns += GAP_WEIGHT * (gap - self._gap_ns)
            self._last_ns = now_ns

    def remove(self, entry: E) -> bool:
        """Drop an entry that still waits; False where it does not."""
        if not entry.waiting:
            return False
        self._leave(entry)
        entry.feed = {}  # the heap holds the entry for a while: not its arrays
        self._gone += 1
        if self._gone > 64 and self._gone > self._waiting():
            self._compact()
        return True

    def take(self, now_ns: int) -> Taken[E]:
        """Close a batch for an instance that is idle, or say when to look again."""
        if len(self._heaps) == 1 and not self.waits:
            (alone,) = self._heaps.values()
            if len(alone) == 1 and alone[0][1] == NEVER and alone[0][3].waiting:  # the usual case where little comes
                entry = alone.pop()[3]
                self._leave(entry)
                return Taken(Batch((entry,), entry.rows, self.costs.padded(entry.rows), now_ns), NEVER)
        return self._choose(now_ns)

    def _choose(self, now_ns: int) -> Taken[E]:
        dropped: list[E] = []
        heap = self._most_urgent(now_ns, dropped)
        if heap is None:
            return self._all_hopeless(dropped, now_ns)
        slots = self._fit(heap, now_ns, dropped)
        chosen = [slot[3] for slot in slots]
        if len(slots) > 1 or self.waits:  # else there is nothing to choose
            count, again_ns = self._close(chosen, heap, now_ns)
            if count < len(slots):
                for slot in slots[count:]:
                    heapq.heappush(heap, slot)
                if not count:
                    return Taken(None, again_ns, dropped)
                del chosen[count:]
        rows = 0
        for entry in chosen:
            rows += entry.rows
            self._leave(entry)
        return Taken(Batch(chosen, rows, self.costs.padded(rows), now_ns), NEVER, dropped)

    def expire(self, now_ns: int) -> list[E]:
        """Drop every entry whose deadline is over, wherever it waits."""
        late = [e for e in self._entries() if e.deadline_ns <= now_ns]
        for entry in late:
            self.remove(entry)
        return late

    def arrived_before(self, before_ns: int) -> list[E]:
        """Drop every entry that arrived earlier than that."""
        early = [entry for entry in self._entries() if entry.arrived_ns < before_ns]
        for entry in early:
            self.remove(entry)
        return early

    def empty(self) -> list[E]:
        """Drop every entry."""
        left = list(self._entries())
        for entry in left:
            self._leave(entry)
        self._heaps.clear()
        self._gone = 0
        return left

    def next_deadline_ns(self) -> int:
        """Give the earliest deadline of those that wait, or ``NEVER``."""
        return min((entry.deadline_ns for entry in self._entries()), default=NEVER)

    def rows_ahead(self, priority: int) -> int:
        """Count the rows that go before a new entry of ``priority``, deadlines aside."""
        return sum(rows for level, rows in self._rows_at.items() if level <= priority)

    def _all_hopeless(self, dropped: list[E], now_ns: int) -> Taken[E]:
        """Run the one with the most time left where all look hopeless: it tells whether they still are."""
        last = max(dropped, key=lambda entry: entry.deadline_ns, default=None)
        if last is None or last.deadline_ns <= now_ns:
            return Taken(None, NEVER, dropped)
        batch = Batch([last], last.rows, self.costs.padded(last.rows), now_ns)
        return Taken(batch, NEVER, [entry for entry in dropped if entry is not last])

    def _fit(self, heap: _Heap[E], now_ns: int, dropped: list[E]) -> list[tuple[int, int, int, E]]:
        """Pop those that may run together, in order, and stop at the first that does not fit: nobody overtakes."""
        slots: list[tuple[int, int, int, E]] = []
        rows, earliest, largest = 0, NEVER, self.costs.largest
        while heap:
            _, due, _, entry = heap[0]
            if due != NEVER or not entry.waiting:
                if not self._trim(heap, now_ns, dropped):
                    break
                _, due, _, entry = heap[0]
            more = rows + entry.rows
            if due < earliest:
                earliest = due
            if more > largest or (earliest != NEVER and self._would_miss(earliest, now_ns, rows, entry)):
                break
            slots.append(heapq.heappop(heap))
            rows = more
        return slots

    def _would_miss(self, earliest_ns: int, now_ns: int, rows: int, entry: E) -> bool:
        """Say whether one more makes the batch miss a time that it would meet without."""
        if not rows:
            return False
        return now_ns + self.costs.ns(rows) <= earliest_ns < now_ns + self.costs.ns(rows + entry.rows)

    def _close(self, entries: list[E], heap: _Heap[E], now_ns: int) -> tuple[int, int]:
        """Give how many of ``entries`` go now, and where none does, when to look again."""
        best, best_rows, best_ns, rows = 0, 1, NEVER, 0
        for count, entry in enumerate(entries, 1):
            rows += entry.rows
            ns = self.costs.ns(rows)
            if ns * best_rows <= best_ns * rows:  # ns per row, without dividing; equal ones take more rows
                best, best_rows, best_ns = count, rows, ns
        if best < len(entries) and rows == self.costs.padded(rows):
            self._passed_over += 1
            if self._passed_over % TRIED_AGAIN == 0:
                best = len(entries)
        others = bool(heap) or len(self._heaps) > 1  # of another shape: they must not wait for a batch to fill
        if not self.waits or others or best < len(entries) or rows >= self.costs.largest:
            return best, NEVER
        until = self._wait_until(entries, rows)
        return (best, NEVER) if now_ns >= until else (0, until)

    def _wait_until(self, entries: list[E], rows: int) -> int:
        """Give the time until which waiting for another row pays; 0 where it does not."""
        gap, now, one, more = self._gap_ns, self.costs.ns(rows), self.costs.ns(1), self.costs.ns(rows + 1)
        if (rows + 1) * (gap + more) >= rows * now + max(gap, now) + one:
            return 0
        latest = min(min(e.due_ns, e.deadline_ns) for e in entries) - more
        return min(latest, self._last_ns + int(2 * gap))

    def _most_urgent(self, now_ns: int, dropped: list[E]) -> _Heap[E] | None:
        """Give the heap with the first entry of all; heaps without any that waits go."""
        best: _Heap[E] | None = None
        for key, heap in [*self._heaps.items()]:
            if not self._trim(heap, now_ns, dropped):
                del self._heaps[key]
            elif best is None or heap[0] < best[0]:
                best = heap
        return best

    def _trim(self, heap: _Heap[E], now_ns: int, dropped: list[E]) -> bool:
        """Drop what was removed or is hopeless from the head of a heap; False where nothing is left."""
        while heap:
            entry = heap[0][3]
            if not entry.waiting:
                self._gone -= 1
            elif entry.deadline_ns != NEVER and now_ns + self.costs.ns(entry.rows) > entry.deadline_ns:
                self._leave(entry)
                dropped.append(entry)
            else:
                return True
            heapq.heappop(heap)
        return False

    def _leave(self, entry: E) -> None:
        entry.waiting = False
        rows, priority = entry.rows, entry.priority
        self.rows -= rows
        self.n_bytes -= entry.n_bytes
        left = self._rows_at[priority] - rows
        if left:
            self._rows_at[priority] = left
        else:
            del self._rows_at[priority]

    def _entries(self) -> Iterable[E]:
        return [slot[3] for heap in self._heaps.values() for slot in heap if slot[3].waiting]

    def _waiting(self) -> int:
        return sum(len(heap) for heap in self._heaps.values()) - self._gone

    def _compact(self) -> None:
        for key, heap in list(self._heaps.items()):
            kept = [slot for slot in heap if slot[3].waiting]
            heapq.heapify(kept)
            self._heaps[key] = kept
        self._gone = 0
