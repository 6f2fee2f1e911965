"""The session plane of one node: steps come in, run through this node's layer ranges, and go on along their path.

Decides nothing that `sessions` (what is taken, what runs next) or `turns` (who does it) do not. A few threads take
turns: whoever has the turn receives all that is there, runs a step or a batch of them, and sends the result on, with no
hand-over in between; while it waits for experts of other nodes it gives the turn up, if there is something else to do.
What a node says to itself touches no socket. Must not know plans or prompts.

    receive ─► registry ─► next batch ─► step ─► next segment, or sample ─► token to the first segment and the ingress
"""

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

import torch
import zmq

from agent import ring
from agent.errors import RequestCancelled
from agent.links import LIMBO_S, Links
from agent.peers import PeerCaller
from agent.sessions import Batch, Entry, Objection, Range, Registry, Sender, Step
from agent.steps import frames_of, ids_of, incoming, name_of, parse_sender, require_fit, sender_name
from agent.transport import Context, Socket
from agent.turns import Turn
from agent.waiting import Port
from runtime.engine import Keep, Sampling, Segment, prefill_chunks, sample
from runtime.errors import ContextFull, ExpertUnavailable, KvBudgetExceeded, RuntimeFault, UnknownSession
from schemas.messages import Endpoints, RemoteProtocolError
from schemas.outcome import ExitCode
from schemas.plan import TrunkPath
from schemas.sessions import (
    CloseSession,
    Opened,
    OpenSession,
    SessionAlive,
    SessionCode,
    SessionFault,
    SessionMessage,
    SessionStanding,
    StepHeader,
    decode_session,
    encode_session,
    parse_step,
)
from schemas.wire import Limits

log = logging.getLogger(__name__)

STEP_PATIENCE_S: Final = 2.0  # until a step that cannot be sent on is told to the ingress
_IDLE_MS: Final = 100
_RETRY_MS: Final = 2
_TAKE_AT_ONCE: Final = 256
_LOOK_S: Final = 0.5  # between two looks for sessions that nobody asks for
_NO_SESSION: Final = "0" * 32


@dataclass(frozen=True)
class Offer:
    """What this node runs now; replaced whole.

    Attributes
    ----------
    epoch
        That new steps use; 0 before the first plan.
    segments
        Loaded layer ranges.
    current
        Those that the active epoch gives.
    """

    epoch: int = 0
    segments: Mapping[Range, Segment] = field(default_factory=dict)
    current: frozenset[Range] = frozenset()


@dataclass
class Traffic:
    """Counted for heartbeats: tokens that entered here, and what left for the next node of a path."""

    entered: int = 0
    hops: int = 0


@dataclass(frozen=True)
class _Front:
    """An answer that is made for a client here: along which path, and where its events go."""

    path: TrunkPath
    put: Callable[[ring.Event], None]

    @property
    def nodes(self) -> set[str]:
        return {segment.node for segment in self.path.segments}


