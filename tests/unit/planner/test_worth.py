"""Whether to leave the plan in force where the trunk goes elsewhere too."""

from dataclasses import replace

import numpy as np
import pytest

from planner.assemble import Solved
from planner.moved import new_trunk_bytes
from planner.objective import judge, nearest, plan_cost
from planner.solvers.base import Result, SolveStatus, StopReason
from planner.worth import InForce, MovingTerms, choose_move, movement
from tests.planning import line, model_spec, node, problem_of, topology_of

MODEL = model_spec(layers=3, experts=2, top_k=1, trunk_layer_bytes=100)


@pytest.fixture
def problem():
    nodes = [node("a", device=12, rate=10), node("b", device=12)]
    return problem_of(topology_of(nodes, line("a", "b"), trunk={"mode": "move"}), MODEL)


def arranged(problem, trunk, *holders):
    """Place layers wholly on nodes, with the trunk of each layer elsewhere maybe."""
    moved = problem.with_trunk(np.array([trunk]))
    placed = np.zeros((moved.num_places, MODEL.layers, MODEL.experts), dtype=bool)
    for layer, holder in enumerate(holders):
        placed[moved.place_node == holder, layer] = True
    return moved, placed


def solved(problem, placed, *, bound=0.001):
    routing = nearest(problem, placed, "latency")
    value = plan_cost(problem, routing, "latency")
    result = Result(
        solver="hand", status=SolveStatus.FEASIBLE, placed=placed, objective=value, bound=bound, seconds=0.0,
        stop_reason=StopReason.FINISHED,
    )  # fmt: skip
    return Solved(problem, result, placed, routing, judge(problem, routing), "latency", 1e-5)


def in_force(problem, trunk, *holders):
    moved, placed = arranged(problem, trunk, *holders)
    return InForce(placed, moved)


def test_a_better_path_alone_is_a_move_whose_benefit_is_what_tokens_take_less(problem):
    now = in_force(problem, [0, 0, 0], 1, 1, 1)
    target = solved(*arranged(problem, [1, 1, 1], 1, 1, 1))
    choice = choose_move(target, now, MovingTerms(horizon_s=1.0), gap=1e-5)
    before = judge(now.problem, nearest(now.problem, now.placed, "latency"))
    assert choice.moved
    assert choice.benefit_per_s == pytest.approx(
        10 * (before.predicted_latency_s - target.judgement.predicted_latency_s)
    )
    assert choice.benefit_per_s > 0.1  # three round trips of 4 ms, ten times a second


def test_what_is_in_force_stays_with_its_own_trunk_where_that_is_better(problem):
    now = in_force(problem, [0, 0, 0], 0, 0, 0)
    target = solved(*arranged(problem, [0, 1, 0], 0, 1, 0))
    choice = choose_move(target, now, MovingTerms(), gap=1e-5)
    assert (choice.moved, choice.reason) == (False, "no better placement is known")
    assert choice.solved.problem.trunk_node.tolist() == [[0, 0, 0]]
    assert choice.solved.result.bound == target.result.bound


def test_who_wants_the_trunk_to_stay_does_not_keep_a_plan_that_moves_it(problem):
    fixed = replace(problem, moves=False)
    now = in_force(fixed, [1, 1, 1], 1, 1, 1)
    choice = choose_move(solved(*arranged(fixed, [0, 0, 0], 1, 1, 1)), now, MovingTerms(horizon_s=1.0), gap=1e-5)
    assert (choice.moved, choice.reason) == (True, "tokens shall not take the paths in force")


TRUNK = 3 * 100  # bytes of the three layers


@pytest.mark.parametrize("experts", [0, 2, 6])
def test_under_a_cap_the_trunk_goes_alone_or_with_as_many_experts_as_its_bytes_leave(problem, experts):
    now = in_force(problem, [0, 0, 0], 0, 0, 0)
    slow = replace(now.problem, chosen_s=np.array([0.1, 0.0]))
    now = InForce(now.placed, slow)
    target = solved(*arranged(slow, [1, 1, 1], 1, 1, 1))
    choice = choose_move(target, now, MovingTerms(max_bytes=TRUNK + experts * 100, horizon_s=1e4), gap=1e-5)
    held = int((choice.solved.placed & ~now.placed).sum())
    assert held <= experts
    assert (
        choice.solved.judgement.predicted_latency_s
        < judge(slow, nearest(slow, now.placed, "latency")).predicted_latency_s
    )
    assert choice.solved.problem.trunk_node.tolist() == [[1, 1, 1]]
    told = movement(choice, now, [], MovingTerms(), target)
    assert told.new_bytes == TRUNK + held * 100
    assert told.transfer_s == pytest.approx((3 + held) * problem.transfer_s[0, 1])
    tighter = choose_move(target, now, MovingTerms(max_bytes=TRUNK - 1, horizon_s=1e4), gap=1e-5)
    assert tighter.solved.problem.trunk_node.tolist() == [[0, 0, 0]]


def test_embedding_and_head_come_with_the_first_and_the_last_layer_and_once_where_they_are_one():
    model = model_spec(
        layers=3, experts=2, top_k=1, trunk_layer_bytes=100, embedding_bytes=50, input_bytes=50, head_bytes=50
    )
    nodes = [node("a", device=40, rate=10), node("b", device=40), node("c", device=40)]
    links = [*line("a", "b", latency="1 ms"), *line("a", "c", latency="9 ms"), *line("b", "c", latency="1 ms")]
    problem = problem_of(topology_of(nodes, links, trunk={"mode": "move"}), model)

    def brought(*after, before=(0, 0, 1)):
        return new_trunk_bytes(problem, np.array([before]), np.array([after])).tolist()

    assert brought(0, 0, 1) == [[0, 0, 0]] * 3
    assert brought(0, 1, 1) == [[0, 100, 0], [0, 0, 0], [0, 0, 0]]
    assert brought(2, 2, 2) == [[0, 0, 250 - 50], [0, 0, 150], [0, 0, 0]]
    assert brought(2, 2, 2, before=(0, 1, 1)) == [[0, 0, 150], [0, 0, 250 - 50], [0, 0, 0]]
