import pytest

from planner.inputs import load_inputs
from planner.moving import makespan_s, schedule_plan
from planner.simulate import build_network
from schemas.plan import load_plan
from tests.planning import Workspace


def solve_twice(tmp_path, planner):
    topology = Workspace(tmp_path).write()
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    assert planner("solve", topology, "-o", first, "--solver", "uniform").code == 0
    assert planner("solve", topology, "-o", second, "--solver", "dancemoe", "--current", first).code == 0
    return load_inputs(topology), load_plan(first), load_plan(second)


def test_a_first_plan_needs_a_store(tmp_path, planner):
    inputs, first, _ = solve_twice(tmp_path, planner)
    problem, network = inputs.problem(), build_network(inputs.topology)
    (nobody,) = schedule_plan(first, problem, network)
    assert len(nobody.unsourced) == len(first.placement)
    assert nobody.makespan_s == 0
    (stored,) = schedule_plan(first, problem, network, stores=["a"])
    elsewhere = [replica for replica in first.placement if replica.node != "a"]
    assert stored.unsourced == ()
    assert len(stored.transfers) == len(elsewhere)


def test_a_later_plan_moves_what_its_steps_say(tmp_path, planner):
    inputs, first, second = solve_twice(tmp_path, planner)
    problem, network = inputs.problem(), build_network(inputs.topology)
    schedules = schedule_plan(second, problem, network, first.placement)
    assert len(schedules) == second.epoch - second.base_epoch
    assert all(schedule.unsourced == () for schedule in schedules)
    had = {(replica.key, replica.node) for replica in first.placement}
    new = {(replica.key, replica.node) for replica in second.placement} - had
    arrived = {
        (divmod(transfer.expert, problem.experts), problem.node_ids[transfer.target])
        for schedule in schedules
        for transfer in schedule.transfers
    }
    assert new <= arrived
    assert makespan_s(schedules) == pytest.approx(sum(schedule.makespan_s for schedule in schedules))
    assert makespan_s(schedules) > 0
