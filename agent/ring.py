"""One answer as its ingress sees it: a session opened along a path, fed, listened to, healed and closed.

Event in, instructions out; no clock, no I/O, no threads. The first segment is fed in the same breath as it is asked to
open: waiting for the others to say that they have would cost a round trip. After trouble it waits for them, since what
the first one runs is in vain where another refuses. Decides when the path is given up and opened anew with what
was said so far (a node restarted, a range retired, a newer epoch's path, silence), when to stop, and with which words.
Tokens are drawn from (seed, position), so a session that is run again goes on with the same ones. Must not know how
messages travel, nor what tokens mean.

    opening ─► running ─► closed
       ▲          │ fault, stall, other path
       └─ pausing ◄
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, Literal, assert_never

from schemas.outcome import ExitCode
from schemas.plan import TrunkPath
from schemas.sessions import OpenSession, SessionCode
from schemas.wire import Combine

ALIVE_S: Final = 1.0  # between two signs of life to the segments
REPEAT_S: Final = 0.5  # until an open that was not answered is sent again
PAUSE_S: Final = 0.1  # before a path is opened anew
STALL_S: Final = 2.0  # without a token while every node says that it has nothing to do
MOST_RUNS: Final = 3  # of a path that opens everywhere and loses its way before a token has gone all around

_HOPELESS: Final[frozenset[SessionCode]] = frozenset({"context_full", "not_yours", "refused", "failed"})
_UNNAMED: Final[frozenset[SessionCode]] = frozenset({"not_yours", "refused"})  # messages that do not say where


@dataclass(frozen=True)
class Wanted:
    """What an answer is to be: what follows `prompt`; or just the `forced` tokens, and how unlikely each was."""

    prompt: tuple[int, ...]
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    combine: Combine = "partial"
    forced: tuple[int, ...] = ()
    trace: bool = False


@dataclass(frozen=True)
class Way:
    """The path in force at this ingress, and its epoch; no path where it takes no tokens in, with the reason."""

    epoch: int
    path: TrunkPath | None
    why_not: str = ""


@dataclass(frozen=True)
class WayIs:
    """What the path is now; at the beginning and whenever it may have changed."""

    way: Way


@dataclass(frozen=True)
class OpenedAt:
    """A node has opened the session."""

    session: str
    node: str


@dataclass(frozen=True)
class TokenCame:
    """The last segment sampled a token; `end` says why it is the last one, or nothing."""

    session: str
    position: int
    token: int
    end: Literal["", "length", "stop"]


@dataclass(frozen=True)
class ScoreCame:
    """The last segment says how unlikely the forced token is that comes next; nats."""

    session: str
    position: int
    nll: float


@dataclass(frozen=True)
class Stood:
    """A node said how far it is."""

    session: str
    node: str
    is_busy: bool


@dataclass(frozen=True)
class Faulted:
    """A node cannot go on, or (`lost`) cannot be reached."""

    session: str
    node: str
    code: SessionCode
    message: str
    exit_code: ExitCode = ExitCode.FAILED


@dataclass(frozen=True)
class Ticked:
    """Time went by."""


@dataclass(frozen=True)
class Cancelled:
    """The client no longer wants the answer."""


Event = WayIs | OpenedAt | TokenCame | ScoreCame | Stood | Faulted | Ticked | Cancelled


@dataclass(frozen=True)
class Open:
    """Open a session at these nodes of its path, or ask them again."""

    opening: OpenSession
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class Feed:
    """Send the first segment what it runs first."""

    session: str
    node: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class KeepAlive:
    """Tell the nodes that the session is wanted."""

    session: str
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class Close:
    """Free the session at these nodes."""

    session: str
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class Emit:
    """Hand a token to the client; with its negative log-likelihood where it was forced."""

    token: int
    nll: float | None = None


@dataclass(frozen=True)
class Finish:
    """The answer is complete."""

    reason: Literal["length", "stop"]


@dataclass(frozen=True)
class Fail:
    """The answer ends early."""

    message: str
    exit_code: ExitCode


Instruction = Open | Feed | KeepAlive | Close | Emit | Finish | Fail


class Ring:
    """The state machine of one answer. `handle` modifies it.

    Parameters
    ----------
    patience_s
        How long a path may make no progress.
    new_id
        Makes session ids.
    """

    def __init__(self, wanted: Wanted, *, patience_s: float, new_id: Callable[[], str]) -> None:
        self.wanted = wanted
        self.tokens: list[int] = []
        self.state: Literal["new", "opening", "running", "pausing", "closed"] = "new"
        self._patience_s = patience_s
        self._new_id = new_id
        self._way = Way(0, None)
        self._path: TrunkPath | None = None  # of the session that is open
        self._session = ""
        self._unopened: set[str] = set()
        self._idle: set[str] = set()
        self._trouble = ""
        self._score: tuple[int, float] | None = None  # of a forced token: its place and how unlikely it is
        self._run_tokens = self._vain_runs = 0  # of the session that is open, and since a token went all around
        self._around_at = self._progress_at = self._moved_at = self._said_at = self._tried_at = 0.0

    @property
    def session(self) -> str:
        """The session that is open, or was last."""
        return self._session

    def handle(self, event: Event, now: float) -> list[Instruction]:
        """Take one event in; return what to do, in order."""
        return list(self._react(event, now)) if self.state != "closed" else []

    def _react(self, event: Event, now: float) -> Iterator[Instruction]:
        match event:
            case WayIs(way):
                yield from self._way_is(way, now)
            case Ticked():
                yield from self._tick(now)
            case Cancelled():
                yield from self._close()
                self.state = "closed"
            case OpenedAt() | TokenCame() | ScoreCame() | Stood() | Faulted() if event.session != self._session:
                pass  # of a session that was given up
            case OpenedAt(node=node):
                yield from self._opened(node, now)
            case TokenCame():
                yield from self._token(event, now)
            case ScoreCame(position=position, nll=nll):
                self._score = position, nll
            case Stood():
                self._stood(event, now)
            case Faulted():
                yield from self._faulted(event, now)
            case _:
                assert_never(event)

    def _way_is(self, way: Way, now: float) -> Iterator[Instruction]:
        self._way = way
        if self.state == "new":
            self._around_at = self._progress_at = now
            yield from self._open(now)
        elif self.state in {"opening", "running"} and way.path is not None and way.path != self._path:
            yield from self._close()
            yield from self._open(now)

    def _open(self, now: float) -> Iterator[Instruction]:
        """Open the current path under a new id, for all that was said so far."""
        path = self._way.path
        if path is None:
            yield from self._fail(self._way.why_not, ExitCode.FAILED)
            return
        self.state, self._path, self._session = "opening", path, self._new_id()
        self._unopened, self._idle, self._run_tokens = set(_nodes(path)), set(), 0
        self._moved_at = self._said_at = self._tried_at = now
        yield from self._begin(path)

    def _begin(self, path: TrunkPath) -> Iterator[Instruction]:
        """Say what to open, and what runs first; said again it changes nothing where it was heard."""
        yield Open(self._opening(path), _nodes(path))
        if not self._trouble and path.segments[0].node in self._unopened:
            yield self._feed(path)

    def _feed(self, path: TrunkPath) -> Feed:
        return Feed(self._session, path.segments[0].node, (*self.wanted.prompt, *self.tokens))

    def _opening(self, path: TrunkPath) -> OpenSession:
        wanted = self.wanted
        return OpenSession(
            session=self._session,
            epoch=self._way.epoch,
            path=path,
            prompt_tokens=len(wanted.prompt) + len(self.tokens),
            resumed=len(self.tokens),
            max_tokens=len(wanted.prompt) + wanted.max_tokens,
            temperature=wanted.temperature,
            top_p=wanted.top_p,
            seed=wanted.seed,
            combine=wanted.combine,
            forced=wanted.forced,
            trace=wanted.trace,
        )

    def _opened(self, node: str, now: float) -> Iterator[Instruction]:
        self._unopened.discard(node)
        if self.state != "opening" or self._unopened or self._path is None:
            return
        self.state, self._moved_at = "running", now
        if self._trouble:
            yield self._feed(self._path)

    def _token(self, event: TokenCame, now: float) -> Iterator[Instruction]:
        expected = len(self.wanted.prompt) + len(self.tokens)
        if self.state == "pausing" or event.position < expected:
            return
        self.state = "running"  # what one node says may overtake what another says: a token has been through all
        if event.position > expected:
            last = self._path.segments[-1].node if self._path is not None else ""
            yield from self._pause(f"{self._part(last)}: a token was lost on its way", now)
            return
        nll = self._score[1] if self._score is not None and self._score[0] == event.position else None
        if self.wanted.forced and nll is None:
            yield from self._pause("a token came without its likelihood", now)
            return
        self._progress_at = self._moved_at = now
        self._run_tokens += 1
        if self._run_tokens > 1:  # the first one of a run comes of what was fed
            self._around_at, self._trouble, self._vain_runs = now, "", 0
        self._idle.clear()
        self.tokens.append(event.token)
        yield Emit(event.token, nll)
        if event.end:
            yield from self._close()
            self.state = "closed"
            yield Finish(event.end)

    def _stood(self, event: Stood, now: float) -> None:
        if event.is_busy:
            self._progress_at = self._moved_at = now
            self._idle.clear()
        else:
            self._idle.add(event.node)

    def _faulted(self, event: Faulted, now: float) -> Iterator[Instruction]:
        if self.state == "pausing":
            return
        if event.code in _HOPELESS:
            yield from self._close()
            where = f"{self._part(event.node)}: " if event.code in _UNNAMED else ""
            yield from self._fail(f"{where}{event.message}", event.exit_code)
        else:
            yield from self._pause(f"{self._part(event.node)}: {event.message}", now)

    def _pause(self, trouble: str, now: float) -> Iterator[Instruction]:
        """Give the session up, to open another in a moment; not for ever where nodes work and no token comes of it."""
        self._trouble, self._tried_at = trouble, now
        self._vain_runs += self.state == "running"
        yield from self._close()
        self.state = "pausing"
        if self._vain_runs >= MOST_RUNS and now - self._around_at > self._patience_s:
            yield from self._give_up()

    def _tick(self, now: float) -> Iterator[Instruction]:
        if self.state in {"opening", "pausing"} and now - self._progress_at > self._patience_s:
            yield from self._give_up()
        elif self.state == "pausing" and now - self._tried_at >= PAUSE_S:
            yield from self._open(now)
        elif self.state == "opening" and self._path is not None and now - self._tried_at >= REPEAT_S:
            self._tried_at = now
            yield from self._begin(self._path)  # which tells those that have opened that it is wanted
        elif self.state == "running":
            yield from self._watch(now)

    def _watch(self, now: float) -> Iterator[Instruction]:
        """Look after a session that runs: say that it is wanted, notice that nothing happens in it."""
        if self._path is None:
            return
        nodes = _nodes(self._path)
        if now - self._moved_at >= STALL_S and self._idle >= set(nodes):
            yield from self._pause(f"{self._part(nodes[0])}: no token, and no node is at work on one", now)
        elif now - self._progress_at > self._patience_s:
            silent = sorted(set(nodes) - self._idle)
            self._trouble = f"{self._part(silent[0] if silent else nodes[0])}: no answer"
            yield from self._close()
            yield from self._give_up()
        elif now - self._said_at >= ALIVE_S:
            self._said_at = now
            yield KeepAlive(self._session, nodes)

    def _give_up(self) -> Iterator[Instruction]:
        if self.state == "opening":
            first = min(self._unopened, default="")
            self._trouble = self._trouble or f"{self._part(first)}: no answer"
            yield from self._close()
        text = f"{self._trouble}; given up after {self._patience_s:.0f} s"
        yield from self._fail(text, ExitCode.FAILED)

    def _part(self, node: str) -> str:
        """Name a node and the layers it runs for this session."""
        segments = self._path.segments if self._path is not None else ()
        layers = ", ".join(f"{s.first_layer} … {s.last_layer}" for s in segments if s.node == node)
        return f"layers {layers} on {node}" if layers else node

    def _close(self) -> Iterator[Instruction]:
        if self._path is not None and self.state in {"opening", "running"}:
            yield Close(self._session, _nodes(self._path))

    def _fail(self, message: str, code: ExitCode) -> Iterator[Instruction]:
        self.state = "closed"
        yield Fail(message, code)


def _nodes(path: TrunkPath) -> tuple[str, ...]:
    """Return the nodes of a path, each once, in its order."""
    return tuple(dict.fromkeys(segment.node for segment in path.segments))
