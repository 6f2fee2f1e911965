"""The answers that are made for clients of this node, as its session plane sees them: who waits for which events.

Decides who may say something to an answer (the nodes of its path), and when it is told: once the step at hand was sent
on, since the threads of answers would take the interpreter from it. Must not know segments.
"""

from collections.abc import Callable
from dataclasses import dataclass

from agent import ring
from agent.sessions import Objection, Sender
from agent.tracing import PutTrace
from schemas.plan import TrunkPath
from schemas.sessions import Opened, Scored, SessionFault, SessionStanding, SessionTrace

News = Opened | SessionStanding | Scored | SessionTrace | SessionFault
"""What the nodes of a path say to the ingress."""


@dataclass(frozen=True)
class Front:
    """One answer: along which path, and where its events go."""

    path: TrunkPath
    put: Callable[[ring.Event], None]
    put_trace: PutTrace | None

    @property
    def nodes(self) -> set[str]:
        """Nodes of its path."""
        return {segment.node for segment in self.path.segments}


class Fronts:
    """Answers by session. `attach` and `detach` may be called by any thread."""

    def __init__(self) -> None:
        self._by_session: dict[str, Front] = {}
        self._news: list[tuple[Front, ring.Event]] = []

    def __len__(self) -> int:
        return len(self._by_session)

    def attach(
        self, session: str, path: TrunkPath, put: Callable[[ring.Event], None], put_trace: PutTrace | None
    ) -> None:
        """Send the events of a session to `put`, and its traces to `put_trace`."""
        self._by_session[session] = Front(path, put, put_trace)

    def detach(self, session: str) -> None:
        """Send no more events."""
        self._by_session.pop(session, None)

    def find(self, session: str) -> Front | None:
        """Return the answer that is made of a session; None where it is not made here."""
        return self._by_session.get(session)

    def note(self, front: Front, event: ring.Event) -> None:
        """Keep an event for an answer until it is told."""
        self._news.append((front, event))

    def hear(self, front: Front, sender: Sender, message: News) -> None:
        """Note what a node says; raises `Objection` for one that has no part in the answer."""
        session = message.session
        if sender.node not in front.nodes:
            raise Objection("not_yours", f"{sender.node} has no part in this session")
        match message:
            case Opened():
                self.note(front, ring.OpenedAt(session, sender.node))
            case SessionStanding(is_busy=is_busy):
                self.note(front, ring.Stood(session, sender.node, is_busy))
            case Scored(position=position, nll=nll):
                self.note(front, ring.ScoreCame(session, position, nll))
            case SessionTrace(part=part) if front.put_trace is not None:
                front.put_trace(part.model_copy(update={"node": sender.node, "session": session}))
            case SessionTrace():
                pass  # nobody asked
            case SessionFault(node=node, code=code, message=text, exit_code=exit_code):
                self.note(front, ring.Faulted(session, node, code, text, exit_code))

    def tell(self) -> None:
        """Hand on what was noted."""
        if self._news:
            news, self._news = self._news, []
            for front, event in news:
                front.put(event)
