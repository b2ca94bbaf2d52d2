"""What an instance tells the event loop: a run's outcome, that it is open, that it has ended, what it dropped."""

from __future__ import annotations

import msgspec
from msgspec.structs import replace

from hasten.errors import HastenError, ServerFault
from hasten.serve.batching import Batch
from hasten.serve.call import Piece
from hasten.serve.runner import Outputs
from hasten.serve.warm import Warm


class Ran(msgspec.Struct, frozen=True):
    """What came of a batch: outputs [size, ...], or the error; when the inputs were joined, and the run ended."""

    batch: Batch[Piece]
    outcome: Outputs | ServerFault
    idle_ns: int
    joined_ns: int
    ended_ns: int
    lost: bool = False
    """The runner cannot be used any more."""


class Begun(msgspec.Struct, frozen=True):
    """A batch whose run was begun, or could not be: why."""

    batch: Batch[Piece]
    idle_ns: int
    joined_ns: int
    fault: ServerFault | None = None
    lost: bool = False

    def behind(self, ended_ns: int) -> Begun:
        """Give it as it is once the run before it has ended: until then it was waiting, joined or not."""
        held_ns, batch = max(ended_ns - self.joined_ns, 0), self.batch
        if held_ns:
            batch = Batch(batch.entries, batch.rows, batch.size, batch.closed_ns + held_ns)
        return replace(self, batch=batch, idle_ns=ended_ns, joined_ns=self.joined_ns + held_ns)


class Opened(msgspec.Struct, frozen=True):
    """An instance is ready; ``found`` is what its ``prepare`` gave."""

    found: Warm


class Ended(msgspec.Struct, frozen=True):
    """An instance has ended: why it could not open, or None where it was told to end or was lost."""

    error: HastenError | None


class Dropped(msgspec.Struct, frozen=True):
    """Pieces whose deadline could not be met any more."""

    pieces: tuple[Piece, ...]


News = Ran | Opened | Ended | Dropped
