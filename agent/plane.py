"""The session plane of one node: its sockets, and the threads that take turns at them.

Whoever has the turn receives all that is there, runs a step or a batch of them, and sends the result on, with no
hand-over in between; while it waits for experts of other nodes it gives the turn up, if there is something else to do.
One thread only listens: it has the turn while all others wait, so that the node answers even then.
Decides nothing that `sessions` (what is taken, what runs next) or `turns` (who does it) do not. Must not know plans,
prompts or layers.

    receive ─► registry ─► next batch ─► step ─► next segment, or sample ─► token to the first segment and the ingress
"""

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Final

import torch
import zmq

from agent import ring
from agent.early import Reply
from agent.links import LIMBO_S, Links
from agent.offer import Offer, Traffic
from agent.peers import PeerCaller
from agent.segments import NO_SESSION, Segments
from agent.sessions import Objection, Range, Sender
from agent.steps import frame_of, incoming, parse_sender, sender_name
from agent.tracing import PutTrace
from agent.transport import Context, Socket
from agent.turns import Turn
from agent.waiting import Port
from schemas.messages import Endpoints, RemoteProtocolError
from schemas.plan import TrunkPath
from schemas.sessions import (
    CloseSession,
    OpenSession,
    SessionAlive,
    SessionFault,
    SessionMessage,
    StepHeader,
    decode_session,
    encode_session,
    is_step,
    parse_step,
    session_of_step,
)
from schemas.tracing import TracePart
from schemas.wire import Limits

log = logging.getLogger(__name__)

STEP_PATIENCE_S: Final = 2.0  # until a step that cannot be sent on is told to the ingress
_IDLE_MS: Final = 100
_RETRY_MS: Final = 2
_TAKE_AT_ONCE: Final = 256
_LOOK_S: Final = 0.5  # between two looks for sessions that nobody asks for


