"""A small network for hasten: hasten_net.py FOLDER writes a bundle that `hasten serve` reads."""

import sys
from pathlib import Path

from hasten.deployment import Deployment, Serving, write_deployment
from hasten.engines.onnxruntime import OnnxRuntime
from hasten.host import this_host
from hasten.store import Store
from hasten.testing.models import mlp, stored
from hasten.transform import Context, run_pass


def main(folder: Path) -> None:
    store = Store(folder / ".store")
    ctx = Context(folder=store.root, samples=None, seed=0, progress=lambda text, share: None)
    built = run_pass(OnnxRuntime(), stored(mlp(), store), store, ctx)
    deployment = Deployment(
        name="net",
        artifact=built.digest,
        engine="onnxruntime",
        settings={},
        source=built.digest,
        plan="",
        verdict="MEETS",
        host=this_host().binding,
        batch=1,
        serving=Serving(instances=1),
    )
    write_deployment(deployment, built, folder / "net")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
