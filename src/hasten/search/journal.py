"""The journal of a search: every finished piece of work, so that an interrupted search loses none of it.

SQLite with a write-ahead log: a record is there whole or not at all, also after ``kill -9``.
"""

from __future__ import annotations

import sqlite3
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

from hasten.search.result import Trial
from hasten.store import database, writing

T = TypeVar("T")

SCHEMA = """
CREATE TABLE IF NOT EXISTS trials (number INTEGER PRIMARY KEY, key TEXT UNIQUE NOT NULL, json BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS records (name TEXT PRIMARY KEY, json BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS notes (at REAL NOT NULL, text TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS sittings (number INTEGER PRIMARY KEY, started REAL NOT NULL, seconds REAL NOT NULL);
"""


@dataclass(frozen=True)
class Journal:
    """One file a search. Safe against several readers; one process writes."""

    path: Path

    @classmethod
    def open(cls, path: Path) -> Journal:
        """Open a journal, making it where there is none.

        Raises:
            StoreError: the file is no journal, or cannot be written.
        """
        journal = cls(path)
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        with journal._connected() as db:
            db.executescript(SCHEMA)
        return journal

    def trials(self) -> tuple[Trial, ...]:
        """Give every finished trial, in the order they were finished."""
        with self._connected() as db:
            rows = db.execute("SELECT json FROM trials ORDER BY number").fetchall()
        return tuple(msgspec.json.decode(row[0], type=Trial) for row in rows)

    def add(self, trial: Trial) -> None:
        """Record a finished trial. One key is recorded once: the first stays."""
        with self._connected() as db:
            db.execute(
                "INSERT OR IGNORE INTO trials (key, json) VALUES (?, ?)", (trial.key, msgspec.json.encode(trial))
            )

    def record(self, name: str, value: object) -> None:
        """Keep a piece of work that is no trial, under a name."""
        with self._connected() as db:
            db.execute("INSERT OR REPLACE INTO records VALUES (?, ?)", (name, msgspec.json.encode(value)))

    def recall(self, name: str, kind: type[T]) -> T | None:
        """Give what ``record`` kept, or None."""
        with self._connected() as db:
            row = db.execute("SELECT json FROM records WHERE name = ?", (name,)).fetchone()
        return None if row is None else msgspec.json.decode(row[0], type=kind)

    def forget(self, name: str) -> None:
        """Drop what ``record`` kept."""
        with self._connected() as db:
            db.execute("DELETE FROM records WHERE name = ?", (name,))

    def note(self, text: str) -> None:
        """Write a sentence: what was skipped and why, what was decided."""
        with self._connected() as db:
            db.execute("INSERT INTO notes VALUES (?, ?)", (time.time(), text))

    def notes(self) -> tuple[str, ...]:
        """Give every sentence, oldest first."""
        with self._connected() as db:
            return tuple(row[0] for row in db.execute("SELECT text FROM notes ORDER BY at"))

    def begin(self) -> int:
        """Begin a sitting: one run of the command. Gives its number."""
        with self._connected() as db:
            return int(
                db.execute("INSERT INTO sittings (started, seconds) VALUES (?, 0)", (time.time(),)).lastrowid or 0
            )

    def spend(self, sitting: int, seconds: float) -> None:
        """Note how long a sitting has lasted by now."""
        with self._connected() as db:
            db.execute("UPDATE sittings SET seconds = ? WHERE number = ?", (seconds, sitting))

    def spent(self) -> float:
        """Seconds of all sittings together: a budget is for the search, not for each try."""
        with self._connected() as db:
            return float(db.execute("SELECT COALESCE(SUM(seconds), 0) FROM sittings").fetchone()[0])

    def _connected(self) -> AbstractContextManager[sqlite3.Connection]:
        return database(self.path, "what was recorded before is kept")
