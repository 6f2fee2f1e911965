"""The coordinator's memory across restarts: one durable state in SQLite, and the story of how it came about.

Decides how durable is meant: WAL with ``synchronous=FULL``, so a state that `write` returned from survives a power cut.
Must not know what the state means.
"""

import sqlite3
from pathlib import Path

from pydantic import ValidationError

from planner.control.errors import JournalUnusable
from planner.control.state import ClusterState

_STORY_LENGTH = 1000


class Journal:
    """One cluster's state on disk. Belongs to one thread and one process."""

    def __init__(self, path: Path, cluster: str) -> None:
        self.path = path
        try:
            self._database = sqlite3.connect(path, isolation_level=None)
            self._database.execute("PRAGMA locking_mode=EXCLUSIVE")
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute("PRAGMA synchronous=FULL")
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS state (one INTEGER PRIMARY KEY CHECK (one=1), json TEXT)"
            )
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS story (number INTEGER PRIMARY KEY, epoch INTEGER, phase TEXT, message TEXT)"
            )
            self.state = self._read(cluster)
        except sqlite3.Error as error:
            raise JournalUnusable(
                f"{path}: cannot be used as journal: {error}; another planner serve may run, or the file is no journal"
            ) from error

    def _read(self, cluster: str) -> ClusterState:
        row = self._database.execute("SELECT json FROM state").fetchone()
        if row is None:
            return ClusterState(cluster=cluster)
        try:
            state = ClusterState.model_validate_json(row[0])
        except ValidationError as error:
            raise JournalUnusable(f"{self.path}: written by another version of this program: {error}") from error
        if state.cluster != cluster:
            raise JournalUnusable(f"{self.path}: is the journal of cluster {state.cluster!r}, not of {cluster!r}")
        return state

    def write(self, state: ClusterState) -> None:
        """Make `state` durable; returns when it is."""
        self._database.execute("BEGIN")
        self._database.execute("INSERT OR REPLACE INTO state VALUES (1, ?)", (state.model_dump_json(),))
        self._database.execute(
            "INSERT INTO story (epoch, phase, message) VALUES (?, ?, ?)", (state.epoch, state.phase, state.message)
        )
        self._database.execute(
            "DELETE FROM story WHERE number <= (SELECT max(number) FROM story) - ?", (_STORY_LENGTH,)
        )
        self._database.execute("COMMIT")
        self.state = state

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
