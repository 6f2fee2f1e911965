"""Sessions at the segments of this node: messages are answered, steps run, and what comes out goes on along its path.

Decides nothing that `sessions` does not: it carries that out, with real KV caches and tensors. Belongs to whichever
thread has the turn; what any thread may do says so. Must not know sockets: `Outside` brings things to other nodes, and
what is for this one comes straight back.
"""

import logging
import math
import time
from collections.abc import Callable
from functools import partial
from typing import Final, Literal, Protocol

import torch

from agent import ring
from agent.early import Early, EarlySteps, Reply
from agent.errors import RequestCancelled
from agent.fronts import Fronts, News
from agent.offer import Offer, Traffic
from agent.serving import DEVICE_FAILED
from agent.sessions import Batch, Entry, Objection, Range, Registry, Sender, Step
from agent.steps import compute, ids_of, require_fit
from agent.tracing import PutTrace, Traces
from agent.waiting import Port
from runtime.engine import Segment
from runtime.errors import ContextFull, ExpertUnavailable, KvBudgetExceeded, RuntimeFault, UnknownSession
from runtime.sampling import Sampling, chunk_of, prefill_chunks, sample
from runtime.tensors import dtype_name
from schemas.outcome import ExitCode
from schemas.plan import TrunkPath
from schemas.sessions import (
    CloseSession,
    Opened,
    OpenSession,
    Scored,
    SessionAlive,
    SessionCode,
    SessionFault,
    SessionMessage,
    SessionStanding,
    SessionTrace,
    StepHeader,
)
from schemas.tracing import TracePart

log = logging.getLogger(__name__)

NO_SESSION: Final = "0" * 32
MOST_TRACE_BYTES: Final = 1 << 18  # of one message
_LEAST_LIKELY: Final = 1e6  # nats: JSON has no infinity


class Outside(Protocol):
    """The way to other nodes, and what waits there."""

    def send_step(self, node: str, header: StepHeader, payload: torch.Tensor) -> None:
        """Send a step to another node."""

    def send_message(self, node: str, message: SessionMessage) -> None:
        """Say something to another node."""

    def is_waiting(self, session: str) -> bool:
        """Whether something of a session could not be sent yet."""

    def forget(self, session: str) -> None:
        """Drop what waits for a session that is over."""


