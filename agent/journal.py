"""The agent's memory across restarts: one durable state in SQLite.

Decides how durable is meant: WAL with ``synchronous=FULL``. Must not know what the state means.
"""

import sqlite3
from pathlib import Path

from pydantic import ValidationError

from agent.errors import JournalUnusable, JournalUnwritable
from agent.machine import AgentState

_WAL_PAGES = 64  # of 4 KiB, so that the journal stays about as small as the state


class Journal:
    """One agent's state on disk. Belongs to one thread; a second process on the same file is refused."""

    def __init__(self, path: Path, node: str) -> None:
        self.path = path
        self._node = node
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(path, isolation_level=None, timeout=1.0)
        except (sqlite3.Error, OSError) as error:
            raise self._unusable(error) from error
        try:
            self._database.execute("PRAGMA locking_mode=EXCLUSIVE")
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute("PRAGMA synchronous=FULL")
            self._database.execute(f"PRAGMA wal_autocheckpoint={_WAL_PAGES}")
            self._database.execute("CREATE TABLE IF NOT EXISTS state (node TEXT PRIMARY KEY, json TEXT)")
            self.state = self._read(node)
        except sqlite3.Error as error:
            self.close()
            raise self._unusable(error) from error
        except BaseException:
            self.close()
            raise

    def _unusable(self, error: Exception) -> JournalUnusable:
        why = "another agent runs on this data directory" if "locked" in str(error) else str(error)
        return JournalUnusable(
            f"{self.path}: cannot be used as journal: {why}; stop that agent, or give each node a data directory of "
            "its own that it may write to"
        )

    def _read(self, node: str) -> AgentState:
        rows = self._database.execute("SELECT node, json FROM state").fetchall()
        if not rows:
            return AgentState()
        owner, text = rows[0]
        if owner != node:
            raise JournalUnusable(
                f"{self.path}: belongs to node {owner!r}, this is {node!r}; give each node its own data"
            )
        try:
            return AgentState.model_validate_json(text)
        except ValidationError as error:
            raise JournalUnusable(
                f"{self.path}: written by another version of this program; empty the data directory"
            ) from error

    def write(self, state: AgentState) -> None:
        """Make `state` durable; returns when it is. Raises `JournalUnwritable`, and then nothing has changed."""
        try:
            self._database.execute("INSERT OR REPLACE INTO state VALUES (?, ?)", (self._node, state.model_dump_json()))
        except sqlite3.Error as error:
            raise JournalUnwritable(f"{self.path}: cannot be written: {error}; free some space there") from error
        self.state = state

    def close(self) -> None:
        """Close the file."""
        self._database.close()
