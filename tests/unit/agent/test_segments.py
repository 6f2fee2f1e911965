"""What segments say to each other and to whoever makes the answer: messages in, messages out, no layers loaded."""

import pytest

from agent.offer import Offer
from agent.segments import Segments
from agent.sessions import Sender
from schemas.plan import Segment, TrunkPath
from schemas.sessions import CloseSession, OpenSession, SessionFault

A, B = Sender("a", "1"), Sender("b", "1")
SESSION = "1" * 32


class Told:
    """The way to other nodes: keeps what is sent."""

    def __init__(self):
        self.messages = []

    def send_step(self, node, header, payload):
        self.messages.append((node, header.kind))

    def send_message(self, node, message):
        self.messages.append((node, message.type))

    def is_waiting(self, session):
        return False

    def forget(self, session):
        pass


def opening():
    parts = (Segment(node="a", first_layer=0, last_layer=1), Segment(node="b", first_layer=2, last_layer=3))
    return OpenSession(
        session=SESSION, epoch=1, path=TrunkPath(ingress="a", segments=parts), prompt_tokens=3, max_tokens=9
    )


@pytest.mark.parametrize("me", [A, B], ids=["ingress", "other"])
def test_a_fault_of_an_answer_that_has_just_ended_goes_nowhere(me):
    """The client's thread listens no more, and the close that it sent is still to come."""
    outside = Told()
    segments = Segments(me, layers=4, outside=outside)
    segments.offer = Offer(1)
    segments.registry.open(A, opening(), 0.0, epoch=1, ranges={(0, 1), (2, 3)})
    fault = SessionFault(session=SESSION, node="b", code="unknown_session", message="there is no such session here")
    segments.take_message(B if me == A else A, fault, None)
    assert outside.messages == ([] if me == A else [("a", "session_fault")])
    segments.take_message(A, CloseSession(session=SESSION), lambda _: None)
    assert not segments.registry.snapshot()
