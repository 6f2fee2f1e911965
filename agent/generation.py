"""Making an answer for a client: the thread that drives `ring` with this node's session plane.

Decides what a request may ask for (a prompt, a context within what was planned). Belongs to one thread. Must not know
who reads the tokens, nor where they are computed.
"""

import queue
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, assert_never
from uuid import uuid4

from agent import ring
from agent.errors import AgentError, NoActivePlan, RequestCancelled
from agent.plane import SessionPlane
from runtime.errors import ContextFull
from runtime.text import TextStream
from schemas.messages import Finished, Generated, GenerateRequest, Traced
from schemas.outcome import ExitCode
from schemas.sessions import CloseSession, SessionAlive
from schemas.tracing import TracePart

_TRACES_S: Final = 2.0  # how long nodes may take to tell what they noted
TICK_S: Final = 0.05  # how soon a newer path, a cancelled request and the like are noticed


@dataclass(frozen=True)
class Ingress:
    """What a node needs to take prompts, whoever runs the layers."""

    tokenizer: Any
    max_tokens: int


class Generator:
    """Makes tokens in one worker thread.

    Parameters
    ----------
    ingress
        Returns what is needed to take prompts, or None while it is not here.
    way
        The path in force for prompts that enter here.
    patience_s
        How long a path may make no progress.
    """

    def __init__(
        self,
        plane: SessionPlane,
        *,
        ingress: Callable[[], Ingress | None],
        way: Callable[[], ring.Way],
        patience_s: float,
    ) -> None:
        self._plane = plane
        self._ingress = ingress
        self._way = way
        self._patience_s = patience_s

    def generate(
        self, wanted: GenerateRequest, is_cancelled: Callable[[], bool]
    ) -> Iterator[Generated | Traced | Finished]:
        """Yield every token with the text that it completes, what was noted meanwhile where asked for, how it ended."""
        ingress, way = self._ingress(), self._way()
        if ingress is None or way.path is None:
            raise NoActivePlan(way.why_not)
        prompt = tuple(ingress.tokenizer(wanted.prompt, verbose=False)["input_ids"])
        if wanted.score:
            yield from self._score(wanted, prompt, ingress, is_cancelled)
            return
        _require_fit(prompt, wanted, ingress)
        drawn = (wanted.temperature, wanted.top_p, wanted.seed)
        job = ring.Wanted(prompt, wanted.max_tokens, *drawn, wanted.combine, trace=wanted.trace)
        driven = self._drive(job)
        text = TextStream(ingress.tokenizer)
        began = first = time.monotonic()
        try:
            for index, emitted in enumerate(driven.run(self._way, is_cancelled)):
                first = first if index else time.monotonic()
                yield Generated(request=wanted.request, index=index, token=emitted.token, text=text.push(emitted.token))
            seconds = time.monotonic() - began
            for part in driven.noted():
                yield Traced(request=wanted.request, part=part)
        finally:
            driven.close()
        yield Finished(
            request=wanted.request,
            reason=driven.reason,
            prompt_tokens=len(prompt),
            tokens=len(driven.ring.tokens),
            text=text.end(),
            seconds=seconds,
            prefill_s=first - began,
        )

    def _score(
        self, wanted: GenerateRequest, ids: tuple[int, ...], ingress: Ingress, is_cancelled: Callable[[], bool]
    ) -> Iterator[Generated | Finished]:
        """Yield every token but the first with how unlikely it was, piece by piece, each in a session of its own."""
        _require_fit(ids[:1], wanted, ingress)
        began, index = time.monotonic(), 0
        for start in range(0, len(ids) - 1, wanted.max_tokens):
            forced = ids[start + 1 : start + 1 + wanted.max_tokens]
            driven = self._drive(
                ring.Wanted(ids[start : start + 1], len(forced), combine=wanted.combine, forced=forced)
            )
            try:
                for emitted in driven.run(self._way, is_cancelled):
                    yield Generated(request=wanted.request, index=index, token=emitted.token, text="", nll=emitted.nll)
                    index += 1
            finally:
                driven.close()
        seconds = time.monotonic() - began
        yield Finished(
            request=wanted.request,
            reason="length",
            prompt_tokens=len(ids) - index,
            tokens=index,
            seconds=seconds,
            prefill_s=0.0,
        )

    def _drive(self, job: ring.Wanted) -> "_Driven":
        return _Driven(self._plane, ring.Ring(job, patience_s=self._patience_s, new_id=lambda: uuid4().hex))

    def close(self) -> None:
        """Nothing is kept between requests."""


