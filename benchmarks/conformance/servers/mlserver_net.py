"""A small scikit-learn model for `mlserver start`: mlserver_net.py FOLDER HTTP_PORT GRPC_PORT."""

import json
import sys
from pathlib import Path

import joblib
import numpy as np
from sklearn.linear_model import LinearRegression


def main(folder: Path, http_port: int, grpc_port: int) -> None:
    draw = np.random.default_rng(0)
    x = draw.standard_normal((200, 16)).astype(np.float32)
    (folder / "net").mkdir(parents=True)
    model = LinearRegression().fit(x, x @ draw.standard_normal((16, 4), np.float32))
    joblib.dump(model, folder / "net" / "model.joblib")
    tensor = {"parameters": {"content_type": "np"}}
    settings = {
        "name": "net",
        "implementation": "mlserver_sklearn.SKLearnModel",
        "parameters": {"uri": "./model.joblib", "version": "1"},
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 16], **tensor}],
        "outputs": [{"name": "predict", "datatype": "FP32", "shape": [-1, 4], **tensor}],
    }
    (folder / "net" / "model-settings.json").write_text(json.dumps(settings))
    server = {"host": "127.0.0.1", "http_port": http_port, "grpc_port": grpc_port, "metrics_port": http_port + 50}
    (folder / "settings.json").write_text(json.dumps({**server, "debug": False, "parallel_workers": 0}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
