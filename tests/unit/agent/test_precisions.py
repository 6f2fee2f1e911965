"""An agent and the precision of plans: it takes up the first one, and says why it cannot take up another."""

import pytest
from pydantic import ValidationError

from agent import machine as m
from agent.budget import MemoryBudget
from agent.computing import Computing
from agent.errors import DataUnusable
from agent.precisions import make_budget
from agent.settings import Settings
from runtime.models import open_model
from schemas import messages as msg
from schemas.outcome import ExitCode
from schemas.topology import Context
from tests.cluster import MODEL as CHECKPOINT
from tests.small_plans import BYTES, LAYOUT, MODEL

SIZES = {"checkpoint": BYTES, "int8": BYTES // 2}
ALL = tuple(SIZES)


def assignment(epoch, precision, *, experts=2, tier="device"):
    """Some experts of layer 0, in a precision."""
    records = [msg.Record(layer=0, expert=e, sha256=f"{e:064x}", bytes=BYTES) for e in range(experts)]
    return msg.Assignment(
        cluster="test", plan=f"{epoch:064x}", epoch=epoch, ingress=False, layout=LAYOUT, precision=precision,
        replicas=tuple(msg.AssignedReplica(record=record, tier=tier) for record in records),
    )  # fmt: skip


def agent(offers=ALL, precision="checkpoint", room=2 * BYTES):
    memory = msg.TierBytes(device=room, disk=2 * BYTES)
    budget = MemoryBudget(
        "a", memory, "device", MODEL, Context(), precision=precision, offers=offers, sizes=SIZES
    )  # fmt: skip
    machine = m.AgentMachine(m.AgentState(), budget)
    machine.handle(m.Started())
    return machine


def bring(machine, epoch, precision, **what):
    """Prepare and commit an epoch; returns what was to be done for that, and the fault."""
    given = assignment(epoch, precision, **what)
    done = machine.handle(m.PrepareReceived(given))
    if machine.fault is None:
        machine.handle(m.Obtained(epoch, given.plan))
        machine.handle(m.CommitReceived(epoch, given.plan))
        machine.handle(m.RetireReceived(epoch))
    return done, machine.fault


def test_a_plan_s_precision_is_taken_up_before_anything_is_fetched():
    machine = agent()
    done, fault = bring(machine, 1, "int8", experts=4)  # twice what fits in the checkpoint's
    assert fault is None
    assert [type(each) for each in done] == [m.HoldIn, m.Persist, m.Keep, m.Obtain]
    assert done[0].precision == machine.budget.precision == "int8"
    done, fault = bring(machine, 2, "int8", experts=3)
    assert fault is None
    assert m.HoldIn not in [type(each) for each in done]


def test_room_is_what_the_plan_s_precision_leaves():
    machine = agent()
    _, fault = bring(machine, 1, "int8", experts=5)
    assert fault.code == ExitCode.INFEASIBLE
    assert machine.budget.precision == "checkpoint", "nothing was taken up"
    assert bring(machine, 2, "int8", experts=3, tier="disk")[1] is not None, "records on disk are the checkpoint's"
    assert bring(machine, 3, "int8", experts=2, tier="disk")[1] is None


def test_a_plan_that_does_not_say_is_held_in_what_the_config_says():
    machine = agent(("int8",), "int8")
    assert bring(machine, 1, None, experts=4)[1] is None
    assert machine.budget.precision == "int8"


def test_a_plan_that_never_came_into_force_leaves_no_precision_behind():
    machine = agent(room=4 * BYTES)
    given = assignment(1, "int8")
    machine.handle(m.PrepareReceived(given))
    machine.handle(m.AbortReceived(1, given.plan))
    done, fault = bring(machine, 2, None)
    assert fault is None
    assert machine.budget.precision == "checkpoint"
    assert m.HoldIn("checkpoint") in done
    assert m.HoldIn("checkpoint") not in bring(machine, 3, None)[0]


def test_slots_of_the_precision_before_are_given_back_first(tmp_path):
    """A device may have room for one of both only, and others know the residency before until there is another."""
    config = settings(tmp_path, "plan")
    computing = Computing(config, open_model(CHECKPOINT, "checkpoint"), "checkpoint")
    before, pool = computing.residency, computing.residency.inside.pool
    assert len(pool.whole(0)) > 0
    computing.hold_in("int8")
    assert (pool.slots, len(pool.whole(0))) == (0, 0)
    assert before.held() == {"device": [], "host": [], "disk": []}
    assert computing.residency.slot_bytes < before.slot_bytes


def test_an_unknown_precision_is_told_in_one_line(tmp_path):
    with pytest.raises(ValidationError) as caught:
        settings(tmp_path, "int5")
    assert [error["loc"] for error in caught.value.errors()] == [("precision",)]


def test_another_precision_than_the_config_s_is_refused_with_what_to_do():
    machine = agent(("checkpoint",))
    _, fault = bring(machine, 1, "int8")
    assert fault.code == ExitCode.REFUSED
    assert "wants experts in int8 here, this agent holds them in checkpoint; set precision: int8" in fault.message
    assert "solve with precision: checkpoint for a" in fault.message


def test_what_is_held_keeps_its_precision():
    machine = agent()
    assert bring(machine, 1, "int8")[1] is None
    _, fault = bring(machine, 2, "checkpoint")
    assert fault.code == ExitCode.REFUSED
    assert "holds experts in int8 for epoch 1, the plan wants them in checkpoint; apply a plan first" in fault.message
    machine.handle(m.AbortReceived(2, f"{2:064x}"))
    assert bring(machine, 2, "int8", experts=0)[1] is None
    assert bring(machine, 3, "checkpoint")[1] is None, "nothing was held any more"
    assert machine.budget.precision == "checkpoint"


def settings(tmp_path, precision):
    return Settings(
        node="a", model=str(CHECKPOINT), data=str(tmp_path), memory={"device": "20 MiB"}, precision=precision
    )  # fmt: skip


def test_an_agent_comes_back_in_the_precision_of_its_journal(tmp_path):
    model = open_model(CHECKPOINT, "checkpoint")
    state = m.AgentState(cluster="test", active=assignment(1, "int8"))
    budget = make_budget(settings(tmp_path, "plan"), model.spec, model.layout, state)
    assert (budget.precision, budget.offers) == ("int8", ("checkpoint", "int8", "int4"))
    assert budget.sizes["checkpoint"] == model.layout.bytes > budget.sizes["int8"] > budget.sizes["int4"]
    assert make_budget(settings(tmp_path, "plan"), model.spec, model.layout, m.AgentState()).precision == "checkpoint"
    whole = m.AgentState(cluster="test", active=assignment(1, "checkpoint"))
    fewer = make_budget(settings(tmp_path, "int4"), model.spec, model.layout, whole)
    assert fewer.precision == "int4", "of the checkpoint's records any other is made"
    with pytest.raises(
        DataUnusable, match="holds experts in int8 under the plan in force, the config says precision: "
    ):
        make_budget(settings(tmp_path, "int4"), model.spec, model.layout, state)