class Segments:
    """The sessions that run through this node, and those whose answers are made here.

    Parameters
    ----------
    layers
        Decoder layers of the model.
    device
        What layers are run on here.
    frame_bytes
        The largest message that other nodes take.
    is_device_fault
        Told of errors; says of those that a device made, after which another will do the work.
    """

    def __init__(
        self,
        me: Sender,
        *,
        layers: int,
        outside: Outside,
        device: str = "cpu",
        frame_bytes: int = MOST_TRACE_BYTES,
        is_device_fault: Callable[[BaseException], bool] = lambda _: False,
    ) -> None:
        self.offer = Offer()
        self.traffic = Traffic()
        self.fronts = Fronts()
        alone = partial(prefill_chunks, most=chunk_of(torch.device(device)))
        self.registry = Registry(me.node, layers=layers, cut=prefill_chunks, cut_alone=alone)
        self._me = me
        self._outside = outside
        self._is_device_fault = is_device_fault
        self._traces = Traces(me.node)
        self._trace_bytes = min(frame_bytes, MOST_TRACE_BYTES)
        self._open: dict[str, Segment] = {}  # by entry name: where its KV cache is
        self._early = EarlySteps()

    def attach(
        self, session: str, path: TrunkPath, put: Callable[[ring.Event], None], put_trace: PutTrace | None = None
    ) -> None:
        """Send the events of a session of this ingress to `put`, and its traces. Any thread may ask."""
        self.fronts.attach(session, path, put, put_trace)
        if put_trace is not None:
            self._traces.begin(session, self._me)

    def detach(self, session: str) -> None:
        """Send no more events. Any thread may ask."""
        self.fronts.detach(session)
        self._traces.forget(session)

    def trace_of(self, session: str) -> list[TracePart]:
        """Return what was noted here of a session of this ingress, and forget it. Any thread may ask."""
        return self._traces.end(session, self._me, most_bytes=MOST_TRACE_BYTES)

    def ranges_of_own(self) -> frozenset[Range]:
        """Return ranges of sessions that entered here and run nowhere else. Any thread may ask."""
        return frozenset(
            entry.range
            for entry in self.registry.snapshot()
            if {entry.opened.path.ingress, *(s.node for s in entry.opened.path.segments)} == {self._me.node}
        )

    def feed(self, node: str, session: str, ids: tuple[int, ...], *, fresh: int) -> None:
        """Send the first segment what it runs first; `fresh` of the tokens were not sent before."""
        self.traffic.entered += fresh
        self._send_step(node, StepHeader(session, 0, 0, len(ids), "ids"), ids_of(ids))

    def say(self, node: str, message: SessionMessage) -> None:
        """Say something to a node, this one included."""
        if node != self._me.node:
            self._traces.sent(message.session, node, message.type)
            self._outside.send_message(node, message)
            return
        try:
            self.take_message(self._me, message, self._hear_own)
        except Objection as error:
            self._hear_own(self.fault(message.session, error.code, error.message))

    def expire(self, now: float) -> None:
        """Free sessions that nobody asks for."""
        for entry in self.registry.expire(now):
            log.info("session %s: its ingress %s is silent", entry.name, entry.owner.node)
            self._traces.forget(entry.session)
            self._free(entry)
        for early in self._early.expire(now):
            self._take_late(early)

    def take_message(self, sender: Sender, message: SessionMessage, reply: Reply | None) -> None:
        """Take a message in, raising `Objection`; one without `reply` came back from a node that was sent something."""
        session, now = message.session, time.monotonic()
        match message:
            case Opened() | SessionStanding() | Scored() | SessionTrace() | SessionFault():
                self._traces.heard(session, sender.node, message.type)
                self._hear(sender, message)
            case _ if reply is None:
                log.info("session plane: %s sent a %s back", sender.node, message.type)
            case OpenSession():
                self._open_here(sender, message, now)
                if message.trace:
                    self._traces.begin(session, sender)
                    self._traces.heard(session, sender.node, message.type)
                    self._traces.sent(session, sender.node, "opened")
                reply(Opened(session=session))
                for early in self._early.take(session):
                    self._take_late(early)
            case SessionAlive():
                position, is_busy = self.registry.alive(sender, session, now)
                is_busy = is_busy or self._outside.is_waiting(session)
                reply(SessionStanding(session=session, position=position, is_busy=is_busy))
            case CloseSession():
                self._early.take(session)
                self._tell_trace(sender, session, reply)
                for entry in self.registry.close(sender, session):
                    self._free(entry)

    def _tell_trace(self, sender: Sender, session: str, reply: Reply) -> None:
        """Tell another node what was noted of its session."""
        if sender.node != self._me.node:
            for part in self._traces.end(session, sender, most_bytes=self._trace_bytes):
                reply(SessionTrace(session=session, part=part))

    def _open_here(self, sender: Sender, message: OpenSession, now: float) -> None:
        offer = self.offer
        opened = self.registry.open(sender, message, now, epoch=offer.epoch, ranges=offer.segments.keys())
        try:
            for entry in opened:
                segment = offer.segments[entry.range]
                segment.open(entry.name, message.max_tokens)
                self._open[entry.name] = segment
        except (ContextFull, KvBudgetExceeded) as error:
            self._forget(opened)
            raise Objection("context_full" if isinstance(error, ContextFull) else "kv_budget", str(error)) from error
        except RuntimeError as error:
            self._forget(opened)
            if not self._is_device_fault(error):
                raise
            raise Objection("lost", DEVICE_FAILED) from error

    def _forget(self, entries: list[Entry]) -> None:
        for entry in self.registry.forget(entries):
            self._free(entry)

    def _free(self, entry: Entry) -> None:
        """Give a forgotten entry's KV cache back."""
        if (segment := self._open.pop(entry.name, None)) is not None:
            segment.close(entry.name)
        self._outside.forget(entry.session)

    def _hear(self, sender: Sender, message: News) -> None:
        """Hand what a node of a path says to whoever makes the answer; pass a fault on to the ingress if not here."""
        front = self.fronts.find(message.session)
        if front is None:
            if isinstance(message, SessionFault):
                self._pass_fault_on(sender, message)
            return
        self.fronts.hear(front, sender, message)

    def _pass_fault_on(self, sender: Sender, fault: SessionFault) -> None:
        """Tell another node's ingress; one of this node that listens no more has closed the session."""
        entries = self.registry.at(fault.session)
        ingress = entries[0].opened.path.ingress if entries else self._me.node
        if ingress != self._me.node and any(sender.node in {entry.next_node, ingress} for entry in entries):
            self.say(ingress, fault)

    def take_step(self, sender: Sender, header: StepHeader, payload: torch.Tensor, reply: Reply | None = None) -> None:
        """Take a step in, whose frames were checked, raising `Objection`.

        The beginning of a prompt may come before its session is open: it is kept a while, and `reply` told otherwise.
        """
        front = self.fronts.find(header.session)
        self._traces.step_heard(sender.node, header)
        if header.kind == "token" and front is not None and sender.node == front.path.segments[-1].node:
            self.traffic.entered += 1
            came = ring.TokenCame(header.session, header.position, int(payload[0]), header.end)
            self.fronts.note(front, came)
            if header.end or self.registry.find(header.session, header.segment) is None:
                return
        if not self._take_in(sender, header, payload) and not self._early.keep(sender, header, payload, reply):
            self.registry.take(sender, header, payload, time.monotonic())  # which says why not

    def _take_in(self, sender: Sender, header: StepHeader, payload: torch.Tensor) -> bool:
        """Take a step of a session that is open here; False where it is not."""
        entry = self.registry.find(header.session, header.segment)
        if entry is None:
            return False
        if sender != self._me:
            require_fit(header, payload, self._open[entry.name].trunk)
        self.registry.take(sender, header, payload, time.monotonic())
        return True

    def _take_late(self, early: Early) -> None:
        """Take in a step that was kept, or tell whoever sent it why not."""
        try:
            if not self._take_in(early.sender, early.header, early.payload):
                self.registry.take(early.sender, early.header, early.payload, time.monotonic())
        except Objection as error:
            if early.reply is not None:
                early.reply(self.fault(early.header.session, error.code, error.message))

    def run(self, batch: Batch, port: Port) -> None:
        """Run a batch and send on what comes out; the turn may be given up and taken back meanwhile.

        Pieces of one prompt go on in their order: a step returns after the one before it, and whoever ran that one has
        kept the turn until its outcome was sent.
        """
        entries = batch.entries
        segment = self._open[entries[0].name]
        port.begin_step(lambda: all(entry.is_closed for entry in entries))
        failed: Exception | None = None
        try:
            with self._traces.recorded(entry.session for entry in entries):
                output = compute(segment, batch, port)
        except (RequestCancelled, UnknownSession):
            output = None  # closed meanwhile
        except (RuntimeFault, RuntimeError, ValueError, IndexError, MemoryError) as error:
            output, failed = None, error
        finally:
            port.end_step()
        for index, (entry, step) in enumerate(zip(entries, batch.steps, strict=True)):
            self.registry.ran(entry, step)
            if entry.is_closed:
                continue
            if output is None:
                self._fail(entry, failed)
            else:
                self._pass_on(entry, step, output[index : index + 1] if len(entries) > 1 else output, segment)

    def _pass_on(self, entry: Entry, step: Step, output: torch.Tensor, segment: Segment) -> None:
        position, opened = step.position + step.count, entry.opened
        if not entry.is_last:
            size, dtype = output.shape[1], dtype_name(output.dtype)
            header = StepHeader(entry.session, entry.index + 1, step.position, step.count, "hidden", size, dtype)
            self._hop(entry.next_node, header, output)
        elif position >= opened.prompt_tokens:
            token = opened.forced_at(position)
            if token is not None:
                self._score(entry, position, output[-1], token)
            else:
                sampling = Sampling(temperature=opened.temperature, top_p=opened.top_p, seed=opened.seed)
                token = sample(output[-1], sampling, position)
            end: Literal["", "length", "stop"] = ""
            if position + 1 >= opened.max_tokens:
                end = "length"
            elif token in segment.trunk.stop_ids and not opened.forced:
                end = "stop"
            header = StepHeader(entry.session, 0, position, 1, "token", end=end)
            payload, ingress = ids_of((token,)), opened.path.ingress
            if ingress == entry.next_node or not end:
                self._hop(entry.next_node, header, payload)  # first: the next token waits for this
            if ingress != entry.next_node:
                self._send_step(ingress, header, payload)

    def _score(self, entry: Entry, position: int, logits: torch.Tensor, token: int) -> None:
        """Tell the ingress how likely a forced token is; beyond the vocabulary, not at all."""
        log_prob = logits.float().log_softmax(-1)
        nll = -float(log_prob[token]) if token < len(log_prob) else math.inf
        self.say(
            entry.opened.path.ingress, Scored(session=entry.session, position=position, nll=min(nll, _LEAST_LIKELY))
        )

    def _hop(self, node: str, header: StepHeader, payload: torch.Tensor) -> None:
        self.traffic.hops += node != self._me.node
        self._send_step(node, header, payload)

    def _send_step(self, node: str, header: StepHeader, payload: torch.Tensor) -> None:
        if node != self._me.node:
            self._traces.step_sent(node, header)
            self._outside.send_step(node, header, payload)
            return
        try:
            self.take_step(self._me, header, payload)
        except Objection as error:
            self._hear_own(self.fault(header.session, error.code, error.message))

    def _hear_own(self, message: SessionMessage) -> None:
        if isinstance(message, Opened | SessionStanding | Scored | SessionTrace | SessionFault):
            self._hear(self._me, message)

    def fault(self, session: str, code: SessionCode, text: str, exit_code: ExitCode = ExitCode.FAILED) -> SessionFault:
        """Return a fault of this node."""
        code_of = ExitCode.INVALID if code == "context_full" else exit_code
        return SessionFault(session=session, node=self._me.node, code=code, message=text[:2000], exit_code=code_of)

    def _fail(self, entry: Entry, error: Exception | None) -> None:
        """Give a session up that cannot go on here, and tell its ingress why."""
        code: SessionCode = "failed"
        if error is not None and self._is_device_fault(error):
            self._give_up([entry], self.fault(entry.session, "lost", DEVICE_FAILED))
            return
        if isinstance(error, ExpertUnavailable) and entry.range not in self.offer.current:
            code = "stale_epoch"  # the routes of the newer epoch are not made for these layers
        elif not isinstance(error, RuntimeFault):
            log.error("session %s: a step failed", entry.name, exc_info=error)
        text = str(error) if isinstance(error, RuntimeFault) else f"{type(error).__name__}: {error}"
        fault = self.fault(entry.session, code, text, ExitCode(getattr(error, "exit_code", ExitCode.FAILED)))
        self._give_up([entry], fault)

    def _give_up(self, entries: list[Entry], fault: SessionFault) -> None:
        """Forget sessions and tell their ingress the fault, each once."""
        ingresses = {entry.session: entry.opened.path.ingress for entry in entries}
        for session, ingress in ingresses.items():
            self._forget(self.registry.at(session))
            self.say(ingress, fault.model_copy(update={"session": session}))

    def drop_stale(self) -> None:
        """Tell sessions whose range is no longer on offer that it is stale."""
        offer = self.offer
        stale = self.registry.drop(lambda entry: self._open.get(entry.name) is not offer.segments.get(entry.range))
        for entry in stale:
            self._free(entry)
        text = f"its layers are not run here any more; epoch {offer.epoch} is active"
        self._give_up(stale, self.fault(NO_SESSION, "stale_epoch", text))

    def unreachable(self, node: str, session: str) -> None:
        """Tell whoever makes the answer that a node of its path cannot be reached."""
        if (front := self.fronts.find(session)) is not None:
            self.fronts.note(front, ring.Faulted(session, node, "lost", "cannot be reached"))
        elif entries := self.registry.at(session):
            ingress = entries[0].opened.path.ingress
            text = f"cannot be reached from {self._me.node}"
            if ingress != node:
                self.say(ingress, self.fault(session, "lost", text).model_copy(update={"node": node}))
