"""Expert calls over real sockets against holders that follow a script: repeated, rerouted, given up."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import zmq

from agent.errors import HolderUnreachable
from agent.peers import Patience, PeerCaller
from agent.routes import EpochRoutes
from agent.transport import bind, make_socket
from runtime.experts import ExpertCall
from runtime.routing import Routing
from schemas.address import Address
from schemas.messages import Endpoints
from schemas.wire import AnswerHeader, CallFault, Limits, call_places, pack_answer, pack_fault, parse_call

LIMITS = Limits(layers=1, experts=4, top_k=2, hidden_size=2, tokens=8)
Script = Callable[[int, int], CallFault | str | None]  # (epoch, how many calls before) -> fault, None: answer, "silent"


class Holder(threading.Thread):
    """Answers a call with its hidden states, or with what the script says."""

    def __init__(self, context: zmq.Context, script: Script, port: int = 0) -> None:
        super().__init__(daemon=True)
        self.socket = make_socket(context, zmq.ROUTER, "expert", frame_bytes=LIMITS.call_bytes)
        port = bind(self.socket, Address("127.0.0.1", port), "holder")
        self.endpoints = Endpoints(address="127.0.0.1", expert=port, weights=1, client=1, session=1)
        self.script, self.is_over, self.epochs = script, threading.Event(), []
        self.start()

    def run(self) -> None:
        while not self.is_over.is_set():
            if not self.socket.poll(20):
                continue
            identity, frame = self.socket.recv_multipart()
            header = parse_call(frame, LIMITS)
            verdict = self.script(header.epoch, len(self.epochs))
            self.epochs.append(header.epoch)
            if isinstance(verdict, CallFault):
                self.socket.send_multipart([identity, pack_fault(header.epoch, header.request, verdict)])
            elif verdict is None:
                answer = AnswerHeader(header.epoch, header.request, "float32", header.tokens, header.hidden_size)
                self.socket.send_multipart([identity, pack_answer(answer, frame[call_places(header)[-2] :])])
        self.socket.close()

    def stop(self) -> None:
        self.is_over.set()
        self.join()


class World:
    """One caller, some holders, and the routes and endpoints it sees."""

    def __init__(self, patience: Patience) -> None:
        self.context = zmq.Context()
        self.holders: dict[str, Holder] = {}
        self.routes = routes(1, "b")
        self.caller = PeerCaller(
            self.context,
            endpoints=lambda: {name: holder.endpoints for name, holder in self.holders.items()},
            routes=lambda: self.routes,
            residency=lambda: pytest.fail("nothing is local here"),
            limits=LIMITS,
            patience=patience,
        )

    def start(self, name: str, script: Script = lambda *_: None) -> Holder:
        self.holders[name] = Holder(self.context, script)
        return self.holders[name]

    def call(self, holder: str = "b", epoch: int = 1) -> ExpertCall:
        return ExpertCall(
            holder=holder,
            epoch=epoch,
            layer=0,
            combine="partial",
            hidden=torch.ones(1, 2),
            token=np.zeros(1, np.int32),
            expert=np.zeros(1, np.int32),
            weight=torch.ones(1),
        )


@contextmanager
def world(**patience: float) -> Iterator[World]:
    made = World(Patience(**{"answer_s": 5.0, "absence_s": 3.0, "repeat_s": 0.5} | patience))
    try:
        yield made
    finally:
        made.caller.close()
        for holder in made.holders.values():
            holder.stop()
        made.context.destroy(linger=0)


def routes(epoch: int, *holders: str) -> EpochRoutes:
    nothing = Routing.build(epoch, layers=1, experts=4, local=())
    return EpochRoutes(nothing, {(0, expert): holders for expert in range(4)}, frozenset())


def stale(epoch: int, _: int) -> CallFault | None:
    return CallFault(code="stale_epoch", message=f"epoch {epoch} is retired", epoch=2) if epoch < 2 else None


def test_a_stale_epoch_waits_for_the_newer_routes_and_follows_them() -> None:
    with world() as here:
        b, c = here.start("b", stale), here.start("c")
        pending = here.caller.begin(here.call())
        threading.Timer(0.5, lambda: setattr(here, "routes", routes(2, "c", "b"))).start()
        assert pending.result().tolist() == [[1, 1]]
        assert set(b.epochs) == {1}
        assert c.epochs == [2]


def test_a_stale_epoch_without_newer_routes_is_an_error_that_says_so() -> None:
    with world(absence_s=0.5) as here:
        here.start("b", stale)
        with pytest.raises(HolderUnreachable, match="layer 0 expert 0: no answer from b: epoch 1 is retired"):
            here.caller.begin(here.call()).result()


def test_a_call_that_was_lost_on_the_way_is_repeated() -> None:
    with world() as here:
        b = here.start("b", lambda _, before: "silent" if before == 0 else None)
        assert here.caller.begin(here.call()).result().tolist() == [[1, 1]]
        assert len(b.epochs) == 2


def test_a_holder_that_is_not_ready_is_passed_over_where_there_is_another() -> None:
    with world() as here:
        here.routes = routes(1, "b", "c")
        here.start("b", lambda *_: CallFault(code="unknown_epoch", message="fetching"))
        c = here.start("c")
        assert here.caller.begin(here.call()).result().tolist() == [[1, 1]]
        assert c.epochs == [1]


def test_a_connected_holder_that_never_answers_is_left_for_another() -> None:
    with world(answer_s=0.6) as here:
        here.routes = routes(1, "b", "c")
        here.start("b", lambda *_: "silent")
        here.start("c")
        assert here.caller.begin(here.call()).result().tolist() == [[1, 1]]


def test_a_call_under_way_survives_its_holder_moving_to_another_port() -> None:
    """The connection is replaced while an older call still refers to it."""
    with world() as here:
        old = here.start("b", lambda *_: "silent")
        first = here.caller.begin(here.call())
        old.stop()
        here.start("b")
        second = here.caller.begin(here.call())
        assert second.result().tolist() == first.result().tolist() == [[1, 1]]
