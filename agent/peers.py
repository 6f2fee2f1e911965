"""Expert calls from this node: one DEALER per compute thread and holder, so that no call waits for another thread.

Decides when a call is repeated, where its rows go when a holder does not answer, and when to give up: next replica,
the same holder again once it is back, then a typed error that names layer, expert and holder. A call changes nothing
at the holder, so repeating one is harmless; answers to calls that nobody waits for are dropped by their id.
Must not know the model: it carries rows to holders and answers back.
"""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, NoReturn

import numpy as np
import torch
import zmq

from agent.errors import HolderUnreachable, RequestCancelled
from agent.routes import EpochRoutes
from agent.transport import Context, Socket, connect, is_connected, make_socket
from runtime.experts import ExpertCall
from runtime.few import answer_call
from runtime.slots import Residency
from runtime.tensors import dtype_name, torch_dtype
from schemas.messages import Endpoints, RemoteProtocolError
from schemas.wire import (
    ANSWER_HEADER_BYTES,
    AnswerHeader,
    CallFault,
    CallHeader,
    FaultHeader,
    Limits,
    pack_call,
    parse_answer,
)

log = logging.getLogger(__name__)

_SLICE_MS: Final = 200  # how often a wait looks whether the connection still stands
_PAUSE_S: Final = 0.05


@dataclass(frozen=True)
class Patience:
    """How long a call may take.

    Attributes
    ----------
    answer_s
        For the whole call to one holder, however often it is repeated.
    absence_s
        Without a connection to a holder that alone has the expert, or until a newer epoch says who has it: long
        enough for an agent to restart.
    repeat_s
        Until a call is sent again to a holder that is connected but silent, since a connection that breaks loses what
        is under way; each time twice as long.
    """

    answer_s: float = 30.0
    absence_s: float = 10.0
    repeat_s: float = 2.0


class _Holder:
    """A connection to one holder."""

    def __init__(self, name: str, socket: Socket, where: Endpoints) -> None:
        self.name = name
        self.socket = socket
        self.where = where

    @property
    def is_connected(self) -> bool:
        """Whether a peer is there; not over a socket that was replaced because the holder has moved."""
        return not self.socket.closed and is_connected(self.socket)


