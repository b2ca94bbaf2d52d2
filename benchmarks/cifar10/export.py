"""Export a trained network to ONNX with its batch-norm nodes: python export.py resnet20."""

import argparse
import shutil
import tempfile
from pathlib import Path

from models import NETWORKS

import hasten

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("network", choices=sorted(NETWORKS))
    name = parser.parse_args().network
    with tempfile.TemporaryDirectory() as scratch:
        samples = hasten.Samples({"x": _pictures()})
        made = hasten.import_model(
            f"{HERE / 'models.py'}:{name}", hasten.Store(Path(scratch)), samples=samples, state=HERE / f"{name}.pt"
        )
        shutil.copyfile(made.entry, HERE / f"{name}.onnx")


def _pictures():
    import numpy as np

    return np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype(np.float32)


if __name__ == "__main__":
    main()
