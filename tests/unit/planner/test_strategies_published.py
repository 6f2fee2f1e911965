import time

import numpy as np
import pytest

from planner.feasibility import violations
from planner.objective import nearest
from planner.solvers.base import SolveLimits, SolveStatus, ignore
from planner.solvers.choose import STRATEGIES
from planner.solvers.strategies import moetuner
from planner.solvers.strategies.eplb import even_slots, pack, replicate, solve_eplb
from planner.solvers.strategies.ignores import IGNORES
from planner.solvers.strategies.moetuner import solve_moetuner
from planner.solvers.strategies.ordermoe import group_alike, similarity, solve_ordermoe
from planner.solvers.strategies.popularity import solve_popularity
from schemas.topology import Pin
from tests.small_clusters import make_model, make_problem, make_topology

ALL = [solve_popularity, solve_eplb, solve_moetuner, solve_ordermoe]
CLUSTERS = {
    "uneven": make_topology([5, 9, 17], [20.0, 10.0, 30.0]),
    "tiers": make_topology([(4, 4, 2), (9, 0, 0), (0, 12, 0)], [20.0, 10.0, 0.0]),
    "exactly all": make_topology([6, 8, 10], [1.0, 1.0, 1.0]),
    "a node without room": make_topology([0, 14, 14], [5.0, 1.0, 0.0]),
    "two replicas": make_topology([14, 20, 20], [5.0, 1.0, 0.0], required=2),
    "pins and bans": make_topology(
        [6, 10, 14],
        [20.0, 10.0, 30.0],
        pins=(
            Pin(layer=0, expert=3, node="n0"),
            Pin(layer=1, expert=3, node="n0", ban=True),
            Pin(layer=2, expert=7, node="n2"),
        ),
    ),
    "more than everything": make_topology([30, 30], [1.0, 2.0]),
}


def run(solver, problem, **limits):
    return solver(problem, objective="additive-latency", limits=SolveLimits(**limits), report=ignore)


@pytest.mark.parametrize("solver", ALL)
@pytest.mark.parametrize("topology", CLUSTERS.values(), ids=CLUSTERS)
def test_placements_keep_every_constraint(solver, topology):
    problem = make_problem(topology, make_model())
    result = run(solver, problem)
    assert result.status is SolveStatus.FEASIBLE
    assert violations(problem, result.placed, nearest(problem, result.placed, "additive-latency")) == []
    np.testing.assert_array_equal(result.placed, run(solver, problem).placed)


@pytest.mark.parametrize("solver", ALL)
def test_memory_is_used_in_full(solver):
    problem = make_problem(CLUSTERS["uneven"], make_model())
    assert run(solver, problem).placed.sum() == problem.node_slots.sum()


@pytest.mark.parametrize("solver", ALL)
def test_what_cannot_be_kept_has_no_placement_and_a_reason(solver):
    pins = tuple(Pin(layer=0, expert=expert, node="n0") for expert in range(5))
    problem = make_problem(make_topology([4, 40], [1.0, 1.0], pins=pins, required=2), make_model())
    result = run(solver, problem)
    assert result.placed is None
    assert result.detail


def test_popularity_replicates_what_all_tokens_ask_for_most():
    problem = make_problem(make_topology([8, 8, 14], [1.0, 1.0, 1.0]), make_model(), zipf=2.0)
    placed = run(solve_popularity, problem).placed
    copies = problem.held(placed).sum(axis=0).ravel()
    hottest = np.argsort(-problem.caller_demand.sum(axis=0).ravel())
    assert (copies[hottest[:2]] >= 2).all()
    assert (copies[hottest[-10:]] == 1).all()


def test_eplb_replicates_where_load_per_replica_is_highest():
    np.testing.assert_array_equal(replicate(np.array([90.0, 40.0, 20.0, 10.0]), 8, 4), [4, 2, 1, 1])
    np.testing.assert_array_equal(replicate(np.array([90.0, 1.0]), 8, 2), [2, 2])


def test_eplb_packs_heaviest_first_to_the_least_busy():
    held = pack(np.array([5.0, 4.0, 3.0, 2.0]), np.ones(4, dtype=int), np.array([2, 2]), np.ones(2))
    np.testing.assert_array_equal(held, [[True, False, False, True], [False, True, True, False]])


def test_eplb_splits_slots_evenly_over_layers():
    split = even_slots(make_problem(CLUSTERS["uneven"], make_model()))
    np.testing.assert_array_equal(split.sum(axis=1), [5, 9, 17])
    assert (split.max(axis=1) - split.min(axis=1) <= 1).all()


def test_moetuner_balances_and_then_calls_cheaply():
    load = np.array([8.0, 7.0, 6.0, 5.0, 4.0])
    cluster = moetuner.balance(load, np.array([2, 3]), 5.0)
    assert sorted(np.bincount(cluster, weights=load)) == [15.0, 15.0]
    price = np.array([[5.0, 1.0], [1.0, 5.0]])
    np.testing.assert_array_equal(moetuner.assign(price, np.array([2, 2]), np.array([2, 2])), [1, 0])
    np.testing.assert_array_equal(moetuner.assign(price, np.array([2, 3]), np.array([2, 3])), [0, 1])


def test_moetuner_falls_back_to_a_greedy_balance_when_time_is_over():
    problem = make_problem(CLUSTERS["uneven"], make_model())
    start = time.monotonic()
    assert run(solve_moetuner, problem, time_s=1e-9).placed is not None
    assert time.monotonic() - start < 5


def test_ordermoe_groups_experts_that_are_chosen_beside_the_same_others():
    alike = np.eye(4)
    alike[0, 2] = alike[2, 0] = alike[1, 3] = alike[3, 1] = 0.9
    groups = group_alike(alike, np.array([4.0, 3.0, 2.0, 1.0]), 2)
    assert [group.tolist() for group in groups] == [[0, 2], [1, 3]]
    problem = make_problem(CLUSTERS["uneven"], make_model())
    shown = similarity(problem, 0)
    np.testing.assert_allclose(shown, shown.T)


def test_ordermoe_spreads_the_members_of_a_group():
    problem = make_problem(CLUSTERS["exactly all"], make_model(experts=8))
    held = problem.held(run(solve_ordermoe, problem).placed)
    hottest = problem.caller_demand.sum(axis=0)[0]
    first = group_alike(similarity(problem, 0), hottest, 3)[0]
    assert held[:, 0, first].any(axis=1).all()


def test_every_strategy_says_what_it_ignores():
    assert set(IGNORES) == set(STRATEGIES)
    assert all(text.startswith("ignores") and "\n" not in text for text in IGNORES.values())