class PeerCaller:
    """The port through which one compute thread calls experts elsewhere. Belongs to that thread.

    Parameters
    ----------
    endpoints
        Where each node listens now.
    routes
        The newest epoch's routes, for rows that must go elsewhere than first meant.
    residency
        Returns where rows are computed that in the newest epoch are this node's own.
    """

    def __init__(
        self,
        context: Context,
        *,
        endpoints: Callable[[], Mapping[str, Endpoints]],
        routes: Callable[[], EpochRoutes],
        residency: Callable[[], Residency],
        limits: Limits,
        patience: Patience,
    ) -> None:
        self._context = context
        self._endpoints = endpoints
        self._routes = routes
        self._residency = residency
        self._limits = limits
        self._patience = patience
        self._holders: dict[str, _Holder] = {}
        self._answers: dict[int, zmq.Frame] = {}
        self._awaited: set[int] = set()
        self._next_id = 1
        self.is_cancelled: Callable[[], bool] = lambda: False
        self.when_late: Callable[[], None] = lambda: None  # called when an answer is not there within a slice

    def begin(self, call: ExpertCall) -> "Pending":
        """Send a call; its answer is taken with `result`."""
        pending = Pending(self, call, self._next_id)
        self._next_id += 1
        self._awaited.add(pending.request)
        self._send(pending)
        return pending

    def forget_all(self) -> None:
        """Drop calls that nobody will ask for any more: their step has failed."""
        self._awaited.clear()
        self._answers.clear()

    def close(self) -> None:
        """Close every connection at once."""
        for holder in self._holders.values():
            holder.socket.close()
        self._holders.clear()

    def holder(self, name: str) -> _Holder | None:
        """Return the connection to a holder, made anew where its address has changed; None if it is not known."""
        where = self._endpoints().get(name)
        known = self._holders.get(name)
        if known is not None and (where is None or where is known.where or where == known.where):
            return known
        if where is None:
            return None
        if known is not None:
            known.socket.close()
        socket = make_socket(self._context, zmq.DEALER, "expert", frame_bytes=self._limits.call_bytes)
        socket.setsockopt(zmq.RCVTIMEO, _SLICE_MS)
        connect(socket, where.address, where.expert)
        socket.poll(_SLICE_MS, zmq.POLLOUT)  # the first call would find no connection yet
        self._holders[name] = _Holder(name, socket, where)
        return self._holders[name]

    def _send(self, pending: "Pending") -> None:
        holder = self.holder(pending.call.holder)
        pending.sent_over = None
        if holder is None:
            return
        try:
            holder.socket.send(pending.frame, zmq.NOBLOCK, copy=False)
            pending.sent_over = holder
        except zmq.Again:
            return  # not connected; `result` decides what to do

    def take(self, pending: "Pending") -> torch.Tensor:
        """Wait for an answer, repeating the call or sending its rows elsewhere as needed."""
        frame = self._answers.pop(pending.request, None) or self._receive(pending)
        header = self._parsed(frame, pending) if frame else None
        if frame and isinstance(header, AnswerHeader):
            self._awaited.discard(pending.request)
            return _tensor(header, frame)
        return self._insist(pending, header.fault if isinstance(header, FaultHeader) else None)

    def _receive(self, pending: "Pending") -> zmq.Frame | None:
        """Return the frame of the answer, setting aside those of other calls under way; None after a slice."""
        holder = pending.sent_over
        if holder is None or holder.socket.closed:
            return None
        try:
            while True:
                frame, *more = holder.socket.recv_multipart(copy=False)  # waits a slice; quicker than to poll first
                request = 0 if more else _request_of(frame.buffer)
                if request == pending.request:
                    return frame
                if request in self._awaited:
                    self._answers[request] = frame
        except zmq.Again:
            return None

    def _parsed(self, frame: zmq.Frame, pending: "Pending") -> AnswerHeader | FaultHeader:
        try:
            return parse_answer(frame.buffer, self._limits)
        except RemoteProtocolError as error:
            fault = CallFault(code="failed", message=str(error))
            return FaultHeader(pending.call.epoch, pending.request, fault)

    def _insist(self, pending: "Pending", fault: CallFault | None) -> torch.Tensor:
        """Get the answer although the first try brought a fault, or nothing yet."""
        self.when_late()
        began = seen = repeated = time.monotonic()
        pause_s = self._patience.repeat_s
        while True:
            if self.is_cancelled():
                raise RequestCancelled("the request was cancelled")
            now = time.monotonic()
            connected = pending.sent_over is not None and pending.sent_over.is_connected
            if connected and fault is None:
                seen = now
            if (reason := self._reason_to_leave(pending, fault, now - began, now - seen)) is not None:
                return self._elsewhere(pending, reason)
            if fault is not None or not connected:
                time.sleep(_PAUSE_S)
                self._send(pending)
            elif now - repeated > pause_s:
                self._send(pending)
                repeated, pause_s = now, 2 * pause_s
            frame = self._answers.pop(pending.request, None) or self._receive(pending)
            header = self._parsed(frame, pending) if frame else None
            if frame and isinstance(header, AnswerHeader):
                self._awaited.discard(pending.request)
                return _tensor(header, frame)
            fault = header.fault if isinstance(header, FaultHeader) else None

    def _reason_to_leave(
        self, pending: "Pending", fault: CallFault | None, waited_s: float, absent_s: float
    ) -> CallFault | None:
        """Return why the rows of a call go elsewhere now, or None to go on with its holder; raises to give up."""
        patience = self._patience
        if fault is not None and fault.code == "stale_epoch" and self._routes().epoch > pending.call.epoch:
            return fault
        has_others = self._others(pending)
        if fault is not None:
            if has_others:
                return fault
            if fault.code not in {"stale_epoch", "unknown_epoch"}:
                self._fail(pending, fault.message)  # to ask again would bring the same
        elif has_others and (pending.sent_over is None or not pending.sent_over.is_connected):
            return CallFault(code="failed", message="the connection is lost")
        if waited_s > patience.answer_s:
            if has_others:
                return CallFault(code="failed", message=f"silent for {patience.answer_s:.0f} s")
            self._fail(pending, f"silent for {patience.answer_s:.0f} s")
        if absent_s > patience.absence_s:
            self._fail(pending, fault.message if fault else f"not there for {patience.absence_s:.0f} s")
        return None

    def _others(self, pending: "Pending") -> bool:
        """Whether every row of a call has another node to go to."""
        return all(self._next(key, pending.tried) is not None for key in pending.keys)

    def _next(self, key: tuple[int, int], tried: frozenset[str]) -> str | None:
        """Return the node to try next for an expert: "" for this one, None if there is none."""
        routes = self._routes()
        if key in routes.local:
            return ""
        return next((n for n in routes.holders.get(key, ()) if n not in tried and self.holder(n)), None)

    def _elsewhere(self, pending: "Pending", fault: CallFault) -> torch.Tensor:
        """Send every row to the next node that holds its expert in the newest epoch, and add up what comes back."""
        self._awaited.discard(pending.request)
        call, routes = pending.call, self._routes()
        is_newer = routes.epoch > call.epoch
        tried = frozenset() if is_newer else pending.tried  # the same holder may be right under a newer epoch
        log.warning("layer %d: %s: %s", call.layer, call.holder, fault.message)
        groups: dict[str, list[int]] = {}
        for row, expert in enumerate(call.expert.tolist()):
            target = self._next((call.layer, expert), tried)
            if target is None:
                self._fail(pending, fault.message)
            groups.setdefault(target, []).append(row)
        parts = [(rows, self._regrouped(call, target, rows, routes.epoch, tried)) for target, rows in groups.items()]
        answer = torch.zeros(call.answer_shape, dtype=call.answer_dtype)
        for rows, (part, token, under_way) in parts:
            got = under_way.result() if under_way is not None else answer_call(self._residency(), part)
            index = torch.tensor(rows) if call.combine == "ordered" else torch.from_numpy(token)
            answer.index_add_(0, index, got)
        return answer

    def _regrouped(
        self, call: ExpertCall, target: str, rows: list[int], epoch: int, tried: frozenset[str]
    ) -> tuple[ExpertCall, np.ndarray, "Pending | None"]:
        """Make and begin the call for some rows; `target` "" is this node."""
        token, position = np.unique(call.token[rows], return_inverse=True)
        part = ExpertCall(
            holder=target,
            epoch=epoch,
            layer=call.layer,
            combine=call.combine,
            hidden=call.hidden[torch.from_numpy(token)],
            token=position.astype(np.int32),
            expert=call.expert[rows],
            weight=call.weight[torch.tensor(rows)],
        )
        if not target:
            return part, token, None
        under_way = self.begin(part)
        under_way.tried = tried | {target}
        return part, token, under_way

    def _fail(self, pending: "Pending", reason: str) -> NoReturn:
        self._awaited.discard(pending.request)
        call = pending.call
        raise HolderUnreachable(call.layer, tuple(sorted(set(call.expert.tolist()))), call.holder, reason)


