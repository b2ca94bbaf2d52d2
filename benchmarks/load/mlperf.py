"""MLPerf's own LoadGen (PyPI: mlcommons-loadgen), server scenario, driving a URL; prints every latency as JSON.

    python benchmarks/load/mlperf.py http://127.0.0.1:PORT --qps 250 --seconds 15 --seed 0

Its queries go out over kept connections of http.client, from a pool of threads: nothing of hasten is in it.
"""

import argparse
import http.client
import json
import os
import queue
import tempfile
import threading
from pathlib import Path
from urllib.parse import urlsplit

import mlperf_loadgen as lg

BODY = bytes(256)
THREADS = 64


def main(asked):
    if asked.core is not None:
        os.sched_setaffinity(0, {asked.core})
    place = urlsplit(asked.url).netloc
    work = queue.SimpleQueue()

    def send():
        connection = http.client.HTTPConnection(place, timeout=10)
        while (sample := work.get()) is not None:
            connection.request("POST", "/", BODY)
            connection.getresponse().read()
            lg.QuerySamplesComplete([lg.QuerySampleResponse(sample.id, 0, 0)])
        connection.close()

    threads = [threading.Thread(target=send, daemon=True) for _ in range(THREADS)]
    for thread in threads:
        thread.start()

    def issue(samples):
        for sample in samples:
            work.put(sample)

    settings = lg.TestSettings()
    settings.scenario = lg.TestScenario.Server
    settings.mode = lg.TestMode.PerformanceOnly
    settings.server_target_qps = asked.qps
    settings.server_target_latency_ns = 100_000_000
    settings.min_duration_ms = int(asked.seconds * 1000)
    settings.min_query_count = int(asked.seconds * asked.qps)
    settings.max_query_count = settings.min_query_count
    settings.schedule_rng_seed = asked.seed
    settings.qsl_rng_seed = settings.sample_index_rng_seed = 1
    told = loadgen(issue, settings, samples=64)
    for _ in threads:
        work.put(None)
    print(json.dumps({"latencies_ns": latencies(told["trace.json"])}))


def loadgen(issue, settings, *, samples):
    """Run LoadGen to its end; gives the files that it wrote by their names, without their beginning."""
    with tempfile.TemporaryDirectory() as folder:
        output = lg.LogOutputSettings()
        output.outdir = folder
        logs = lg.LogSettings()
        logs.log_output = output
        logs.enable_trace = True
        system = lg.ConstructSUT(issue, lambda: None)
        library = lg.ConstructQSL(samples, samples, lambda chosen: None, lambda chosen: None)
        lg.StartTestWithLogSettings(system, library, settings, logs)
        lg.DestroyQSL(library)
        lg.DestroySUT(system)
        return {path.name.removeprefix("mlperf_log_"): path.read_text() for path in Path(folder).iterdir()}


def latencies(trace):
    begin, end = {}, {}
    for line in trace.splitlines():
        line = line.strip().rstrip(",")
        if not line.startswith("{"):
            continue
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            continue
        if event.get("name") == "Sample" and event.get("ph") in "be":
            (begin if event["ph"] == "b" else end)[event["id"]] = event["ts"]
    return [(end[key] - begin[key]) * 1e3 for key in begin if key in end]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("--qps", type=float, default=250)
    parser.add_argument("--seconds", type=float, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--core", type=int)
    main(parser.parse_args())
