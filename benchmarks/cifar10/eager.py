"""The row of plain PyTorch: the module itself, in eval mode, as its author would call it."""

from pathlib import Path

import numpy as np
import torch
from models import NETWORKS
from peers import PeerWorker


class EagerWorker(PeerWorker):
    """Runs in a child: the network in PyTorch eager."""

    def __init__(self, runtime: str, path: str, threads: int, feed: str) -> None:
        self.threads = threads
        torch.set_num_threads(threads)
        super().__init__(runtime, path, threads, feed)

    def open(self, runtime: str, path: str, threads: int):
        """Load the trained weights."""
        network = NETWORKS[path]()
        network.load_state_dict(torch.load(Path(__file__).parent / f"{path}.pt", weights_only=True))
        network.eval()
        feed = [torch.from_numpy(np.ascontiguousarray(value)) for value in self.feeds.values()]

        def run():
            with torch.inference_mode():
                return network(*feed)

        return run
