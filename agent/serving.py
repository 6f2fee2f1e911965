"""Answering expert calls of other nodes: receive, compute, send, in one thread and nothing in between.

Decides which epochs are answered (the fence) and that a bad call gets a typed fault, never a crash. Tensors are made
where the frames lie, after `schemas.wire` has checked every length. Must not know plans or sessions.
"""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

import numpy as np
import torch
import zmq

from agent.transport import Socket
from runtime.errors import ExpertUnavailable, RuntimeFault
from runtime.experts import ExpertCall
from runtime.few import answer_call
from runtime.slots import Residency
from runtime.tensors import dtype_name, torch_dtype
from schemas.messages import RemoteProtocolError
from schemas.wire import AnswerHeader, CallFault, CallHeader, Limits, call_places, pack_answer, pack_fault, parse_call

log = logging.getLogger(__name__)

DEVICE_FAILED: Final = "the device of this node has failed, and its processor takes over"
_SLICE_MS: Final = 100


@dataclass(frozen=True)
class Fence:
    """Epochs whose calls are answered; those below `retired` are stale for ever."""

    retired: int = 0
    served: frozenset[int] = frozenset()
    active: int = 0

    def objection(self, epoch: int) -> CallFault | None:
        """Return why a call of `epoch` is not answered, or None."""
        if epoch in self.served:
            return None
        if epoch < self.retired:
            text = f"epoch {epoch} is retired, this node is at {self.active}"
            return CallFault(code="stale_epoch", message=text, epoch=self.active)
        text = f"epoch {epoch} is not served here (yet), this node is at {self.active}"
        return CallFault(code="unknown_epoch", message=text, epoch=self.active)


@dataclass
class Work:
    """What the server does, for heartbeats: calls begun and ended."""

    begun: int = 0
    ended: int = 0
    fence: Fence = field(default_factory=Fence)


class ExpertServer(threading.Thread):
    """Owns the ROUTER it is given and serves until stopped.

    Parameters
    ----------
    is_device_fault
        Told of errors; says of those that a device made, after which another will do the work: ask again.
    """

    def __init__(
        self,
        socket: Socket,
        residency: Callable[[], Residency],
        limits: Limits,
        work: Work,
        stopped: Callable[[], bool],
        *,
        is_device_fault: Callable[[BaseException], bool] = lambda _: False,
    ) -> None:
        super().__init__(name="experts", daemon=True)
        self._socket = socket
        self._residency = residency
        self._limits = limits
        self._work = work
        self._stopped = stopped
        self._is_device_fault = is_device_fault

    def run(self) -> None:
        """Serve until stopped."""
        socket = self._socket
        socket.setsockopt(zmq.RCVTIMEO, _SLICE_MS)  # quicker than to poll first
        try:
            while not self._stopped():
                try:
                    identity, *frames = socket.recv_multipart(copy=False)
                except zmq.Again:
                    continue
                answer = self._answer(frames[0].buffer if len(frames) == 1 else memoryview(b""))
                if answer is not None:
                    self._send(identity, answer)
        finally:
            socket.close()

    def _send(self, identity: zmq.Frame, answer: bytes) -> None:
        try:
            self._socket.send_multipart([identity, answer], zmq.NOBLOCK, copy=False)
        except zmq.ZMQError as error:
            log.warning("expert plane: an answer could not be sent: %s", error)  # the caller repeats its call

    def _answer(self, frame: memoryview) -> bytes | None:
        try:
            header = parse_call(frame, self._limits)
        except RemoteProtocolError as error:
            log.warning("expert plane: %s", error)
            return None
        self._work.begun += 1
        try:
            return self._compute(header, frame)
        finally:
            self._work.ended += 1

    def _compute(self, header: CallHeader, frame: memoryview) -> bytes:
        if fault := self._work.fence.objection(header.epoch):
            return pack_fault(header.epoch, header.request, fault)
        try:
            call = call_of(header, frame)
            if header.tokens > 1 or not _is_plain(call):
                call.check()
            answer = answer_call(self._residency(), call)
        except ExpertUnavailable as error:
            # an epoch retired since the call was let in is the better reason: the caller follows the newer one
            fault = self._work.fence.objection(header.epoch) or CallFault(code="not_held", message=str(error))
            return pack_fault(header.epoch, header.request, fault)
        except (RuntimeFault, RuntimeError, ValueError, MemoryError) as error:
            if self._is_device_fault(error):
                fault = CallFault(code="unknown_epoch", message=DEVICE_FAILED, epoch=self._work.fence.active)
                return pack_fault(header.epoch, header.request, fault)
            log.exception("a call of epoch %d layer %d failed", header.epoch, header.layer)
            fault = CallFault(code="failed", message=f"{type(error).__name__}: {error}"[:500])
            return pack_fault(header.epoch, header.request, fault)
        rows, size = answer.shape
        reply = AnswerHeader(header.epoch, header.request, dtype_name(answer.dtype), rows, size)
        return pack_answer(reply, answer.contiguous().view(torch.uint8).numpy().data)


def _is_plain(call: ExpertCall) -> bool:
    """Whether a call for one token names each expert once, in order: what `check` finds out, for the common case."""
    experts = call.expert.tolist()
    return not any(call.token.tolist()) and all(a < b for a, b in pairwise(experts))


def call_of(header: CallHeader, frame: memoryview) -> ExpertCall:
    """Make the call of a checked frame.

    Its hidden states are copied, since where bytes lie in a frame decides in which order a sum over them is made.
    """
    token, expert, weights, states, end = call_places(header)
    hidden = torch.frombuffer(frame[states:end], dtype=torch_dtype(header.dtype)).clone()
    weight = torch.frombuffer(frame[weights:states], dtype=torch_dtype(header.weight_dtype))
    return ExpertCall(
        holder="",
        epoch=header.epoch,
        layer=header.layer,
        combine=header.combine,
        hidden=hidden.view(header.tokens, header.hidden_size),
        token=np.frombuffer(frame[token:expert], dtype=np.int32),
        expert=np.frombuffer(frame[expert:weights], dtype=np.int32),
        weight=weight,
    )