class Pending:
    """A call under way."""

    def __init__(self, caller: PeerCaller, call: ExpertCall, request: int) -> None:
        self.call = call
        self.request = request
        self.tried = frozenset({call.holder})
        self.sent_over: _Holder | None = None
        self.frame = _frame(call, request)
        self._caller = caller

    @property
    def keys(self) -> set[tuple[int, int]]:
        """(layer, expert) of every row."""
        return {(self.call.layer, expert) for expert in self.call.expert.tolist()}

    def result(self) -> torch.Tensor:
        """Block until the answer is there; raises `HolderUnreachable`."""
        return self._caller.take(self)


def _frame(call: ExpertCall, request: int) -> bytes:
    hidden = call.hidden if call.hidden.is_contiguous() else call.hidden.contiguous()
    tokens, size = hidden.shape
    header = CallHeader(
        epoch=call.epoch,
        request=request,
        layer=call.layer,
        combine=call.combine,
        dtype=dtype_name(hidden.dtype),
        weight_dtype=dtype_name(call.weight.dtype),
        tokens=tokens,
        rows=len(call.token),
        hidden_size=size,
    )
    return pack_call(
        header,
        call.token.astype(np.int32, copy=False).data,
        call.expert.astype(np.int32, copy=False).data,
        call.weight.contiguous().view(torch.uint8).numpy().data,
        hidden.view(torch.uint8).numpy().data,
    )


def _tensor(header: AnswerHeader, frame: zmq.Frame) -> torch.Tensor:
    """Read the rows where they lie in the frame: nothing is copied."""
    flat = torch.frombuffer(frame.buffer, dtype=torch_dtype(header.dtype), offset=ANSWER_HEADER_BYTES)
    return flat.view(header.rows, header.hidden_size)


def _request_of(head: memoryview) -> int:
    """Return the request id of an answer without trusting the rest of it; 0 where there is none."""
    return int.from_bytes(head[12:20], "little") if len(head) >= 20 else 0
