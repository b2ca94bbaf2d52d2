"""The journal keeps what is finished, whatever happens to the process."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest

from hasten.errors import StoreError
from hasten.search.journal import Journal

from .trials import ORIGINAL, trial


def test_trials_come_back_as_they_were_recorded_in_order(tmp_path) -> None:
    journal = Journal.open(tmp_path / "journal.sqlite")
    fast = trial(2.0, 0.01, passes=2, mark=3, traits=("int8",))
    journal.add(ORIGINAL)
    journal.add(fast)
    assert Journal.open(tmp_path / "journal.sqlite").trials() == (ORIGINAL, fast)


def test_a_plan_is_recorded_once(tmp_path) -> None:
    journal = Journal.open(tmp_path / "journal.sqlite")
    journal.add(ORIGINAL)
    journal.add(trial(1.7, 0.0))
    assert journal.trials() == (ORIGINAL,)


def test_records_and_notes_are_kept(tmp_path) -> None:
    journal = Journal.open(tmp_path / "journal.sqlite")
    journal.record("ranking", ["a", "b"])
    journal.note("skipped it")
    assert journal.recall("ranking", list[str]) == ["a", "b"]
    assert journal.recall("nothing", list[str]) is None
    assert journal.notes() == ("skipped it",)


def test_time_spent_adds_up_over_sittings(tmp_path) -> None:
    journal = Journal.open(tmp_path / "journal.sqlite")
    for seconds in (3.0, 4.0):
        journal.spend(journal.begin(), seconds)
    assert journal.spent() == 7.0


def test_a_killed_writer_leaves_every_finished_record(tmp_path) -> None:
    script = f"""
        import os, signal
        from pathlib import Path
        from hasten.search.journal import Journal
        journal = Journal.open(Path({str(tmp_path / "journal.sqlite")!r}))
        for i in range(20):
            journal.record(f"r{{i}}", i)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], env={**os.environ}, check=False)
    assert done.returncode == -signal.SIGKILL
    journal = Journal.open(tmp_path / "journal.sqlite")
    assert [journal.recall(f"r{i}", int) for i in range(20)] == list(range(20))


def test_a_file_that_is_no_journal_is_one_clear_line(tmp_path) -> None:
    path = tmp_path / "journal.sqlite"
    path.write_bytes(b"this is not a database, whatever its name may say" * 10)
    with pytest.raises(StoreError, match="journal"):
        Journal.open(path)
