"""Kill a search at three random moments and hold its frontier against that of one that ran through.

    python benchmarks/resume/run.py [--rounds 3] [--model MODEL.onnx --data DATA]

Writes results.json and README's table.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from importlib import resources
from pathlib import Path

import msgspec
import psutil

from hasten.host import this_host, versions
from hasten.search.journal import Journal
from hasten.search.optimize import JOURNAL
from hasten.search.result import Result, read_result

HERE = Path(__file__).parent
BEGIN, END = "<!-- results -->", "<!-- end of results -->"
DEMO = resources.files("hasten.cli") / "demo"


def search(home: Path, asked: argparse.Namespace, *, kill_after_s: float | None = None) -> float:
    """Run the command; kill it after so many seconds. Gives the seconds it ran; checks that no child outlives it."""
    command = [sys.executable, "-m", "hasten", "optimize", str(asked.model), "--data", str(asked.data)]
    command += ["--max-drop", asked.max_drop, "--threads", asked.threads, "--home", str(home), "--json"]
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        process.wait(kill_after_s)
    except subprocess.TimeoutExpired:
        children = psutil.Process(process.pid).children(recursive=True)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        _, alive = psutil.wait_procs(children, timeout=30)
        assert not alive, f"children outlived the search: {alive}"
    else:
        assert process.returncode in (0, 3), f"the search failed: exit code {process.returncode}"
    return time.monotonic() - began


def trials(home: Path) -> dict[str, str]:
    """Give what the journal holds, in order: key to everything that was recorded."""
    paths = list(home.glob(f"runs/*/{JOURNAL}"))
    return {trial.key: repr(trial) for trial in Journal(paths[0]).trials()} if paths else {}


def finished(home: Path) -> Result:
    return read_result(next(home.glob("runs/*/result.json")))


def plans(result: Result) -> list[str]:
    return [str(result.trial(key).plan) for key in result.frontier]


def one(asked: argparse.Namespace, moments: random.Random, scratch: Path) -> dict:
    """One round: a search that runs through, and one that is killed three times."""
    through, killed = scratch / "through", scratch / "killed"
    seconds = search(through, asked)
    kills, before = [], {}
    for _ in range(3):
        kills.append(search(killed, asked, kill_after_s=moments.uniform(0.1, 0.5) * seconds))
        now = trials(killed)
        assert list(now.items())[: len(before)] == list(before.items()), "a finished trial was repeated or changed"
        before = now
    search(killed, asked)
    whole, pieces = finished(through), finished(killed)
    now = trials(killed)
    assert list(now.items())[: len(before)] == list(before.items()), "a finished trial was repeated or changed"
    assert len({trial.key for trial in pieces.trials}) == len(pieces.trials)
    return {
        "seconds": seconds,
        "kills_s": kills,
        "kept_before_the_last": len(before),
        "trials": [len(whole.trials), len(pieces.trials)],
        "frontiers": [plans(whole), plans(pieces)],
        "same": plans(whole) == plans(pieces),
        "speeds": [
            {str(r.trial(c.plan).plan): [c.over_original.low, c.over_original.value, c.over_original.high]
             for c in r.certificates}
            for r in (whole, pieces)
        ],
    }  # fmt: skip


def table(record) -> str:
    lines = [
        "| round | killed after (s) | trials kept | trials | the frontier | killed and resumed |",
        "|---|---|---|---|---|---|",
    ]
    for number, item in enumerate(record["rounds"], start=1):
        whole, pieces = ("<br>".join(f"`{plan}`" for plan in side) for side in item["frontiers"])
        lines.append(
            f"| {number} | {', '.join(f'{s:.0f}' for s in item['kills_s'])} | {item['kept_before_the_last']} "
            f"| {item['trials'][0]} and {item['trials'][1]} | {whole} | {'the same' if item['same'] else pieces} |"
        )
    same = sum(item["same"] for item in record["rounds"])
    return "\n".join([f"The same frontier in {same} of {len(record['rounds'])} rounds.", "", *lines, ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path(str(DEMO / "digits.onnx")))
    parser.add_argument("--data", type=Path, default=Path(str(DEMO / "digits.parquet")))
    parser.add_argument("--max-drop", default="2%")
    parser.add_argument("--threads", default="1")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    asked = parser.parse_args()
    moments = random.Random(asked.seed)
    rounds = []
    for _ in range(asked.rounds):
        with tempfile.TemporaryDirectory() as scratch:
            rounds.append(one(asked, moments, Path(scratch)))
        print(msgspec.json.encode(rounds[-1]).decode(), flush=True)
    record = {"rounds": rounds, "host": this_host(), "versions": versions()}
    (HERE / "results.json").write_bytes(msgspec.json.format(msgspec.json.encode(record)))
    page = HERE / "README.md"
    head, _, rest = page.read_text().partition(BEGIN)
    told = table(msgspec.json.decode((HERE / "results.json").read_bytes()))
    page.write_text(head + BEGIN + "\n" + told + END + rest.partition(END)[2])
    print(told)
    return 0 if all(item["same"] for item in rounds) else 1


if __name__ == "__main__":
    raise SystemExit(main())
