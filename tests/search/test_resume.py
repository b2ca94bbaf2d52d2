"""A search that is killed goes on where it was: nothing finished is repeated, nothing is lost."""

import json
import os
import random
import signal
import subprocess
import sys
import textwrap

from hasten.search.frontier import frontier
from hasten.search.journal import Journal
from hasten.search.optimize import JOURNAL
from hasten.search.result import read_result

SCRIPT = """
import json, sys
from pathlib import Path
from hasten.search.optimize import optimize
from hasten.search.result import Goal
from hasten.search.task import Effort
from hasten.store import Store
from hasten.testing import models

home = Path(sys.argv[1])
store = Store(home)
source = models.stored(models.convnet(), store)

def tell(event):
    key = event.trial.key if event.trial else None
    print(json.dumps({"kind": event.kind, "text": event.text, "key": key}), flush=True)

result = optimize(
    source, models.random_samples(source, n=200), Goal(), engines=["onnxruntime"], threads=[1],
    effort=Effort(trial_s=0.5, slice_s=0.02, finals_s=2.0), home=home, on_event=tell,
)
print(json.dumps({"kind": "result", "text": str(result.run), "key": None}), flush=True)
"""


def run(home, *, kill_after):
    """Run the search in a process of its own; kill it (-9) once it has told ``kill_after`` pieces of news."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), str(home)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ},
    )
    events = []
    for line in process.stdout:
        events.append(json.loads(line))
        if kill_after is not None and len(events) >= kill_after:
            process.send_signal(signal.SIGKILL)
            break
    process.stdout.close()
    process.wait()
    return events


def test_killed_at_three_random_moments_it_resumes_and_repeats_no_finished_trial(tmp_path) -> None:
    random.seed(7)
    finished: dict[str, bytes] = {}
    for _ in range(3):
        events = run(tmp_path, kill_after=random.randint(15, 60))
        (journal,) = [Journal(path) for path in tmp_path.glob(f"runs/*/{JOURNAL}")]
        kept = {trial.key: repr(trial) for trial in journal.trials()}
        ended = [event["key"] for event in events if event["kind"] == "trial-end"]
        assert not set(ended) & finished.keys(), "a finished trial was run again"
        assert all(kept[key] == before for key, before in finished.items()), "a finished trial was changed"
        finished = kept
    events = run(tmp_path, kill_after=None)
    result = read_result(next(tmp_path.glob("runs/*/result.json")))
    ended = [event["key"] for event in events if event["kind"] == "trial-end"]
    assert finished
    assert not set(ended) & finished.keys()
    assert {trial.key for trial in result.trials} == finished.keys() | set(ended)
    again = frontier(Journal(result.run / JOURNAL).trials(), result.goal, original=result.original)
    assert result.frontier == again
