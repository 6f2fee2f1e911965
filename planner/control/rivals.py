"""Two agents under one node id: which of them the coordinator listens to.

Decides that whoever is there stays. A newcomer may be the same agent started again after a kill, so it is kept waiting
for a moment: if the one before is heard meanwhile, both live and the newcomer is refused; if not, it takes the place.
Must not know sockets.
"""

from typing import Final, Literal

from planner.control.status import AgentView
from schemas.messages import Hello

SILENCE_S: Final = 1.5  # three heartbeats

Verdict = Literal["welcome", "wait", "taken"]


class Rivals:
    """Newcomers that wait for a place that may not be free."""

    def __init__(self) -> None:
        self._waiting: dict[str, tuple[str, float]] = {}

    def judge(self, hello: Hello, present: AgentView | None, now: float) -> Verdict:
        """Say what a hello gets, given what is known of its node. Modifies."""
        if present is None or present.has_stopped or present.hello.incarnation == hello.incarnation:
            return self._welcome(hello)
        if now - present.heard_at >= SILENCE_S:
            return self._welcome(hello)
        newcomer, since = self._waiting.get(hello.node, ("", now))
        if newcomer == hello.incarnation and present.heard_at > since:
            return "taken"
        self._waiting[hello.node] = (hello.incarnation, since if newcomer == hello.incarnation else now)
        return "wait"

    def _welcome(self, hello: Hello) -> Verdict:
        self._waiting.pop(hello.node, None)
        return "welcome"
