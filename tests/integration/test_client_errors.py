"""`agent generate` against agents that follow a script: one message each, and never a hang."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest
import zmq

from agent import client
from agent.client import Answer, stream
from agent.errors import AgentError, CoordinatorAbsent, Refused
from agent.transport import bind, make_socket
from schemas import messages as msg
from schemas.address import Address
from schemas.outcome import ExitCode
from tests.cluster import wait_for

Reply = Callable[[msg.Message], list[msg.Message]]


class Peer(threading.Thread):
    """A coordinator and an agent in one socket: answers each message with what `reply` says."""

    def __init__(self, context: zmq.Context, reply: Reply) -> None:
        super().__init__(daemon=True)
        self.socket = make_socket(context, zmq.ROUTER, "control")
        self.port = bind(self.socket, Address("127.0.0.1", 0), "peer")
        self.reply, self.over, self.heard = reply, threading.Event(), []
        self.start()

    def run(self) -> None:
        while not self.over.is_set():
            if self.socket.poll(20):
                identity, frame = self.socket.recv_multipart()
                message = msg.decode(frame)
                self.heard.append(message)
                for answer in self.answers(message):
                    with suppress(zmq.ZMQError):  # the client has left
                        self.socket.send_multipart(
                            [identity, answer if isinstance(answer, bytes) else msg.encode(answer)]
                        )
        self.socket.close()

    def answers(self, message: msg.Message) -> list[msg.Message]:
        if isinstance(message, msg.LocateRequest):
            here = msg.Endpoints(address="127.0.0.1", expert=1, weights=1, client=self.port, session=1)
            return [msg.Located(peer=msg.Peer(node=message.node, endpoints=here))]
        return self.reply(message) if not isinstance(message, msg.Alive) else []

    def stop(self) -> None:
        self.over.set()
        self.join()


@contextmanager
def peer(reply: Reply) -> Iterator[Peer]:
    context = zmq.Context()
    made = Peer(context, reply)
    try:
        yield made
    finally:
        made.stop()
        context.destroy(linger=0)


def ask(there: Peer, answer: Answer | None = None) -> str:
    return "".join(stream("n0", f"127.0.0.1:{there.port}", answer or Answer(), prompt="x"))


def generated(request: str, index: int, text: str) -> msg.Generated:
    return msg.Generated(request=request, index=index, token=index, text=text)


def test_an_answer_is_what_came() -> None:
    def reply(message: msg.Message) -> list[msg.Message]:
        end = msg.Finished(
            request=message.request, text="!", reason="length", prompt_tokens=1, tokens=2, seconds=2.0, prefill_s=1.0
        )
        return [generated(message.request, 0, "a"), generated(message.request, 1, "b"), end]

    answer = Answer()
    with peer(reply) as there:
        assert ask(there, answer) == "ab!" == answer.text
        assert not any(isinstance(message, msg.Cancel) for message in there.heard)
    assert answer.document()["tokens_per_s"] == 1.0


@pytest.mark.parametrize("code", [ExitCode.FAILED, ExitCode.INVALID])
def test_a_failure_carries_its_code_and_what_came_before_is_kept(code: ExitCode) -> None:
    def reply(message: msg.Message) -> list[msg.Message]:
        if isinstance(message, msg.Cancel):
            return []
        failed = msg.Failed(request=message.request, code=code, message="no answer from n1")
        return [generated(message.request, 0, "a"), failed]

    answer = Answer()
    with peer(reply) as there, pytest.raises(Refused, match="n0: no answer from n1") as caught:
        ask(there, answer)
    assert caught.value.exit_code is code
    assert answer.tokens == [0]


def test_silence_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "SILENCE_S", 0.3)
    monkeypatch.setattr(client, "_ALIVE_S", 0.1)
    with peer(lambda _: []) as there:
        with pytest.raises(AgentError, match="has sent nothing for"):
            ask(there)
        wait_for(lambda: isinstance(there.heard[-1], msg.Cancel), timeout_s=10, what="no cancellation came")


def test_another_protocol_is_told() -> None:
    with peer(lambda _: [b"HTTP/1.1 400"]) as there, pytest.raises(AgentError, match="another protocol"):
        ask(there)


def test_nobody_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "FIRST_ANSWER_S", 0.2)
    with peer(lambda _: []) as there:
        there.stop()
        with pytest.raises(CoordinatorAbsent, match="no coordinator answers") as caught:
            ask(there)
    assert caught.value.exit_code is ExitCode.INVALID
    with pytest.raises(CoordinatorAbsent, match="is not HOST:PORT"):
        list(stream("n0", "nowhere", Answer(), prompt="x"))
