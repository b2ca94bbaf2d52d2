"""A small network for hasten: hasten_net.py FOLDER writes a bundle that `hasten serve` reads."""

import sys
from pathlib import Path

from hasten.deployment import Serving
from hasten.testing.deployments import deployed
from hasten.testing.models import mlp

if __name__ == "__main__":
    deployed(mlp(), Path(sys.argv[1]) / "net", serving=Serving(instances=1))
