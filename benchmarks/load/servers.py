"""Servers whose response times are known: one that answers at once, one that stalls by plan, one with a queue.

    python benchmarks/load/servers.py null|stall|queue --core 0

Each speaks just enough HTTP/1.1, prints its port, and at the end of its standard input prints what it did as JSON.
"""

import argparse
import asyncio
import json
import os
import sys
import threading
import time

import numpy as np
import uvloop

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


class Null(asyncio.Protocol):
    """Answers every request at once."""

    def connection_made(self, transport):
        self.transport = transport
        self.rest = b""

    def data_received(self, data):
        data = self.rest + data
        while (end := data.find(b"\r\n\r\n")) >= 0:
            place = data.lower().find(b"content-length:", 0, end)
            length = int(data[place + 15 : data.index(b"\r\n", place)]) if place >= 0 else 0
            if len(data) < end + 4 + length:
                break
            data = data[end + 4 + length :]
            self.answer()
        self.rest = data

    def answer(self):
        self.transport.write(ANSWER)


class Queue:
    """One worker, first come first served; each request takes what the next number of a fixed list says."""

    def __init__(self, loop, mean_s, seed=7):
        random = np.random.default_rng(seed)
        self.times_s = random.gamma(4.0, mean_s / 4, 1_000_000)
        self.free_s, self.k, self.loop = 0.0, 0, loop

    def protocol(self):
        queue = self

        class Queued(Null):
            def answer(self):
                now = time.monotonic()
                queue.free_s = max(queue.free_s, now) + queue.times_s[queue.k]
                queue.k += 1
                queue.loop.call_at(queue.free_s, self.transport.write, ANSWER)

        return Queued()


async def serve(asked):
    loop = asyncio.get_running_loop()
    made = Null
    told = {}
    if asked.kind == "queue":
        made = Queue(loop, asked.mean_ms / 1e3).protocol
    server = await loop.create_server(made, "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    over = asyncio.Event()
    if asked.kind == "stall":
        stalls = told["stalls_ns"] = []

        def stall(due_s):
            began = time.perf_counter_ns()
            time.sleep(asked.stall_ms / 1e3)  # the whole server, as a collection of garbage or a throttled core
            stalls.append((began, time.perf_counter_ns()))
            loop.call_at(due_s + asked.every_s, stall, due_s + asked.every_s)

        loop.call_later(asked.every_s, stall, loop.time() + asked.every_s)
    threading.Thread(target=lambda: (sys.stdin.read(), loop.call_soon_threadsafe(over.set)), daemon=True).start()
    await over.wait()
    print(json.dumps(told), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=("null", "stall", "queue"))
    parser.add_argument("--core", type=int)
    parser.add_argument("--stall-ms", type=float, default=200.0)
    parser.add_argument("--every-s", type=float, default=2.0)
    parser.add_argument("--mean-ms", type=float, default=2.0)
    told = parser.parse_args()
    if told.core is not None:
        os.sched_setaffinity(0, {told.core})
    loop = asyncio.new_event_loop() if told.kind == "queue" else uvloop.new_event_loop()
    if told.kind == "queue":  # uvloop's timers count milliseconds
        from hasten.load.clock import precise_loop

        loop.close()
        loop = precise_loop()
    loop.run_until_complete(serve(told))
