"""The coordinator's memory across restarts: one durable state in SQLite, and the story of how it came about.

Decides how durable is meant: WAL with ``synchronous=FULL``, so a state that `write` returned from survives a power cut.
Must not know what the state means.
"""

import sqlite3
from pathlib import Path

from pydantic import ValidationError

from planner.control.errors import JournalUnusable, JournalUnwritable
from planner.control.state import ClusterState

_STORY_LENGTH = 1000
_OPENING = (
    "PRAGMA locking_mode=EXCLUSIVE",
    "PRAGMA journal_mode=WAL",
    "PRAGMA synchronous=FULL",
    "CREATE TABLE IF NOT EXISTS state (one INTEGER PRIMARY KEY CHECK (one=1), json TEXT)",
    "CREATE TABLE IF NOT EXISTS story (number INTEGER PRIMARY KEY, epoch INTEGER, phase TEXT, message TEXT)",
)


class Journal:
    """One cluster's state on disk. Belongs to one thread and one process."""

    def __init__(self, path: Path, cluster: str) -> None:
        self.path = path
        try:
            self._database = sqlite3.connect(path, isolation_level=None, timeout=1.0)
        except sqlite3.Error as error:
            raise self._unusable(error) from error
        try:
            for statement in _OPENING:
                self._database.execute(statement)
            self.state = self._read(cluster)
        except sqlite3.Error as error:
            self.close()
            raise self._unusable(error) from error
        except BaseException:
            self.close()
            raise

    def _unusable(self, error: sqlite3.Error) -> JournalUnusable:
        why = "another planner serve runs with it" if "locked" in str(error) else str(error)
        return JournalUnusable(
            f"{self.path}: cannot be used as journal: {why}; stop that one, or name another file with --journal"
        )

    def _read(self, cluster: str) -> ClusterState:
        row = self._database.execute("SELECT json FROM state").fetchone()
        if row is None:
            return ClusterState(cluster=cluster)
        try:
            state = ClusterState.model_validate_json(row[0])
        except ValidationError as error:
            raise JournalUnusable(
                f"{self.path}: written by another version of this program; use that one, or name another file with "
                "--journal"
            ) from error
        if state.cluster != cluster:
            raise JournalUnusable(f"{self.path}: is the journal of cluster {state.cluster!r}, not of {cluster!r}")
        return state

    def write(self, state: ClusterState) -> None:
        """Make `state` durable; returns when it is. Raises `JournalUnwritable`, and then nothing has changed."""
        try:
            self._database.execute("BEGIN")
            self._database.execute("INSERT OR REPLACE INTO state VALUES (1, ?)", (state.model_dump_json(),))
            self._database.execute(
                "INSERT INTO story (epoch, phase, message) VALUES (?, ?, ?)", (state.epoch, state.phase, state.message)
            )
            self._database.execute(
                "DELETE FROM story WHERE number <= (SELECT max(number) FROM story) - ?", (_STORY_LENGTH,)
            )
            self._database.execute("COMMIT")
        except sqlite3.Error as error:
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")
            raise JournalUnwritable(
                f"{self.path}: cannot be written: {error}; free some space there and start planner serve again"
            ) from error
        self.state = state

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
