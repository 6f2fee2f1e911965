from dataclasses import replace

import numpy as np
import pytest

from planner.capacity import expert_budget, find_room
from planner.errors import InfeasibleProblem
from planner.feasibility import impossible
from planner.problem import build_problem
from tests.planning import EXPERT_BYTES, line, model_spec, node, problem_of, random_events, topology_of


def test_places_are_tiers_with_room_by_node_and_speed():
    nodes = [node("a", device=3, disk=5, rate=1), node("b", host=2), node("c")]
    problem = problem_of(topology_of(nodes, line("a", "b", "c")), model_spec())
    assert [problem.place_name(place) for place in range(problem.num_places)] == ["a (device)", "a (disk)", "b (host)"]
    assert problem.slots.tolist() == [3, 5, 2]
    assert problem.node_slots.tolist() == [8, 2, 0]
    assert problem.trunk_node.tolist() == [[0, 0]]


def test_trunk_and_kv_cache_come_off_the_device_of_every_ingress_else_off_its_host():
    model = model_spec(trunk_layer_bytes=100, embedding_bytes=50, kv_bytes_per_token_layer=1)
    nodes = [node("a", device=10, host=10, rate=1), node("b", host=10, rate=1), node("c", device=10)]
    topology = topology_of(nodes, line("a", "b", "c"), context={"tokens": 10, "sessions": 3})
    budget = expert_budget(find_room(topology, model), np.array([[0, 0], [1, 1]]))
    taken = 250 + 60
    assert budget.expert_bytes.tolist() == [[1000 - taken, 1000, 0], [0, 1000 - taken, 0], [1000, 0, 0]]
    assert budget.trunk_bytes.tolist() == [250, 250, 0]
    assert budget.kv_bytes.tolist() == [60, 60, 0]


def test_every_node_whose_trunk_does_not_fit_is_named():
    model = model_spec(trunk_layer_bytes=150)
    nodes = [node("a", device=2, rate=1), node("b", rate=1), node("c", device=9, rate=1)]
    with pytest.raises(InfeasibleProblem) as caught:
        problem_of(topology_of(nodes, line("a", "b", "c")), model)
    assert [violation.subject for violation in caught.value.violations] == ["a", "b"]
    assert [violation.value - violation.limit for violation in caught.value.violations] == [100, 300]


def test_demand_is_counted_where_the_trunk_of_a_layer_runs():
    model = model_spec(layers=2)
    nodes = [node("a", device=9, rate=10), node("b", device=9, rate=30)]
    problem = problem_of(topology_of(nodes, line("a", "b")), model)
    assert problem.caller_demand.sum(axis=(1, 2)) == pytest.approx([2 * 2 * 10, 2 * 2 * 30])
    moved = replace(problem, trunk_node=np.array([[0, 1], [1, 1]]))
    assert moved.caller_demand[0, 1].sum() == 0
    assert moved.caller_demand[1, 1] == pytest.approx(problem.demand[:, 1].sum(axis=0))
    assert moved.caller_demand[0, 0] == pytest.approx(problem.demand[0, 0])


def test_newer_shares_replace_those_of_the_events():
    model, rng = model_spec(), np.random.default_rng(0)
    topology = topology_of([node("a", device=9, rate=1)], [])
    share = np.full((2, 4), 0.5)
    problem = build_problem(topology, model, [random_events(rng, model)], [share])
    assert (problem.share[0] == share).all()


def test_the_advice_names_the_node_that_asks_for_most():
    nodes = [node("a", device=2, rate=1), node("b", host=3, rate=9), node("c", device=1)]
    [violation] = impossible(problem_of(topology_of(nodes, line("a", "b", "c")), model_spec()))
    assert violation.constraint == "memory"
    assert violation.value - violation.limit == 2 * EXPERT_BYTES
    assert "2 experts (200 B) missing; enlarge b's host memory by 200 B" in violation.message


def test_a_node_counts_each_expert_once_however_large_it_is():
    nodes = [node("a", device=50, disk=50, rate=1), node("b", device=4)]
    topology = topology_of(nodes, line("a", "b"), replicas={"minimum": 2})
    [violation] = impossible(problem_of(topology, model_spec()))
    assert (violation.constraint, violation.value, violation.limit) == ("replicas", 1600, 1200)
    assert "enlarge b's" in violation.message
