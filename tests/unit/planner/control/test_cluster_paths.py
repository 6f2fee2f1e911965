"""Which paths the coordinator holds to be in force while a plan goes through its stages."""

import pytest

from planner.control import machine as m
from planner.control.state import ClusterState
from schemas import messages as msg
from tests.small_plans import CATALOGUE, all_on, path, plan_through, replicas

FIRST, LAST = replicas(all_on("a")), replicas(all_on("b"))
OLD = plan_through(FIRST, trunk=[path("a", "a", "c")])
NEW = plan_through(
    replicas(all_on("a", "b")), LAST, before=FIRST, base_epoch=1, trunk=[path("a", "b", "b")], trunk_stage=2
)


def reported(node, epoch, *, prepared=None, fresh=False):
    """A node that has done all there is for an epoch, and prepared the next where asked."""
    standing = msg.Standing(
        active=epoch,
        oldest=epoch,
        retired=epoch,
        prepared=epoch if prepared is None else epoch + 1,
        prepared_plan=prepared.digest if prepared else "",
    )
    return m.NodeReported(node, standing, has_store=node == "a", fresh=fresh)


def prepares(instructions):
    sent = [each.message for each in instructions if isinstance(each, m.Send)]
    return [message.assignment for message in sent if isinstance(message, msg.Prepare)]


@pytest.fixture
def running():
    """A cluster whose plan is the old one, which is told of the new one."""
    machine = m.ClusterMachine(
        ClusterState(cluster="test", epoch=1, placement=FIRST, plan=OLD, committed_plan=OLD, phase="done")
    )
    machine.handle(m.CatalogueReceived(CATALOGUE))
    for node in "abc":
        machine.handle(reported(node, 1, fresh=True))
    return machine


def go_on(machine, epoch, nodes="abc"):
    """Let every node prepare the next epoch, switch and retire."""
    for node in "ab":
        machine.handle(reported(node, epoch, prepared=NEW))
    for node in nodes:
        machine.handle(reported(node, epoch + 1))


def test_paths_change_with_the_trunk_stage_and_survive_a_restart(running):
    running.handle(m.PlanProposed(NEW))
    go_on(running, 1)
    assert (running.state.epoch, running.state.paths) == (2, OLD.trunk)
    again = m.ClusterMachine(ClusterState.model_validate_json(running.state.model_dump_json()))
    again.handle(m.CatalogueReceived(CATALOGUE))
    for node in "abc":
        again.handle(reported(node, 2, fresh=True))
    go_on(again, 2)
    assert (again.state.epoch, again.state.phase, again.state.paths) == (3, "done", NEW.trunk)


def test_a_node_of_the_old_path_that_comes_back_on_the_way_gets_its_layers_again(running):
    running.handle(m.PlanProposed(NEW))
    go_on(running, 1)
    running.handle(m.NodeLost("c"))
    (given,) = prepares(running.handle(reported("c", 0, fresh=True)))
    assert (given.epoch, given.paths) == (2, OLD.trunk)


def test_a_node_that_left_the_path_is_told_so(running):
    running.handle(m.PlanProposed(NEW))
    go_on(running, 1)
    for node in "ab":
        running.handle(reported(node, 2, prepared=NEW))
    told = {given.epoch: given.paths for given in prepares(running.handle(reported("c", 2)))}
    running.handle(m.NodeLost("c"))
    told |= {given.epoch: given.paths for given in prepares(running.handle(reported("c", 2, fresh=True)))}
    assert told == {3: ()}
