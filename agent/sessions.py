"""A node's registry of the sessions that run through its segments: who opened each, who may send it what, what is next.

Event in, decision out; no clock, no I/O, no threads, no tensors. Decides whether a message is taken, which typed fault
it gets otherwise, which steps run next (and which of them together), and when a session that nobody asks for is freed.
A session is known by its id and, since a path may come through a node twice, by which of the path's segments it is at.
Must not know how steps run nor how messages travel.

    OpenSession ─► Entry ─► steps arrive in order ─► `next_batch` ─► `ran` ─► … ─► closed, expired or retired
"""

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final

from schemas.plan import Segment
from schemas.sessions import OpenSession, SessionCode, StepHeader

LEASE_S: Final = 5.0
MAX_BATCH: Final = 16
MAX_ENTRIES: Final = 4096
MAX_PIECES: Final = 3  # of one prompt that run at the same time, each behind the one before

Range = tuple[int, int]
"""First and last decoder layer, both included."""
Cut = Callable[[int], Sequence[slice]]
"""Cuts a prompt of so many tokens into steps."""


@dataclass(frozen=True)
class Sender:
    """Who says something: a node, and which start of its agent."""

    node: str
    incarnation: str


class Objection(Exception):
    """Why a message is not taken; becomes a `SessionFault` to whoever sent it."""

    def __init__(self, code: SessionCode, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


@dataclass(frozen=True)
class Step:
    """Tokens to run at a segment. `payload` is their ids or hidden states, whatever the caller keeps them as."""

    position: int
    count: int
    payload: Any


@dataclass
class Entry:
    """One session at one segment of this node.

    Attributes
    ----------
    arrived, done
        Tokens whose steps have come, and that were run.
    in_line
        Steps that have come and were not begun.
    running
        Steps that were begun and have not ended: one, or pieces of a prompt.
    """

    opened: OpenSession
    index: int
    owner: Sender
    heard_at: float
    arrived: int = 0
    done: int = 0
    in_line: deque[Step] = field(default_factory=deque)
    running: int = 0
    is_closed: bool = False

    @property
    def session(self) -> str:
        """The session's id."""
        return self.opened.session

    @property
    def name(self) -> str:
        """What this session is called at this segment."""
        return f"{self.session}.{self.index}"

    @property
    def segment(self) -> Segment:
        """The segment it is at."""
        return self.opened.path.segments[self.index]

    @property
    def range(self) -> Range:
        """The segment's layers."""
        return range_of(self.segment)

    @property
    def is_first(self) -> bool:
        """Whether the path begins here."""
        return self.index == 0

    @property
    def is_last(self) -> bool:
        """Whether the path ends here."""
        return self.index == len(self.opened.path.segments) - 1

    @property
    def next_node(self) -> str:
        """Where hidden states go from here; sampled tokens, from the last segment."""
        return self.opened.path.segments[(self.index + 1) % len(self.opened.path.segments)].node

    @property
    def is_busy(self) -> bool:
        """Whether a step is under way or in line."""
        return bool(self.running or self.in_line)

    @property
    def may_begin(self) -> bool:
        """Whether its next step can begin: alone, or as a piece of a prompt behind others."""
        if not self.in_line or self.is_closed:
            return False
        step = self.in_line[0]
        return not self.running or (self.running < MAX_PIECES and step.count > 1 and self.is_prefill(step))

    @property
    def is_alone(self) -> bool:
        """Whether nothing can happen in it before the one step that is running has ended."""
        return self.running == 1 and not self.in_line and self.arrived >= self.opened.prompt_tokens

    def sender_of(self, header: StepHeader) -> str | None:
        """Return which node may send such a step; None where nobody may."""
        if not self.is_first:
            return self.opened.path.segments[self.index - 1].node if header.kind == "hidden" else None
        if header.kind == "ids":
            return self.opened.path.ingress
        return self.opened.path.segments[-1].node if header.kind == "token" else None

    def is_prefill(self, step: Step) -> bool:
        """Whether a step is part of what is run before the first token is sampled."""
        return step.position < self.opened.prompt_tokens


@dataclass(frozen=True)
class Batch:
    """Steps to run together: of one range; several only where each is one token of an answer under way."""

    entries: tuple[Entry, ...]
    steps: tuple[Step, ...]

    @property
    def range(self) -> Range:
        """The layers they run through."""
        return self.entries[0].range


class Registry:
    """The sessions at this node's segments. Not thread-safe: whoever uses it sees to that.

    Parameters
    ----------
    node
        This node.
    layers
        Decoder layers of the model.
    cut, cut_alone
        Cut prompts: of paths through several nodes, which work at the same time, and of those that are this node's
        alone; the same if None.
    """

    def __init__(self, node: str, *, layers: int, cut: Cut, cut_alone: Cut | None = None) -> None:
        self._node = node
        self._layers = layers
        self._cut = cut
        self._cut_alone = cut_alone or cut
        self._entries: dict[tuple[str, int], Entry] = {}
        self._line: deque[Entry] = deque()  # each entry with steps in line once, in the order of their turn
        self._was_prefill = False

    def __len__(self) -> int:
        return len({session for session, _ in self._entries.copy()})

    @property
    def has_work(self) -> bool:
        """Whether a step could run now."""
        return bool(self._line)

    @property
    def has_others(self) -> bool:
        """Whether anything may come or be done before the steps that are running have ended."""
        return any(not entry.is_alone for entry in self._entries.values())

    def snapshot(self) -> list[Entry]:
        """Return all entries; any thread may ask."""
        return list(self._entries.values())

    def find(self, session: str, index: int) -> Entry | None:
        """Return a session's entry at a segment of its path, if it is here."""
        return self._entries.get((session, index))

    def at(self, session: str) -> list[Entry]:
        """Return a session's entries at this node."""
        return [entry for (name, _), entry in self._entries.items() if name == session]

    def open(
        self, sender: Sender, message: OpenSession, now: float, *, epoch: int, ranges: Collection[Range]
    ) -> list[Entry]:
        """Take a session in and return its new entries, in which nothing is reserved yet. Modifies.

        Opening it again changes nothing. Raises `Objection`.

        Parameters
        ----------
        epoch
            The active one here.
        ranges
            That are loaded and not retired.
        """
        if sender.node != message.path.ingress:
            raise Objection("not_yours", f"a session from {message.path.ingress} cannot be opened by {sender.node}")
        if known := self.at(message.session):
            self._require_owner(known[0], sender)
            for entry in known:
                entry.heard_at = now
            return []
        self._require_sound(message)
        if message.epoch > epoch:
            raise Objection("not_ready", f"epoch {message.epoch} is not active here yet, {epoch} is")
        mine = [(index, s) for index, s in enumerate(message.path.segments) if s.node == self._node]
        if not mine:
            raise Objection("refused", f"no segment of the path is on {self._node}")
        for _, segment in mine:
            if range_of(segment) not in ranges:
                text = f"layers {segment.first_layer} … {segment.last_layer} are not run here"
                raise Objection("stale_epoch", f"{text}; epoch {epoch} is active")
        if len(self._entries) + len(mine) > MAX_ENTRIES:
            raise Objection("kv_budget", f"{len(self._entries)} sessions are open already")
        opened = [Entry(message, index, sender, now) for index, _ in mine]
        self._entries |= {(entry.session, entry.index): entry for entry in opened}
        return opened

    def take(self, sender: Sender, header: StepHeader, payload: Any, now: float) -> None:
        """Put a step that has come in line; one that came before changes nothing. Modifies. Raises `Objection`."""
        entry = self._entries.get((header.session, header.segment))
        if entry is None:
            raise Objection("unknown_session", "there is no such session here")
        if sender.node != entry.sender_of(header):
            raise Objection("not_yours", f"{sender.node} has no such step to send in this session")
        if header.kind == "ids":
            self._require_owner(entry, sender)
        elif header.kind == "token" and header.position < entry.opened.prompt_tokens:
            raise Objection(
                "refused", f"a token at {header.position}, within the {entry.opened.prompt_tokens} to run first"
            )
        if header.position < entry.arrived:
            return
        if header.position > entry.arrived:
            raise Objection("lost", f"tokens {entry.arrived} … {header.position - 1} did not arrive")
        if header.position + header.count > entry.opened.max_tokens:
            wanted = header.position + header.count
            raise Objection("context_full", f"{wanted} tokens exceed the {entry.opened.max_tokens} it was opened for")
        if header.kind == "ids":
            if header.count != entry.opened.prompt_tokens:
                raise Objection("refused", f"{header.count} tokens where {entry.opened.prompt_tokens} were announced")
            entry.heard_at = now
        elif header.count > max(1, entry.opened.prompt_tokens - header.position):
            raise Objection("refused", f"{header.count} tokens at {header.position}, where one is generated at a time")
        entry.arrived += header.count
        entry.in_line.extend(self._steps(entry, header, payload))
        self._line_up(entry)

    def _line_up(self, entry: Entry) -> None:
        if entry.may_begin and entry not in self._line:
            self._line.append(entry)

    def _steps(self, entry: Entry, header: StepHeader, payload: Any) -> Iterator[Step]:
        """Cut a prompt into steps; tokens that were generated before run one by one where the first run did so."""
        if header.kind != "ids":
            yield Step(header.position, header.count, payload)
            return
        ordered = entry.opened.combine == "ordered"
        prompt = header.count - (entry.opened.resumed if ordered else 0)
        singles = (slice(place, place + 1) for place in range(prompt, header.count))
        cut = self._cut if len(entry.opened.path.segments) > 1 else self._cut_alone
        for piece in (*cut(prompt), *singles):
            yield Step(piece.start, piece.stop - piece.start, payload[piece])

    def alive(self, sender: Sender, session: str, now: float) -> tuple[int, bool]:
        """Note that the ingress wants a session; return its tokens run here and whether it is busy. Modifies."""
        entries = self._owned(sender, session)
        for entry in entries:
            entry.heard_at = now
        return min(entry.done for entry in entries), any(entry.is_busy for entry in entries)

    def close(self, sender: Sender, session: str) -> list[Entry]:
        """Forget a session; returns what was open. Modifies. Raises `Objection`."""
        return self.forget(self._owned(sender, session))

    def expire(self, now: float) -> list[Entry]:
        """Forget sessions that their ingress has not asked for; returns them. Modifies."""
        return self.forget([entry for entry in self._entries.values() if now - entry.heard_at > LEASE_S])

    def drop(self, is_stale: Callable[[Entry], bool]) -> list[Entry]:
        """Forget sessions with a stale entry here; returns all their entries. Modifies."""
        gone = {entry.session for entry in self._entries.values() if is_stale(entry)}
        return self.forget([entry for entry in self._entries.values() if entry.session in gone])

    def forget(self, entries: Iterable[Entry]) -> list[Entry]:
        """Forget entries; a step of one that is running ends unheard. Modifies."""
        gone = [entry for entry in entries if self._entries.pop((entry.session, entry.index), None) is not None]
        for entry in gone:
            entry.is_closed = True
            entry.in_line.clear()
            if entry in self._line:
                self._line.remove(entry)
        return gone

    def next_batch(self) -> Batch | None:
        """Take the next steps out of line: a piece of a prompt and tokens of answers by turns. Modifies."""
        if not self._line:
            return None
        first = self._line[0]
        if len(self._line) == 1:
            self._was_prefill = first.is_prefill(first.in_line[0])
            return self._begun([first])
        prefills = [entry for entry in self._line if entry.is_prefill(entry.in_line[0])]
        if prefills and (not self._was_prefill or len(prefills) == len(self._line)):
            chosen = [prefills[0]]
        else:
            first = next(entry for entry in self._line if not entry.is_prefill(entry.in_line[0]))
            chosen = self._together(first)
        self._was_prefill = bool(prefills) and chosen[0] is prefills[0]
        return self._begun(chosen)

    def _begun(self, chosen: list[Entry]) -> Batch:
        """Take the next step of each out of line."""
        batch = Batch(tuple(chosen), tuple(entry.in_line.popleft() for entry in chosen))
        for entry in chosen:
            self._line.remove(entry)
            entry.running += 1
            self._line_up(entry)
        return batch

    def _together(self, first: Entry) -> list[Entry]:
        """Return the entries whose next tokens run with that of `first`; ordered sums are never batched."""
        if first.opened.combine == "ordered":
            return [first]
        same = (
            entry
            for entry in self._line
            if entry.range == first.range
            and entry.opened.combine == "partial"
            and not entry.is_prefill(entry.in_line[0])
        )
        return [entry for entry, _ in zip(same, range(MAX_BATCH), strict=False)]

    def ran(self, entry: Entry, step: Step) -> None:
        """Note that a step has ended. Modifies."""
        entry.done = step.position + step.count
        entry.running -= 1
        self._line_up(entry)

    def _owned(self, sender: Sender, session: str) -> list[Entry]:
        entries = self.at(session)
        if not entries:
            raise Objection("unknown_session", "there is no such session here")
        self._require_owner(entries[0], sender)
        return entries

    def _require_owner(self, entry: Entry, sender: Sender) -> None:
        if sender != entry.owner:
            raise Objection("not_yours", "the session is another's")

    def _require_sound(self, message: OpenSession) -> None:
        ranges = [range_of(segment) for segment in message.path.segments]
        follow = all(after[0] == before[1] + 1 for before, after in pairwise(ranges))
        whole = ranges[0][0] == 0 and ranges[-1][1] == self._layers - 1
        if not (follow and whole and all(first <= last for first, last in ranges)):
            raise Objection("refused", f"its path is no way through layers 0 … {self._layers - 1}")
        if not message.resumed < message.prompt_tokens < message.max_tokens:
            raise Objection("refused", f"{message.prompt_tokens} tokens to begin with in {message.max_tokens}")
        if len(message.forced) not in {0, message.max_tokens - message.prompt_tokens + message.resumed}:
            raise Objection("refused", f"{len(message.forced)} forced tokens of {message.max_tokens}")


def range_of(segment: Segment) -> Range:
    """Return a segment's layers."""
    return segment.first_layer, segment.last_layer
