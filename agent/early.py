"""Steps that come before their session is open: the node before sent them while the ingress's open is on its way.

Decides which are kept, and how long: only the beginning of a prompt, since anything later belongs to a session that was
here and is gone. Must not know sessions that are open.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch

from agent.sessions import Sender
from schemas.sessions import SessionMessage, StepHeader

EARLY_S: Final = 1.0
MAX_EARLY: Final = 32  # steps of all such sessions

Reply = Callable[[SessionMessage], None]


@dataclass(frozen=True)
class Early:
    """A step that was kept, and how to tell its sender."""

    sender: Sender
    header: StepHeader
    payload: torch.Tensor
    reply: Reply | None
    expires_at: float


class EarlySteps:
    """What is kept, in the order in which it came."""

    def __init__(self) -> None:
        self._kept: list[Early] = []

    def keep(self, sender: Sender, header: StepHeader, payload: torch.Tensor, reply: Reply | None) -> bool:
        """Keep a step of a session that is unknown, if it may be one of a session to come. Modifies."""
        if header.kind != "hidden" or len(self._kept) >= MAX_EARLY:
            return False
        if header.position and not any(early.header.session == header.session for early in self._kept):
            return False
        self._kept.append(Early(sender, header, payload, reply, time.monotonic() + EARLY_S))
        return True

    def take(self, session: str) -> list[Early]:
        """Return what came of a session, and keep it no longer. Modifies."""
        mine = [early for early in self._kept if early.header.session == session]
        if mine:
            self._kept = [early for early in self._kept if early.header.session != session]
        return mine

    def expire(self, now: float) -> list[Early]:
        """Return what was kept too long. Modifies."""
        late = [early for early in self._kept if early.expires_at < now]
        if late:
            self._kept = [early for early in self._kept if early.expires_at >= now]
        return late
