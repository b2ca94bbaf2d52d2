"""How long requests may have waited to be read."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

import pytest
import uvloop

from hasten.serve.turns import Turns


class Loop:
    """What an event loop calls, turn by turn."""

    def __init__(self) -> None:
        self.ready: list[Callable[[], object]] = []

    def call_soon(self, function: Callable[[], object]) -> None:
        self.ready.append(function)

    def turn(self) -> None:
        """Call what is ready; sockets are read after it."""
        ready, self.ready = self.ready, []
        for function in ready:
            function()


def watched() -> tuple[Turns, Loop]:
    turns, loop = Turns(), Loop()
    turns.watch(loop)  # type: ignore[arg-type]
    return turns, loop


def test_what_is_read_late_in_a_turn_has_waited_since_its_beginning() -> None:
    turns, _ = watched()
    turns.reads(100)
    assert turns.waited_ns(100) == 0
    turns.reads(130)
    assert turns.waited_ns(140) == 40


def test_what_is_read_behind_a_busy_turn_may_have_waited_since_that_ones_beginning() -> None:
    turns, loop = watched()
    turns.reads(100)
    loop.turn()
    turns.reads(150)  # asked again at once
    assert turns.waited_ns(155) == 55
    loop.turn()
    turns.reads(190)
    assert turns.waited_ns(190) == 40


def test_where_the_loop_slept_nothing_has_waited() -> None:
    turns, loop = watched()
    turns.reads(100)
    loop.turn()
    loop.turn()  # asked again, and nothing was there: the loop sleeps
    assert not loop.ready
    turns.reads(900)
    assert turns.waited_ns(900) == 0


def test_where_the_loop_may_have_waited_for_its_core_what_is_read_may_have_waited_as_long() -> None:
    turns, loop = watched()
    turns.reads(100)
    loop.turn()
    loop.turn()  # it sleeps
    turns.unseen_ns = 50
    turns.reads(900)
    assert (turns.waited_ns(910), turns.maybe_ns) == (10, 50)
    loop.turn()
    assert turns.maybe_ns == 0, "the turn is over"
    loop.turn()
    turns.reads(930)
    assert (turns.waited_ns(930), turns.maybe_ns) == (0, 30), "it was awake at 900"
    loop.turn()
    turns.reads(940)
    assert (turns.waited_ns(940), turns.maybe_ns) == (10, 0), "it has not slept"


def test_outside_of_a_turn_nothing_is_said() -> None:
    turns, loop = watched()
    turns.reads(100)
    loop.turn()
    assert turns.waited_ns(500) == 0


def test_turns_that_nobody_watches_leave_nothing_to_call() -> None:
    turns = Turns()
    turns.reads(100)
    assert turns.waited_ns(500) == 0


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_a_real_loop_tells_a_busy_turn_from_one_that_it_slept_before(
    new_loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    """Three sockets: the second has something by the end of the first one's turn, the third once the loop sleeps."""
    told: list[int] = []

    async def work() -> None:
        loop, turns, done = asyncio.get_running_loop(), Turns(), asyncio.Event()
        turns.watch(loop)
        pairs = [socket.socketpair() for _ in range(3)]

        def read(at: int) -> None:
            loop.remove_reader(pairs[at][0])
            turns.reads(1000 * at)
            told.append(turns.waited_ns(1000 * at))
            if at == 0:
                pairs[1][1].send(b"x")
            elif at == 1:
                loop.call_later(0.02, pairs[2][1].send, b"x")
            else:
                done.set()

        for at, (ours, _) in enumerate(pairs):
            loop.add_reader(ours, read, at)
        pairs[0][1].send(b"x")
        await done.wait()
        for pair in pairs:
            for end in pair:
                end.close()

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(work())
    assert told == [0, 1000, 0]
