"""Arrays become the plan's records: routes with shares, trunk paths, steps with sources, reasons."""

from dataclasses import replace

import numpy as np
import pytest

from planner.assemble import placement_records, route_records, trunk_paths
from planner.objective import Routing, nearest
from planner.solve import solve
from planner.steps import migration_steps
from schemas.placement import Replica
from tests.planning import line, model_spec, node, problem_of, topology_of


@pytest.fixture
def problem():
    nodes = [node("a", device=4, rate=10), node("b", device=4), node("c", device=4)]
    return problem_of(topology_of(nodes, line("a", "b", "c")), model_spec(layers=1))


def held_by(problem, *places):
    placed = np.zeros((problem.num_places, problem.layers, problem.experts), dtype=bool)
    for place, experts in enumerate(places):
        placed[place, 0, list(experts)] = True
    return placed


def test_every_expert_that_an_ingress_lacks_has_a_route_to_the_nearest(problem):
    placed = held_by(problem, [0, 1], [2], [2, 3])
    routes = route_records(problem, nearest(problem, placed, "additive-latency"))
    assert [(route.ingress, route.expert, route.holder) for route in routes] == [("a", 2, "b"), ("a", 3, "c")]


def test_split_calls_have_shares_that_sum_to_one(problem):
    placed = held_by(problem, [0, 1, 2], [3], [3])
    simple = nearest(problem, placed, "additive-latency")
    share = np.zeros((3, 3, 1, 4))
    share[:, 0, 0, :3] = 1
    share[:, 1:, 0, 3] = [0.25, 0.75 - 1e-9]
    share[0, 0, 0, 3] = 1e-9  # a solver's rounding is no route
    routes = route_records(problem, Routing(simple.holder, share))
    assert [(route.holder, route.share) for route in routes] == [("b", pytest.approx(0.25)), ("c", pytest.approx(0.75))]


def test_the_trunk_path_follows_the_trunk_over_dense_layers(problem):
    moved = replace(problem, layers=3, trunk_node=np.array([[0, 2, 2]]))
    [path] = trunk_paths(moved, (1, 2, 4), 6)
    assert [(s.node, s.first_layer, s.last_layer) for s in path.segments] == [("a", 0, 1), ("c", 2, 5)]


def test_a_first_plan_brings_everything_from_a_store(problem):
    records = placement_records(problem, held_by(problem, [0, 1], [2], [3]))
    steps, stages, _ = migration_steps(problem, (), records)
    assert stages == 1
    assert [step.action for step in steps] == ["replicate"] * 4 + ["switch"]
    assert all(step.source is None and step.bytes == 100 for step in steps[:4])


def test_new_replicas_come_from_the_quickest_holder(problem):
    before = placement_records(problem, held_by(problem, [0], [1, 2], [0, 1, 3]))
    after = placement_records(problem, held_by(problem, [0, 1], [1, 2], [0, 1, 3]))
    steps, *_ = migration_steps(problem, before, after)
    assert [(step.action, step.source) for step in steps] == [("replicate", "b"), ("switch", None)]


def test_what_a_node_outside_the_topology_holds_is_used_and_dropped(problem):
    gone = tuple(Replica(layer=0, expert=expert, node="gone") for expert in range(4))
    after = placement_records(problem, held_by(problem, [0, 1], [2], [3]))
    steps, stages, _ = migration_steps(problem, gone, after)
    assert stages == 1
    assert [step.source for step in steps[:4]] == ["gone"] * 4
    assert [(step.action, step.node) for step in steps[5:]] == [("drop", "gone")] * 4


def test_a_replica_changes_its_tier_in_one_stage():
    nodes = [node("a", device=4, host=8, rate=10)]
    problem = problem_of(topology_of(nodes, []), model_spec(layers=1))
    before = placement_records(problem, held_by(problem, [], [0, 1, 2, 3]))
    after = placement_records(problem, held_by(problem, [0, 1], [2, 3]))
    steps, stages, _ = migration_steps(problem, before, after)
    assert stages == 1
    assert [(step.action, step.tier, step.expert, step.source) for step in steps] == [
        ("replicate", "device", 0, "a"),
        ("replicate", "device", 1, "a"),
        ("switch", None, None, None),
        ("drop", "host", 0, None),
        ("drop", "host", 1, None),
    ]


def test_a_held_expert_may_be_called_elsewhere_where_that_is_quicker():
    """A slow disk copy that replicas demand does not slow down its node: the plan routes around it."""
    nodes = [node("a", disk=4, rate=10, disk_bandwidth="1 kB/s"), node("b", device=4)]
    topology = topology_of(nodes, line("a", "b"), replicas={"minimum": 2})
    solved = solve(problem_of(topology, model_spec(layers=1)), "milp", in_process=True)
    routes = route_records(solved.problem, solved.routing)
    assert {route.holder for route in routes} == {"b"}
    assert len(routes) == 4
