"""A bound for servers, not a server: bare.c around the bare session. Prints its port.

python benchmarks/serving/peers/bare.py BUNDLE.toml MODEL
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from hasten.deployment import read_deployment
from hasten.engines.onnxruntime import OnnxRuntime
from hasten.protocol.messages import NAMES

SIZES = (1, 2, 4, 8)
"""hasten's own batch sizes, without its padding: fewer rows are run as they are."""


def built(folder: Path) -> ctypes.CDLL:
    made = folder / "bare.so"
    compiler = os.environ.get("CC", "cc")
    subprocess.run(
        [compiler, "-O3", "-shared", "-fPIC", str(Path(__file__).with_name("bare.c")), "-o", str(made)], check=True
    )
    return ctypes.CDLL(str(made))


def main(bundle: str, model: str) -> None:
    _, artifact = read_deployment(Path(bundle))
    session = OnnxRuntime(threads=1).open(artifact)
    given, gives = artifact.signature.inputs[0], artifact.signature.outputs[0]
    rows = np.zeros((SIZES[-1], *given.shape[1:]), given.dtype)
    outs = np.zeros((SIZES[-1], *gives.shape[1:]), gives.dtype)
    feeds = [{given.name: rows[:n]} for n in range(SIZES[-1] + 1)]
    for n in SIZES:
        for _ in range(20):
            session.run(feeds[n])
    shape, n_bytes = [1, *outs.shape[1:]], outs[0].nbytes
    said = {"name": gives.name, "datatype": NAMES[gives.dtype], "shape": shape}
    outputs = [{**said, "parameters": {"binary_data_size": n_bytes}}]
    text = json.dumps({"model_name": model, "model_version": "1", "outputs": outputs})
    head = "HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\n"
    head += f"Inference-Header-Content-Length: {len(text)}\r\nContent-Length: {len(text) + n_bytes}\r\n\r\n{text}"

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)
    def run(n: int) -> int:
        outs[:n] = session.run(feeds[n])[gives.name]
        return 0

    with socket.create_server(("127.0.0.1", 0), backlog=512) as port, tempfile.TemporaryDirectory() as folder:
        library = built(Path(folder))
        print(port.getsockname()[1], flush=True)
        pointers = [ctypes.c_void_p(array.ctypes.data) for array in (rows, outs)]
        sizes = [ctypes.c_size_t(array[0].nbytes) for array in (rows, outs)]
        library.serve(port.fileno(), SIZES[-1], pointers[0], sizes[0], pointers[1], sizes[1], head.encode(), run)


if __name__ == "__main__":
    main(*sys.argv[1:])
