"""MLPerf's own LoadGen, single stream, driving a service of ours or its bare session; prints what it found as JSON.

    python benchmarks/load/mlperf_model.py --url http://127.0.0.1:PORT --model net --data DATA.npz [--accuracy]
    python benchmarks/load/mlperf_model.py --session BUNDLE --data DATA.npz [--accuracy]

A service is asked by http.client with binary tensors, whose bytes are put together here: nothing of hasten is in that.
"""

import argparse
import http.client
import json
import os
from pathlib import Path
from urllib.parse import urlsplit

import mlperf_loadgen as lg
import numpy as np
from mlperf import latencies, loadgen


def service(url, model, name):
    """Give what asks a service for the class of one row."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=10)

    def ask(row):
        data = row.tobytes()
        tensor = {"name": name, "shape": list(row.shape), "datatype": "FP32"}
        tensor["parameters"] = {"binary_data_size": len(data)}
        head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
        headers = {"Inference-Header-Content-Length": str(len(head)), "Content-Type": "application/octet-stream"}
        connection.request("POST", f"/v2/models/{model}/infer", head + data, headers)
        answer = connection.getresponse()
        body = answer.read()
        assert answer.status == 200, body
        return int(np.frombuffer(body[int(answer.headers["Inference-Header-Content-Length"]) :], np.float32).argmax())

    return ask


def session(path, name):
    """Give what asks a deployment's session, in this process."""
    from hasten.deployment import read_deployment
    from hasten.plan import Part, load_part

    deployment, built = read_deployment(Path(path))
    opened = load_part("engine", Part(deployment.engine, deployment.settings)).open(built)
    return lambda row: int(next(iter(opened.run({name: row}).values())).argmax())


def main(asked):
    if asked.core is not None:
        os.sched_setaffinity(0, {asked.core})
    with np.load(asked.data) as kept:
        name = next(key for key in kept if key != "labels")
        x = kept[name]
    ask = service(asked.url, asked.model, name) if asked.url else session(asked.session, name)
    for row in range(20):
        ask(x[row : row + 1])

    def issue(samples):
        for sample in samples:
            answer = np.array([ask(x[sample.index : sample.index + 1])], np.int64)
            lg.QuerySamplesComplete([lg.QuerySampleResponse(sample.id, answer.ctypes.data, answer.nbytes)])

    settings = lg.TestSettings()
    settings.scenario = lg.TestScenario.SingleStream
    settings.mode = lg.TestMode.AccuracyOnly if asked.accuracy else lg.TestMode.PerformanceOnly
    settings.single_stream_expected_latency_ns = 1_000_000
    settings.min_duration_ms = settings.max_duration_ms = int(asked.seconds * 1000)
    settings.min_query_count = 1
    told = loadgen(issue, settings, samples=len(x))
    if asked.accuracy:
        kept = json.loads(told["accuracy.json"])
        answers = {one["qsl_idx"]: int(np.frombuffer(bytes.fromhex(one["data"]), np.int64)[0]) for one in kept}
        print(json.dumps({"answers": [answers[index] for index in range(len(x))]}))
    else:
        print(json.dumps({"latencies_ns": latencies(told["trace.json"])}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--url")
    parser.add_argument("--model", default="net")
    parser.add_argument("--session")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--accuracy", action="store_true")
    parser.add_argument("--core", type=int)
    main(parser.parse_args())
