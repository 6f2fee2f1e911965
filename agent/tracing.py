"""What happens to a traced request at this node, noted for its ingress: spans of its steps, what was sent and heard.

Decides what is kept (a bounded number of sessions, spans and hops) and how it is cut into messages. A session that was
not opened with `trace` is not known here, and costs a look into an empty dictionary. Must not know sockets, nor how
the clocks of nodes are compared: `agent.clocks` does.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from time import perf_counter
from typing import Final

from runtime.timeline import Several, Timeline, recorded
from schemas.sessions import StepHeader
from schemas.tracing import MOST, HopRecord, SpanRecord, TracePart

MOST_SESSIONS: Final = 16
_NOTHING: Final = nullcontext()

PutTrace = Callable[[TracePart], None]
"""Takes what another node noted."""


@dataclass
class Noted:
    """What was noted of a session; `owner` is who opened it."""

    owner: object
    timeline: Timeline = field(default_factory=lambda: Timeline(MOST))
    hops: list[HopRecord] = field(default_factory=list)
    missed: int = 0

    def hop(self, node: str, what: str, *, is_sent: bool) -> None:
        """Note that something was sent or heard now. Modifies."""
        if len(self.hops) < MOST:
            self.hops.append((node, what, perf_counter(), is_sent))
        else:
            self.missed += 1


class Traces:
    """The traced sessions of this node. Any thread may note; the others belong to whoever opens and closes sessions."""

    def __init__(self, node: str) -> None:
        self._node = node
        self._noted: dict[str, Noted] = {}

    def begin(self, session: str, owner: object) -> None:
        """Note what happens to a session from now on; the oldest is forgotten for the seventeenth. Modifies."""
        if session not in self._noted:
            while len(self._noted) >= MOST_SESSIONS:
                self._noted.pop(next(iter(self._noted)), None)
            self._noted[session] = Noted(owner)

    def sent(self, session: str, node: str, what: str) -> None:
        """Note that something leaves for another node. Modifies."""
        if (noted := self._noted.get(session)) is not None and node != self._node:
            noted.hop(node, what, is_sent=True)

    def heard(self, session: str, node: str, what: str) -> None:
        """Note that something came from another node. Modifies."""
        if (noted := self._noted.get(session)) is not None and node != self._node:
            noted.hop(node, what, is_sent=False)

    def step_sent(self, node: str, header: StepHeader) -> None:
        """Note that a step leaves. Modifies."""
        if self._noted:
            self.sent(header.session, node, _name(header))

    def step_heard(self, node: str, header: StepHeader) -> None:
        """Note that a step came. Modifies."""
        if self._noted:
            self.heard(header.session, node, _name(header))

    def recorded(self, sessions: Iterable[str]) -> AbstractContextManager[None]:
        """Note the spans of a step of these sessions meanwhile, as far as they are traced."""
        if not self._noted:
            return _NOTHING
        into = [noted.timeline for session in sessions if (noted := self._noted.get(session)) is not None]
        return recorded(into[0] if len(into) == 1 else Several(into)) if into else _NOTHING

    def forget(self, session: str) -> None:
        """Drop what was noted. Modifies."""
        self._noted.pop(session, None)

    def end(self, session: str, owner: object, *, most_bytes: int) -> list[TracePart]:
        """Return what was noted for whoever opened the session, the last part marked, and forget it. Modifies."""
        noted = self._noted.get(session)
        if noted is None or noted.owner != owner:
            return []
        del self._noted[session]
        spans = tuple((s.track, s.name, s.began, s.ended, _figures(s.about)) for s in noted.timeline.spans())
        missed = noted.missed + noted.timeline.missed
        whole = TracePart(node=self._node, session=session, spans=spans, hops=tuple(noted.hops), missed=missed)
        parts = list(_cut(whole, most_bytes))
        return [*parts[:-1], parts[-1].model_copy(update={"is_last": True})]


def _figures(about: object) -> dict[str, float]:
    return {name: float(value) for name, value in about.items()} if isinstance(about, dict) else {}


def _cut(part: TracePart, most_bytes: int) -> Iterator[TracePart]:
    """Halve until every part is small enough to send; what was missed is told with the first."""
    spans: tuple[SpanRecord, ...] = part.spans
    if len(spans) + len(part.hops) <= 1 or len(part.model_dump_json()) <= most_bytes:
        yield part
        return
    half, middle = len(spans) // 2, len(part.hops) // 2
    yield from _cut(part.model_copy(update={"spans": spans[:half], "hops": part.hops[:middle]}), most_bytes)
    rest = {"spans": spans[half:], "hops": part.hops[middle:], "missed": 0}
    yield from _cut(part.model_copy(update=rest), most_bytes)


def _name(header: StepHeader) -> str:
    """Return what a step is called in a trace: its receiver can tell it from any other of the session."""
    last = header.position + header.count - 1
    where = f"{header.position}" if header.count == 1 else f"{header.position} … {last}"
    match header.kind:
        case "token":
            return f"token {where}"
        case _:
            return f"{'prompt' if header.kind == 'ids' else 'hidden states'} {where} for segment {header.segment}"
