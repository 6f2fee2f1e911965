"""The published heuristics do what their descriptions say."""

import numpy as np
import pytest

from planner.solvers.strategies.common import mend, node_demand
from planner.solvers.strategies.dancemoe import choose, cover_layers, layer_slots
from planner.solvers.strategies.uniform import deal
from tests.planning import line, model_spec, node, problem_of, topology_of


def cluster(*rooms, layers=3, experts=8, **rest):
    names = "abcd"[: len(rooms)]
    nodes = [node(name, device=room, rate=10) for name, room in zip(names, rooms, strict=True)]
    return problem_of(topology_of(nodes, line(*names), **rest), model_spec(layers=layers, experts=experts), seed=2)


def test_uniform_deals_in_proportion_and_covers_everything_first():
    problem = cluster(6, 12, 18)
    held = deal(problem)
    assert held.sum(axis=1).tolist() == [6, 12, 18]
    assert held.any(axis=0).all()
    assert held.sum(axis=0).max() <= 2


def test_dancemoe_gives_more_slots_to_layers_of_higher_entropy():
    demand = np.array([[[1.0, 1.0, 1.0, 1.0], [1.0, 0.1, 0.0, 0.0]]])
    slots = layer_slots(demand, np.array([5]))
    assert slots.tolist() == [[4, 1]]


def test_dancemoe_never_gives_a_layer_more_slots_than_experts():
    demand = np.random.default_rng(0).random((2, 3, 4))
    slots = layer_slots(demand, np.array([12, 11]))
    assert slots.max() <= 4
    assert slots.sum(axis=1).tolist() == [12, 11]


def test_dancemoe_shifts_slots_until_every_layer_can_be_covered():
    split = cover_layers(np.array([[4, 1], [4, 1]]), wanted=4, experts=4)
    assert split.sum(axis=0).tolist() == [6, 4]
    assert split.sum(axis=1).tolist() == [5, 5]


def test_dancemoe_lets_each_node_take_its_own_most_used():
    problem = cluster(12, 15, 9)
    held, demand = choose(problem), node_demand(problem)
    for node_held, asked in zip(held.reshape(3, 3, 8), demand.reshape(3, 3, 8), strict=True):
        for here, wanted in zip(node_held, asked, strict=True):
            if here.any() and not here.all():
                assert wanted[here].min() >= wanted[~here].max()


def test_mending_covers_every_expert_and_touches_duplicates_only():
    problem = cluster(12, 15, 9)
    chosen = choose(problem)
    held = mend(problem, chosen)
    assert held.any(axis=0).all()
    lost = chosen & ~held
    assert (held | ~lost).all() or (chosen.sum(axis=0)[lost.any(axis=0)] > 1).all()
    assert (held.sum(axis=1) <= problem.node_slots).all()


def test_mending_pushes_others_along_where_only_a_chain_helps():
    """Expert 0 may only go to a, which is full of single copies that b has room for."""
    problem = cluster(2, 3, layers=1, experts=4, pins=[{"layer": 0, "expert": 0, "node": "b", "ban": True}])
    chosen = np.array([[False, True, True, False], [False, False, False, True]])
    held = mend(problem, chosen)
    assert held.any(axis=0).all()
    assert held[0, 0]
    assert not held[1, 0]


def test_nothing_can_mend_what_has_no_room():
    problem = cluster(2, 1, layers=1, experts=4)
    assert mend(problem, np.zeros((2, 4), dtype=bool)) is None


@pytest.mark.parametrize("strategy", [deal, choose])
def test_ten_thousand_replicas_are_placed_in_seconds(strategy):
    names = [f"n{number}" for number in range(8)]
    nodes = [node(name, device=1200, rate=10) for name in names]
    problem = problem_of(topology_of(nodes, line(*names)), model_spec(layers=48, experts=128, top_k=8))
    held = mend(problem, strategy(problem))
    assert held is not None
    assert held.sum() == 9600
