"""The sequences that are open in a segment: their KV caches, and which tokens of each have been let in.

Decides whether one more fits beside the others, and in which order the steps of one follow each other: that in which
they were let in. Must not know layers.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from runtime.caches import Between
from runtime.errors import ContextFull, InvalidInput, KvBudgetExceeded, UnknownSession
from runtime.passage import Passage, Rest, passed


@dataclass
class Session:
    """One sequence: its KV cache, how many tokens it has seen, and how many steps have begun with."""

    name: str
    cache: Any
    positions: torch.Tensor  # [1, max_tokens] int64
    max_tokens: int
    kv_bytes: int
    seen: int = 0
    begun: int = 0
    newest: Passage = field(default_factory=passed)

    def require(self, count: int) -> None:
        """Raise `ContextFull` if `count` more tokens exceed the reservation."""
        wanted = self.begun + count
        if wanted > self.max_tokens:
            raise ContextFull(wanted=wanted, limit=self.max_tokens, what="the session's reservation")

    def begin(self, count: int, mine: Passage, rest: Rest) -> Between:
        """Let a step of `count` tokens in behind the newest; `OpenSessions.begin` does, one at a time. Modifies."""
        between = Between(self.begun, self.newest, mine, rest)
        self.begun += count
        self.newest = mine
        return between


class OpenSessions:
    """The open sessions of a segment. Thread-safe.

    Attributes
    ----------
    kv_budget
        Bytes that the KV caches of all of them may take; no limit if None. May be changed.
    kv_used
        Bytes that they have reserved.
    """

    def __init__(self, kv_budget: int | None = None) -> None:
        self.kv_budget = kv_budget
        self.kv_used = 0
        self._sessions: dict[str, Session] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._sessions)

    def __getitem__(self, name: str) -> Session:
        """Return an open session; raises `UnknownSession`."""
        session = self._sessions.get(name)
        if session is None:
            raise UnknownSession(name)
        return session

    def add(self, session: Session) -> None:
        """Open a session; raises `InvalidInput` for one that is open, and `KvBudgetExceeded`. Modifies."""
        with self._lock:
            if session.name in self._sessions:
                raise InvalidInput(f"session {session.name!r} is open already; close it first")
            if self.kv_budget is not None and self.kv_used + session.kv_bytes > self.kv_budget:
                raise KvBudgetExceeded(
                    needed=session.kv_bytes, used=self.kv_used, budget=self.kv_budget, sessions=len(self._sessions)
                )
            self.kv_used += session.kv_bytes
            self._sessions[session.name] = session

    def remove(self, name: str) -> None:
        """Close a session; closing it again changes nothing. Modifies."""
        with self._lock:
            session = self._sessions.pop(name, None)
            if session is not None:
                self.kv_used -= session.kv_bytes

    def begin(self, sessions: Sequence[Session], count: int, mine: Passage, rest: Rest) -> list[Between]:
        """Let one step of `count` tokens into each of some sessions, or into none if one is full. Modifies.

        Raises
        ------
        ContextFull
            That one's reservation is too small.
        """
        with self._lock:
            for session in sessions:
                session.require(count)
            return [session.begin(count, mine, rest) for session in sessions]
