"""The latency objective through the Protocol: bound <= optimum <= incumbent, and exact solvers find the optimum."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from planner.errors import InfeasibleProblem
from planner.feasibility import impossible, violations
from planner.objective import judge, path_cost, plan_cost
from planner.objective import unit_cost as unit_of
from planner.solve import solve
from planner.solvers.base import SolveLimits, ignore
from planner.solvers.latency import Schedule
from planner.solvers.latency.solver import solve_by_events
from tests.planning import brute_force, problems, with_paths

few = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
QUICK = Schedule(dual_steps=30, rounds=1, select_steps=50)
MOST = 3_000  # placements of one layer that brute force looks at


def holder_sets(problem, layer, expert):
    per_node = []
    for number in range(problem.num_nodes):
        places = [place for place in range(problem.num_places) if problem.place_node[place] == number]
        pinned, banned = problem.pinned[number, layer, expert], problem.banned[number, layer, expert]
        per_node.append([None] if banned else places if pinned else [None, *places])
    sets = [tuple(place for place in choice if place is not None) for choice in product(*per_node)]
    return [chosen for chosen in sets if len(chosen) >= problem.required]


def layer_wait(problem, layer, holders):
    total = 0.0
    for ingress, node in enumerate(problem.ingress_node):
        seen = problem.events[ingress][:, layer]
        nearest = [min((problem.cost_s[node, place] for place in places), default=np.inf) for places in holders]
        total += problem.tokens_per_s[ingress] * np.mean([max(nearest[expert] for expert in row) for row in seen])
    return float(total)


def least_latency(problem):
    """Least latency over all placements, by a programme over layers whose state is the slots used; None: infeasible."""
    slots = tuple(int(room) // problem.expert_bytes for room in problem.capacity_bytes)
    states = {(0,) * problem.num_places: 0.0}
    for layer in range(problem.layers):
        options = [holder_sets(problem, layer, expert) for expert in range(problem.experts)]
        assume(np.prod([float(len(option)) for option in options]) <= MOST)
        least = {}
        for holders in product(*options):
            used = tuple(sum(place in places for places in holders) for place in range(problem.num_places))
            if all(count <= room for count, room in zip(used, slots, strict=True)):
                least[used] = min(least.get(used, np.inf), layer_wait(problem, layer, holders))
        following = {}
        for state, cost in states.items():
            for used, extra in least.items():
                total = tuple(a + b for a, b in zip(state, used, strict=True))
                if all(count <= room for count, room in zip(total, slots, strict=True)):
                    following[total] = min(following.get(total, np.inf), cost + extra)
        states = following
    return min(states.values(), default=None)


def outcome(problem, solver, objective="latency"):
    try:
        return solve(problem, solver, objective=objective, limits=SolveLimits(time_s=20), in_process=True)
    except InfeasibleProblem:
        return None


@few
@pytest.mark.parametrize("solver", ["milp", "cpsat", "auto"])
@given(problem=problems())
def test_exact_solvers_find_the_least_latency(solver, problem):
    best = with_paths(problem, least_latency(problem), "latency")
    solved = outcome(problem, solver)
    assert (solved is None) == (best is None)
    if solved is not None:
        assert solved.result.objective == pytest.approx(best, rel=1e-6, abs=1e-12)
        assert solved.result.bound <= best * (1 + 1e-9) + 1e-12
        rates = problem.tokens_per_s.sum()
        assert solved.result.objective == pytest.approx(rates * judge(problem, solved.routing).predicted_latency_s)


@settings(few, max_examples=60)
@given(problem=problems())
def test_the_latency_solver_brackets_the_least_latency(problem):
    assume(not impossible(problem))
    best = least_latency(problem)
    result = solve_by_events(problem, limits=SolveLimits(time_s=20), report=ignore, schedule=QUICK)
    assert (result.placed is None) == (best is None)
    if best is not None:
        assert result.bound <= best * (1 + 1e-9) + 1e-12
        assert result.objective >= best * (1 - 1e-9)


@settings(few, max_examples=40)
@given(problem=problems(coupled=True))
def test_limits_never_make_a_bound_wrong(problem):
    assume(not impossible(problem))
    exact = outcome(problem, "milp")
    result = solve_by_events(problem, limits=SolveLimits(time_s=20), report=ignore, schedule=QUICK)
    if exact is None:
        assert result.placed is None
        return
    assert exact.result.bound <= exact.result.objective * (1 + 1e-9)
    path = path_cost(problem, "latency")
    assert result.bound + path <= exact.result.objective * (1 + 1e-6) + 1e-12
    if result.placed is not None:
        assert result.objective + path >= exact.result.bound * (1 - 1e-6)


@few
@given(problem=problems())
@pytest.mark.parametrize("objective", ["additive-latency", "remote-calls"])
def test_the_decomposition_brackets_the_additive_optimum(objective, problem):
    best = with_paths(problem, brute_force(problem, unit_of(problem, objective)), objective)
    solved = outcome(problem, "decomposition", objective)
    assert (solved is None) == (best is None)
    if solved is not None:
        assert solved.result.bound <= best * (1 + 1e-7) + 1e-12  # tolerance of its linear programmes
        assert solved.result.objective >= best * (1 - 1e-9)
        assert violations(problem, solved.placed, solved.routing) == []
        assert plan_cost(problem, solved.routing, objective) == pytest.approx(solved.result.objective)


@few
@given(problem=problems(), seed=st.integers(0, 9))
def test_names_of_experts_and_more_memory(problem, seed):
    """Permuting experts changes nothing; more memory never worsens the optimum."""
    first = outcome(problem, "milp")
    order = np.random.default_rng(seed).permutation(problem.experts)
    renamed = replace(
        problem,
        share=problem.share[:, :, np.argsort(order)],
        pinned=problem.pinned[:, :, np.argsort(order)],
        banned=problem.banned[:, :, np.argsort(order)],
        events=tuple(order[events].astype(np.int16) for events in problem.events),
    )
    second = outcome(renamed, "milp")
    larger = outcome(replace(problem, capacity_bytes=problem.capacity_bytes + problem.expert_bytes), "milp")
    assert (first is None) == (second is None)
    if first is not None:
        assert second.result.objective == pytest.approx(first.result.objective, rel=1e-6, abs=1e-12)
        assert larger.result.objective <= first.result.objective * (1 + 1e-6) + 1e-12