class SessionPlane:
    """Owns the session ROUTER and the connections to other nodes' planes.

    Methods without underscore may be called by any thread. Everything else runs in the thread that has the turn.

    Parameters
    ----------
    layers
        Decoder layers of the model.
    make_caller
        Called once in each worker thread.
    device, is_device_fault
        See `Segments`.
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
        device: str = "cpu",
        is_device_fault: Callable[[BaseException], bool] = lambda _: False,
    ) -> None:
        self._socket = socket
        self._limits = limits
        self._make_caller = make_caller
        self._stopped = stopped
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
        self._segments = Segments(
            me,
            layers=layers,
            outside=_Outside(self._links),
            device=device,
            frame_bytes=limits.call_bytes,
            is_device_fault=is_device_fault,
        )

    def workers(self, count: int) -> list[threading.Thread]:
        """Return `count` threads that do the work and one that listens, not yet started."""
        workers = [threading.Thread(target=self._work, name=f"segments-{n}", daemon=True) for n in range(count)]
        return [*workers, threading.Thread(target=self._listen, name="segments-listener", daemon=True)]

    def close(self) -> None:
        """Say what is left to say and close every socket; all workers must have ended."""
        while self._orders:
            self._orders.popleft()()
        self._links.close()
        self._socket.close()
        os.close(self._bell)

    @property
    def offer(self) -> Offer:
        """What this node runs now."""
        return self._segments.offer

    def run_now(self, offer: Offer) -> None:
        """Offer these layers from now on; sessions at others are told that they are stale."""
        self._segments.offer = offer
        self._order(self._segments.drop_stale)

    @property
    def traffic(self) -> Traffic:
        """What went through, as counted."""
        return self._segments.traffic

    def attach(
        self, session: str, path: TrunkPath, put: Callable[[ring.Event], None], put_trace: PutTrace | None = None
    ) -> None:
        """Send the events of a session of this ingress to `put`, and what other nodes note of it to `put_trace`."""
        self._segments.attach(session, path, put, put_trace)

    def detach(self, session: str) -> None:
        """Send no more events."""
        self._segments.detach(session)

    def trace_of(self, session: str) -> list[TracePart]:
        """Return what was noted here of a session of this ingress, and forget it."""
        return self._segments.trace_of(session)

    def tell(self, nodes: tuple[str, ...], message: OpenSession | SessionAlive | CloseSession) -> None:
        """Say something to nodes of a path; what cannot be said soon comes back as a fault."""
        for node in nodes:
            self._order(lambda node=node: self._segments.say(node, message))  # type: ignore[misc]

    def feed(self, node: str, session: str, ids: tuple[int, ...], *, fresh: int) -> None:
        """Send the first segment what it runs first; `fresh` of the tokens were not sent before."""
        self._order(lambda: self._segments.feed(node, session, ids, fresh=fresh))

    def ranges_of_own(self) -> frozenset[Range]:
        """Return ranges of sessions that entered here and run nowhere else: they may end before the range goes."""
        return self._segments.ranges_of_own()

    def _order(self, act: Callable[[], None]) -> None:
        self._orders.append(act)
        if self._is_asleep:
            self._wake()

    def _wake(self) -> None:
        if self._is_asleep:
            os.eventfd_write(self._bell, 1)

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

    def _listen(self) -> None:
        """Receive while all workers wait, until stopped."""
        while not self._stopped():
            if self._turn.listen_when_free(_IDLE_MS / 1000):
                try:
                    while not (self._stopped() or self._turn.is_better_placed):
                        self._receive(may_run=False)
                        self._segments.fronts.tell()
                finally:
                    self._turn.give()

    def _lead(self, port: Port) -> None:
        while not self._stopped() and not self._turn.is_wanted:
            self._receive()
            if (batch := self._segments.registry.next_batch()) is not None:
                if batch.steps[0].count > 1:
                    self._segments.fronts.tell()  # a piece of a prompt takes too long to wait for
                self._segments.run(batch, port)
            self._segments.fronts.tell()

    def _has_other_work(self) -> bool:
        return self._segments.registry.has_others or bool(self._orders)

    def _receive(self, *, may_run: bool = True) -> None:
        """Take in all that is there; wait for something if there is nothing to do."""
        self._is_asleep = True  # from here on, whoever wants something rings
        waits = not (may_run and self._segments.registry.has_work) and not (self._orders or self._turn.is_wanted)
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
            self._take(Sender(node, ""), memoryview(frames[0] if len(frames) == 1 else b""), reply=None)
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

            self._take(parse_sender(name), frames[0].buffer if len(frames) == 1 else memoryview(b""), reply)
            if not int(self._socket.get(zmq.EVENTS)) & zmq.POLLIN:
                return  # quicker than to be told by an exception

    def _look(self) -> None:
        """Do what time asks for."""
        now = time.monotonic()
        if self._links.has_waiting:
            for parcel in self._links.retry(now):
                self._segments.unreachable(parcel.node, parcel.session)
        if now - self._looked_at > _LOOK_S:
            self._looked_at = now
            self._segments.expire(now)

    def _take(self, sender: Sender, frame: memoryview, reply: Reply | None) -> None:
        """Take one message in, whatever it is. Without `reply` it came back from a node that was sent something."""
        session = NO_SESSION
        try:
            if is_step(frame) and reply is not None:
                session = session_of_step(frame) or NO_SESSION
                header = parse_step(frame, self._limits)
                self._segments.take_step(sender, header, incoming(header, frame), reply)
                return
            message = decode_session(frame)
            session = message.session
            self._segments.take_message(sender, message, reply)
        except (RemoteProtocolError, Objection) as error:
            code = error.code if isinstance(error, Objection) else "refused"
            log.info("session plane: from %s: %s", sender.node or "somebody", error)
            if reply is not None:
                reply(self._segments.fault(session, code, str(error)))


class _Outside:
    """What segments see of the connections."""

    def __init__(self, links: Links) -> None:
        self.is_waiting = links.is_waiting
        self.forget = links.forget
        self._links = links

    def send_step(self, node: str, header: StepHeader, payload: torch.Tensor) -> None:
        """Send a step on; the ingress is told if it cannot be sent for a while."""
        expires_at = time.monotonic() + STEP_PATIENCE_S
        self._links.send(node, header.session, frame_of(header, payload), expires_at=expires_at)

    def send_message(self, node: str, message: SessionMessage) -> None:
        """Say something; all but faults are repeated anyway."""
        expires_at = time.monotonic() + (STEP_PATIENCE_S if isinstance(message, SessionFault) else LIMBO_S)
        self._links.send(node, message.session, encode_session(message), expires_at=expires_at)
