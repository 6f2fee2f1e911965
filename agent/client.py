"""What `agent generate` does: finds the node, sends the prompt, yields text as it comes.

Decides when a silent agent is given up and keeps the agent told that somebody still reads. Needs no torch.
"""

import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import zmq

from agent.errors import AgentError, CoordinatorAbsent, Refused
from agent.transport import Context, Socket, connect, make_socket
from schemas.address import InvalidAddress, parse_address, require_loopback
from schemas.messages import (
    Alive,
    BudgetChanged,
    BudgetRequest,
    Cancel,
    Endpoints,
    Failed,
    Finished,
    Generated,
    GenerateRequest,
    Located,
    LocateRequest,
    Message,
    Refusal,
    RemoteProtocolError,
    Traced,
    decode,
    encode,
)
from schemas.tracing import TracePart
from schemas.wire import SHUTDOWN_LINGER_MS

FIRST_ANSWER_S: Final = 3.0
SILENCE_S: Final = 120.0
BUDGET_S: Final = 30.0
ABSENCE_S: Final = 3.0
_ALIVE_S: Final = 1.0


@dataclass
class Answer:
    """What came back so far."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    nll: list[float] = field(default_factory=list)
    finished: Finished | None = None
    note: dict[str, Any] = field(default_factory=dict)
    trace: list[TracePart] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        """Return it as one JSON document."""
        end = self.finished
        decode_s = end.seconds - end.prefill_s if end else 0.0
        return {
            "text": self.text,
            "tokens": self.tokens,
            "reason": end.reason if end else None,
            "prompt_tokens": end.prompt_tokens if end else None,
            "seconds": end.seconds if end else None,
            "prefill_s": end.prefill_s if end else None,
            "tokens_per_s": (len(self.tokens) - 1) / decode_s if len(self.tokens) > 1 and decode_s > 0 else None,
            **self.note,
        }


def stream(
    node: str, coordinator: str, answer: Answer, *, where: Endpoints | None = None, **wanted: Any
) -> Iterator[str]:
    """Yield pieces of text, filling `answer` meanwhile. Closing it, or an exception in between, cancels the request.

    The coordinator is asked where the agent of `node` listens, unless `where` says it.
    """
    context: Context = zmq.Context()
    try:
        where = where or locate(context, node, coordinator)
        socket = make_socket(context, zmq.DEALER, "control")
        connect(socket, where.address, where.client)
        request = GenerateRequest(request=uuid.uuid4().hex, **wanted)
        if not socket.poll(round(FIRST_ANSWER_S * 1000), zmq.POLLOUT):
            raise AgentError(f"the agent of {node} does not answer at {where.address}:{where.client}")
        socket.send(encode(request))
        try:
            yield from _pieces(socket, node, request.request, answer)
        except BaseException:
            _send_if_there(socket, Cancel(request=request.request))
            raise
    finally:
        context.destroy(linger=SHUTDOWN_LINGER_MS)


def change_budget(node: str, coordinator: str, device: int) -> BudgetChanged:
    """Tell the agent of a node how many bytes of its device it may take; raises `Refused` where that is too little."""
    context: Context = zmq.Context()
    try:
        where = locate(context, node, coordinator)
        socket = make_socket(context, zmq.DEALER, "control")
        connect(socket, where.address, where.client)
        answer = None
        if socket.poll(round(FIRST_ANSWER_S * 1000), zmq.POLLOUT):
            socket.send(encode(BudgetRequest(device=device)))
            answer = _receive(socket, BUDGET_S)
    finally:
        context.destroy(linger=SHUTDOWN_LINGER_MS)
    match answer:
        case BudgetChanged():
            return answer
        case Refusal(code=code, message=text):
            raise Refused(f"{node}: {text}", code)
        case _:
            raise AgentError(f"the agent of {node} does not answer at {where.address}:{where.client}")


def locate(context: Context, node: str, coordinator: str) -> Endpoints:
    """Ask the coordinator where a node's agent listens; raises `CoordinatorAbsent` or `Refused`."""
    try:
        address = parse_address(coordinator)
        require_loopback(address.host)
    except InvalidAddress as error:
        raise CoordinatorAbsent(f"coordinator: {error}") from error
    socket = make_socket(context, zmq.DEALER, "control")
    try:
        connect(socket, address.host, address.port)
        answer = None
        if socket.poll(round(FIRST_ANSWER_S * 1000), zmq.POLLOUT):
            socket.send(encode(LocateRequest(node=node)))
            answer = _receive(socket, FIRST_ANSWER_S)
    finally:
        socket.close()
    match answer:
        case Located(peer=peer):
            return peer.endpoints
        case Refusal(code=code, message=text):
            raise Refused(text, code)
        case _:
            raise CoordinatorAbsent(
                f"no coordinator answers at {address}; start it with planner serve TOPOLOGY, or name it with "
                "--coordinator HOST:PORT"
            )


def _pieces(socket: Socket, node: str, request: str, answer: Answer) -> Iterator[str]:
    heard = connected = time.monotonic()
    said = 0.0
    while True:
        message = _receive(socket, _ALIVE_S)
        now = time.monotonic()
        if now - said >= _ALIVE_S and _send_if_there(socket, Alive(request=request)):
            said = connected = now
        match message:
            case Generated(token=token, text=text, nll=nll):
                heard = now
                answer.tokens.append(token)
                if nll is not None:
                    answer.nll.append(nll)
                answer.text += text
                yield text
            case Traced(part=part):
                heard = now
                answer.trace.append(part)
            case Finished():
                answer.finished = message
                answer.text += message.text
                yield message.text
                return
            case Failed(code=code, message=text) | Refusal(code=code, message=text):
                raise Refused(f"{node}: {text}", code)
            case _:
                pass
        if now - connected > ABSENCE_S:
            raise AgentError(f"the agent of {node} is gone; the answer is not complete, ask again")
        if now - heard > SILENCE_S:
            raise AgentError(f"the agent of {node} has sent nothing for {SILENCE_S:.0f} s; see planner status")


def _send_if_there(socket: Socket, message: Message) -> bool:
    """Send if the agent is connected; nothing waits for one that is away."""
    try:
        socket.send(encode(message), zmq.NOBLOCK)
    except zmq.Again:
        return False
    return True


def _receive(socket: Socket, timeout_s: float) -> Message | None:
    if not socket.poll(round(timeout_s * 1000)):
        return None
    try:
        return decode(socket.recv(zmq.NOBLOCK))
    except RemoteProtocolError as error:
        raise AgentError(f"whoever answers there speaks another protocol: {error}") from error