class SessionPlane:
    """Owns the session ROUTER and the connections to other nodes' planes.

    Methods without underscore may be called by any thread. Everything else runs in the thread that has the turn.

    Parameters
    ----------
    make_caller
        Called once in each worker thread.
    """

    def __init__(
        self,
        context: Context,
        socket: Socket,
        *,
        me: Sender,
        limits: Limits,
        layers: int,
        endpoints: Callable[[], Mapping[str, Endpoints]],
        make_caller: Callable[[], PeerCaller],
        stopped: Callable[[], bool],
    ) -> None:
        self.offer = Offer()
        self.traffic = Traffic()
        self._me = me
        self._socket = socket
        self._limits = limits
        self._make_caller = make_caller
        self._stopped = stopped
        self._registry = Registry(me.node, layers=layers, cut=prefill_chunks)
        self._open: dict[str, Segment] = {}  # by entry name: where its KV cache is
        self._fronts: dict[str, _Front] = {}
        self._orders: deque[Callable[[], None]] = deque()
        self._poller = zmq.Poller()
        self._links = Links(
            context, identity=sender_name(me), endpoints=endpoints, frame_bytes=limits.call_bytes, poller=self._poller
        )
        self._bell = os.eventfd(0, os.EFD_NONBLOCK)
        self._poller.register(socket, zmq.POLLIN)
        self._poller.register(self._bell, zmq.POLLIN)
        self._is_asleep = False
        self._looked_at = 0.0
        self._turn = Turn(self._wake)

    def workers(self, count: int) -> list[threading.Thread]:
        """Return the threads that do the work, not yet started."""
        return [threading.Thread(target=self._work, name=f"segments-{n}", daemon=True) for n in range(count)]

    def close(self) -> None:
        """Say what is left to say and close every socket; all workers must have ended."""
        while self._orders:
            self._orders.popleft()()
        self._links.close()
        self._socket.close()
        os.close(self._bell)

    # --- for the threads that make answers, and the node's own

    def attach(self, session: str, path: TrunkPath, put: Callable[[ring.Event], None]) -> None:
        """Send the events of a session of this ingress to `put`."""
        self._fronts[session] = _Front(path, put)

    def detach(self, session: str) -> None:
        """Send no more events."""
        self._fronts.pop(session, None)

    def tell(self, nodes: tuple[str, ...], message: OpenSession | SessionAlive | CloseSession) -> None:
        """Say something to nodes of a path; what cannot be said soon comes back as a fault."""
        for node in nodes:
            self._order(lambda node=node: self._say(node, message))  # type: ignore[misc]

    def feed(self, node: str, session: str, ids: tuple[int, ...], *, fresh: int) -> None:
        """Send the first segment what it runs first; `fresh` of the tokens were not sent before."""

        def send() -> None:
            self.traffic.entered += fresh
            header = StepHeader(session, 0, 0, len(ids), "ids")
            self._send_step(node, header, ids_of(ids))

        self._order(send)

    def retire(self) -> None:
        """Tell sessions whose range is no longer on offer that it is stale."""
        self._order(self._drop_stale)

    def kept_ranges(self) -> frozenset[Range]:
        """Return ranges of sessions that entered here and run nowhere else: they may end before the range goes."""
        return frozenset(
            entry.range
            for entry in self._registry.snapshot()
            if {entry.opened.path.ingress, *(s.node for s in entry.opened.path.segments)} == {self._me.node}
        )

    @property
    def num_sessions(self) -> int:
        """Sessions open at segments of this node."""
        return len(self._registry)

    def _order(self, act: Callable[[], None]) -> None:
        self._orders.append(act)
        if self._is_asleep:
            self._wake()

    def _wake(self) -> None:
        if self._is_asleep:
            os.eventfd_write(self._bell, 1)

    # --- for whoever has the turn

    def _work(self) -> None:
        """Take turns until stopped; the loop of a worker thread."""
        port = Port(self._make_caller(), self._turn, self._has_other_work)
        try:
            while not self._stopped():
                if self._turn.take_when_free(_IDLE_MS / 1000):
                    try:
                        self._lead(port)
                    finally:
                        self._turn.give()
        finally:
            port.close()

    def _lead(self, port: Port) -> None:
        while not self._stopped() and not self._turn.is_wanted:
            self._receive()
            if (batch := self._registry.next_batch()) is not None:
                self._run(batch, port)

    def _has_other_work(self) -> bool:
        return self._registry.has_others or bool(self._orders)

    def _receive(self) -> None:
        """Take in all that is there; wait for something if there is nothing to do."""
        self._is_asleep = True  # from here on, whoever wants something rings
        waits = not (self._registry.has_work or self._orders or self._turn.is_wanted)
        timeout = (_RETRY_MS if self._links.has_waiting else _IDLE_MS) if waits else 0
        ready = dict(self._poller.poll(timeout))
        self._is_asleep = False
        if self._bell in ready:
            os.eventfd_read(self._bell)
        while self._orders:
            self._orders.popleft()()
        if self._socket in ready:
            self._receive_all()
        for node, frames in self._links.receive(ready):
            self._take(Sender(node, ""), [memoryview(frame) for frame in frames], reply=None)
        self._look()

    def _receive_all(self) -> None:
        for _ in range(_TAKE_AT_ONCE):
            try:
                identity, *frames = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            name = identity.bytes

            def reply(message: SessionMessage, name: bytes = name) -> None:
                try:
                    self._socket.send_multipart([name, encode_session(message)], zmq.NOBLOCK)
                except zmq.ZMQError:
                    log.info("session plane: %s left before its answer", parse_sender(name).node or "somebody")

            self._take(parse_sender(name), [frame.buffer for frame in frames], reply)

    def _look(self) -> None:
        """Do what time asks for."""
        now = time.monotonic()
        if self._links.has_waiting:
            for parcel in self._links.retry(now):
                self._unreachable(parcel.node, parcel.session)
        if now - self._looked_at > _LOOK_S:
            self._looked_at = now
            for entry in self._registry.expire(now):
                log.info("session %s: its ingress %s is silent", entry.name, entry.owner.node)
                self._free(entry)

    def _take(self, sender: Sender, frames: list[memoryview], reply: Callable[[SessionMessage], None] | None) -> None:
        """Take one message in, whatever it is. Without `reply` it came back from a node that was sent something."""
        session = _NO_SESSION
        try:
            if len(frames) == 2 and reply is not None:
                header = parse_step(frames, self._limits)
                session = header.session
                self._take_step(sender, header, incoming(header, frames[1]))
                return
            message = decode_session(frames[0] if len(frames) == 1 else b"")
            session = message.session
            self._take_message(sender, message, reply)
        except (RemoteProtocolError, Objection) as error:
            code = error.code if isinstance(error, Objection) else "refused"
            log.info("session plane: from %s: %s", sender.node or "somebody", error)
            if reply is not None:
                reply(self._fault(session, code, str(error)))

    def _take_message(
        self, sender: Sender, message: SessionMessage, reply: Callable[[SessionMessage], None] | None
    ) -> None:
        session, now = message.session, time.monotonic()
        match message:
            case Opened() | SessionStanding() | SessionFault():
                self._hear(sender, message)
            case _ if reply is None:
                log.info("session plane: %s sent a %s back", sender.node, message.type)
            case OpenSession():
                self._open_here(sender, message, now)
                reply(Opened(session=session))
            case SessionAlive():
                position, is_busy = self._registry.alive(sender, session, now)
                is_busy = is_busy or self._links.is_waiting(session)
                reply(SessionStanding(session=session, position=position, is_busy=is_busy))
            case CloseSession():
                for entry in self._registry.close(sender, session):
                    self._free(entry)

    def _open_here(self, sender: Sender, message: OpenSession, now: float) -> None:
        offer = self.offer
        opened = self._registry.open(sender, message, now, epoch=offer.epoch, ranges=offer.segments.keys())
        try:
            for entry in opened:
                segment = offer.segments[entry.range]
                segment.open(entry.name, message.max_tokens)
                self._open[entry.name] = segment
        except (ContextFull, KvBudgetExceeded) as error:
            for entry in self._registry.forget(opened):
                self._free(entry)
            raise Objection("context_full" if isinstance(error, ContextFull) else "kv_budget", str(error)) from error

    def _free(self, entry: Entry) -> None:
        """Give a forgotten entry's KV cache back."""
        if (segment := self._open.pop(entry.name, None)) is not None:
            segment.close(entry.name)
        self._links.forget(entry.session)

    def _hear(self, sender: Sender, message: Opened | SessionStanding | SessionFault) -> None:
        """Hand what a node of a path says to whoever makes the answer; pass a fault on to the ingress if not here."""
        session, front = message.session, self._fronts.get(message.session)
        if front is None:
            if isinstance(message, SessionFault):
                self._pass_fault_on(sender, message)
            return
        if sender.node not in front.nodes:
            raise Objection("not_yours", f"{sender.node} has no part in this session")
        match message:
            case Opened():
                front.put(ring.OpenedAt(session, sender.node))
            case SessionStanding(is_busy=is_busy):
                front.put(ring.Stood(session, sender.node, is_busy))
            case SessionFault(node=node, code=code, message=text, exit_code=exit_code):
                front.put(ring.Faulted(session, node, code, text, exit_code))

    def _pass_fault_on(self, sender: Sender, fault: SessionFault) -> None:
        entries = self._registry.at(fault.session)
        if any(sender.node in {entry.next_node, entry.opened.path.ingress} for entry in entries):
            self._say(entries[0].opened.path.ingress, fault)

    def _take_step(self, sender: Sender, header: StepHeader, payload: torch.Tensor) -> None:
        front = self._fronts.get(header.session)
        if header.kind == "token" and front is not None and sender.node == front.path.segments[-1].node:
            self.traffic.entered += 1
            front.put(ring.TokenCame(header.session, header.position, int(payload[0]), header.end))
            if header.end or self._registry.find(header.session, header.segment) is None:
                return
        entry = self._registry.find(header.session, header.segment) if sender != self._me else None
        if entry is not None:
            require_fit(header, payload, self._open[entry.name].trunk)
        self._registry.take(sender, header, payload, time.monotonic())

    def _run(self, batch: Batch, port: Port) -> None:
        """Run a batch and send on what comes out; the turn may be given up and taken back meanwhile."""
        entries = batch.entries
        segment = self._open[entries[0].name]
        port.begin_step(lambda: all(entry.is_closed for entry in entries))
        failed: Exception | None = None
        try:
            output = _compute(segment, batch, port)
        except (RequestCancelled, UnknownSession):
            output = None  # closed meanwhile
        except (RuntimeFault, RuntimeError, ValueError, IndexError, MemoryError) as error:
            output, failed = None, error
        finally:
            port.end_step()
        for index, (entry, step) in enumerate(zip(entries, batch.steps, strict=True)):
            self._registry.ran(entry, step)
            if entry.is_closed:
                continue
            if output is None:
                self._fail(entry, failed)
            else:
                self._pass_on(entry, step, output[index : index + 1] if len(entries) > 1 else output, segment)

    def _pass_on(self, entry: Entry, step: Step, output: torch.Tensor, segment: Segment) -> None:
        position, opened = step.position + step.count, entry.opened
        if not entry.is_last:
            header = StepHeader(
                entry.session, entry.index + 1, step.position, step.count, "hidden", output.shape[1], name_of(output)
            )
            self._hop(entry.next_node, header, output)
        elif position >= opened.prompt_tokens:
            sampling = Sampling(temperature=opened.temperature, top_p=opened.top_p, seed=opened.seed)
            token = sample(output[-1], sampling, position)
            end = "length" if position + 1 >= opened.max_tokens else "stop" if token in segment.trunk.stop_ids else ""
            header = StepHeader(entry.session, 0, position, 1, "token", end=end)  # type: ignore[arg-type]
            payload, ingress = ids_of((token,)), opened.path.ingress
            if ingress != entry.next_node:
                self._send_step(ingress, header, payload)
            if ingress == entry.next_node or not end:
                self._hop(entry.next_node, header, payload)

    def _hop(self, node: str, header: StepHeader, payload: torch.Tensor) -> None:
        self.traffic.hops += node != self._me.node
        self._send_step(node, header, payload)

    def _send_step(self, node: str, header: StepHeader, payload: torch.Tensor) -> None:
        if node == self._me.node:
            try:
                self._take_step(self._me, header, payload)
            except Objection as error:
                self._hear_own(self._fault(header.session, error.code, error.message))
        else:
            expires_at = time.monotonic() + STEP_PATIENCE_S
            self._links.send(node, header.session, frames_of(header, payload), expires_at=expires_at)

    def _say(self, node: str, message: SessionMessage) -> None:
        """Say something to a node, this one included."""
        if node == self._me.node:
            try:
                self._take_message(self._me, message, self._hear_own)
            except Objection as error:
                self._hear_own(self._fault(message.session, error.code, error.message))
        else:
            expires_at = time.monotonic() + (STEP_PATIENCE_S if isinstance(message, SessionFault) else LIMBO_S)
            self._links.send(node, message.session, [encode_session(message)], expires_at=expires_at)

    def _hear_own(self, message: SessionMessage) -> None:
        if isinstance(message, Opened | SessionStanding | SessionFault):
            self._hear(self._me, message)

    def _fault(self, session: str, code: SessionCode, text: str, exit_code: ExitCode = ExitCode.FAILED) -> SessionFault:
        code_of = ExitCode.INVALID if code == "context_full" else exit_code
        return SessionFault(session=session, node=self._me.node, code=code, message=text[:2000], exit_code=code_of)

    def _fail(self, entry: Entry, error: Exception | None) -> None:
        """Give a session up that cannot go on here, and tell its ingress why."""
        code: SessionCode = "failed"
        if isinstance(error, ExpertUnavailable) and entry.range not in self.offer.current:
            code = "stale_epoch"  # the routes of the newer epoch are not made for these layers
        elif not isinstance(error, RuntimeFault):
            log.error("session %s: a step failed", entry.name, exc_info=error)
        text = str(error) if isinstance(error, RuntimeFault) else f"{type(error).__name__}: {error}"
        fault = self._fault(entry.session, code, text, ExitCode(getattr(error, "exit_code", ExitCode.FAILED)))
        self._give_up([entry], fault)

    def _give_up(self, entries: list[Entry], fault: SessionFault) -> None:
        """Forget sessions and tell their ingress the fault, each once."""
        ingresses = {entry.session: entry.opened.path.ingress for entry in entries}
        for session, ingress in ingresses.items():
            for entry in self._registry.forget(self._registry.at(session)):
                self._free(entry)
            self._say(ingress, fault.model_copy(update={"session": session}))

    def _drop_stale(self) -> None:
        offer = self.offer
        stale = self._registry.without(offer.segments.keys())
        for entry in stale:
            self._free(entry)
        text = f"its layers are not run here any more; epoch {offer.epoch} is active"
        self._give_up(stale, self._fault(_NO_SESSION, "stale_epoch", text))

    def _unreachable(self, node: str, session: str) -> None:
        """Tell whoever makes the answer that a node of its path cannot be reached."""
        if (front := self._fronts.get(session)) is not None:
            front.put(ring.Faulted(session, node, "lost", "cannot be reached"))
        elif entries := self._registry.at(session):
            ingress = entries[0].opened.path.ingress
            text = f"cannot be reached from {self._me.node}"
            if ingress != node:
                self._say(ingress, self._fault(session, "lost", text).model_copy(update={"node": node}))


def _compute(segment: Segment, batch: Batch, port: Port) -> torch.Tensor:
    """Run a batch: [B, D] or [B, V] for one token of each of B sessions, [T, D] or [1, V] for T tokens of one."""
    entries, steps = batch.entries, batch.steps
    if len(entries) > 1:
        inputs = torch.cat([step.payload for step in steps])
        return segment.step_batch([entry.name for entry in entries], inputs, caller=port)
    entry, step = entries[0], steps[0]
    is_sampled = step.position + step.count >= entry.opened.prompt_tokens
    keep: Keep = "last" if is_sampled else "none"
    return segment.step(entry.name, step.payload, caller=port, combine=entry.opened.combine, keep=keep)
