"""What an agent says to a plan for longer or more answers than it has set KV caches aside for."""

import pytest

from agent import machine as m
from agent.budget import MemoryBudget
from schemas import messages as msg
from schemas.outcome import ExitCode
from schemas.plan import Segment, TrunkPath
from schemas.topology import Context
from tests.small_plans import BYTES, LAYOUT, MODEL

MINE = Context(tokens=512, sessions=2)


def refusal(planned, *, runs=True):
    """The fault of an agent set to `MINE` that is to prepare an epoch planned for another context."""
    layers = Segment(node="a", first_layer=0, last_layer=MODEL.num_decoder_layers - 1)
    assignment = msg.Assignment(
        cluster="test", plan="1" * 64, epoch=1, ingress=False, layout=LAYOUT, context=planned,
        paths=(TrunkPath(ingress="b", segments=(layers,)),) if runs else (),
    )  # fmt: skip
    machine = m.AgentMachine(m.AgentState(), MemoryBudget("a", msg.TierBytes(device=6 * BYTES), "device", MODEL, MINE))
    machine.handle(m.Started())
    machine.handle(m.PrepareReceived(assignment))
    return machine.fault


@pytest.mark.parametrize("planned", [Context(tokens=513, sessions=1), Context(tokens=10, sessions=3)])
def test_more_context_than_is_set_aside_is_refused_before_anything_is_fetched(planned):
    fault = refusal(planned)
    assert fault.code == ExitCode.REFUSED
    assert f"planned for {planned.sessions} sessions of {planned.tokens} tokens" in fault.message
    assert "set to 2 of 512; set context in the agent's config" in fault.message


@pytest.mark.parametrize("planned", [MINE, Context(tokens=10, sessions=1), None])
def test_as_much_or_less_is_taken_and_so_is_a_plan_that_does_not_say(planned):
    assert refusal(planned) is None


def test_a_node_that_runs_no_layers_is_not_asked():
    assert refusal(Context(tokens=1 << 20), runs=False) is None
