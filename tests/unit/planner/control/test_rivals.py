"""Whoever is there stays, however late its heartbeats are; whoever is gone makes room at once."""

import socket

import pytest

from planner.control.rivals import FORGOTTEN_S, SILENCE_S, judge
from planner.control.status import AgentView
from planner.control.transport import reach
from schemas.messages import Endpoints, Hello, Standing, TierBytes
from tests.small_plans import MODEL


def hello(incarnation, port=1):
    where = Endpoints(address="127.0.0.1", expert=port, weights=port + 1, client=port + 2, session=port + 3)
    return Hello(
        node="a", incarnation=incarnation, model=MODEL, dtype="float32", endpoints=where, memory=TierBytes(),
        has_store=False, standing=Standing(),
    )  # fmt: skip


def heard(silence_s, **changes):
    return AgentView(hello("one"), None, -silence_s, 0.0, **changes)


@pytest.mark.parametrize(
    ("silence_s", "reached", "verdict"),
    [
        (0.1, "listens", "taken"),
        (30.0, "listens", "taken"),
        (FORGOTTEN_S, "listens", "welcome"),
        (0.1, "gone", "welcome"),
        (0.1, "unknown", "wait"),
        (SILENCE_S, "unknown", "welcome"),
    ],
)
def test_a_second_agent(silence_s, reached, verdict):
    assert judge(hello("two", 9), heard(silence_s), 0.0, lambda _: reached) == verdict


def test_nobody_is_asked_where_there_is_one():
    for present in (None, heard(0.1, has_stopped=True)):
        assert judge(hello("two", 9), present, 0.0, pytest.fail) == "welcome"
    assert judge(hello("one"), heard(0.1), 0.0, pytest.fail) == "welcome"
    assert judge(hello("two"), heard(0.1), 0.0, pytest.fail) == "welcome", "it has bound the other's ports"


def test_a_process_that_is_gone_listens_no_more():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        port = listening.getsockname()[1]
        where = hello("one").endpoints.model_copy(update={"client": port})
        assert reach(where) == "listens"
    assert reach(where) == "gone"