class _Driven:
    """A ring and what happens to it: performs its instructions, and waits for events."""

    def __init__(self, plane: SessionPlane, machine: ring.Ring) -> None:
        self.ring = machine
        self.reason: Any = "stop"
        self._plane = plane
        self._events: queue.SimpleQueue[ring.Event] = queue.SimpleQueue()
        self._parts: queue.SimpleQueue[TracePart] = queue.SimpleQueue()
        self._told_by: dict[str, set[str]] = {}  # session to the nodes that note it
        self._sent = 0

    def run(self, way: Callable[[], ring.Way], is_cancelled: Callable[[], bool]) -> Iterator[ring.Emit]:
        """Yield each token; raises what ends the answer early."""
        known = way()
        event: ring.Event = ring.WayIs(known)
        ticked_at = time.monotonic()
        while True:
            now = time.monotonic()
            for instruction in self.ring.handle(event, now):
                match instruction:
                    case ring.Emit():
                        yield instruction
                    case ring.Finish(reason):
                        self.reason = reason
                        return
                    case ring.Fail(message, exit_code):
                        raise AgentError(message, exit_code)
                    case _:
                        self._perform(instruction)
            if is_cancelled():
                raise RequestCancelled("the request was cancelled")
            if now - ticked_at >= TICK_S:
                ticked_at, event = now, ring.Ticked()
                if (current := way()) != known:
                    known, event = current, ring.WayIs(current)
                continue
            try:
                event = self._events.get(timeout=TICK_S)
            except queue.Empty:
                event = ring.Ticked()

    def _perform(self, instruction: ring.Open | ring.Feed | ring.KeepAlive | ring.Close) -> None:
        plane = self._plane
        match instruction:
            case ring.Open(opening, nodes):
                put_trace = self._parts.put if opening.trace else None
                plane.attach(opening.session, opening.path, self._events.put, put_trace)
                plane.tell(nodes, opening)
                if opening.trace:
                    self._told_by[opening.session] = {*nodes}
            case ring.Feed(session, node, ids):
                plane.feed(node, session, ids, fresh=len(ids) if not self._sent else 0)
                self._sent = len(ids)
            case ring.KeepAlive(session, nodes):
                plane.tell(nodes, SessionAlive(session=session))
            case ring.Close(session, nodes):
                if session not in self._told_by:
                    plane.detach(session)
                plane.tell(nodes, CloseSession(session=session))
            case _:
                assert_never(instruction)

    def noted(self) -> Iterator[TracePart]:
        """Yield what nodes noted of the sessions of an answer that is over, and who did not tell."""
        here = {session: self._plane.trace_of(session) for session in self._told_by}
        left = {(s, node) for s, nodes in self._told_by.items() for node in nodes - {p.node for p in here[s]}}
        yield from (part for parts in here.values() for part in parts)
        deadline = time.monotonic() + _TRACES_S
        while left and (timeout_s := deadline - time.monotonic()) > 0:
            with suppress(queue.Empty):
                part = self._parts.get(timeout=timeout_s)
                left -= {(part.session, part.node)} if part.is_last else set()
                yield part
        for session, node in sorted(left):
            yield TracePart(node=node, session=session, is_silent=True, is_last=True)

    def close(self) -> None:
        """Free the session, however the answer ended."""
        for instruction in self.ring.handle(ring.Cancelled(), time.monotonic()):
            if isinstance(instruction, ring.Close):
                self._perform(instruction)
        for session in (self.ring.session, *self._told_by):
            self._plane.detach(session)


def _require_fit(prompt: tuple[int, ...], wanted: GenerateRequest, ingress: Ingress) -> None:
    if not prompt:
        raise AgentError("the prompt has no tokens; give it some text", ExitCode.INVALID)
    total = len(prompt) + wanted.max_tokens
    if total > ingress.max_tokens:
        raise ContextFull(wanted=total, limit=ingress.max_tokens, what="the planned context.tokens")
