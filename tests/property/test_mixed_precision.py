"""Nodes that hold experts in precisions of their own: no plan takes more bytes than there are, whoever solved it."""

from itertools import product

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from planner.assemble import placement_records
from planner.errors import InfeasibleProblem, NoPlacementFound, UnsafePlan
from planner.feasibility import violations
from planner.lowering import WORTH, Rated, choose_precisions
from planner.objective import unit_cost
from planner.precision import PrecisionCosts, expected_rise
from planner.solve import solve
from planner.solvers.base import SolveLimits
from planner.steps import migration_steps
from tests.planning import (
    SIZES,
    brute_force,
    line,
    mixed_problems,
    model_spec,
    node,
    problem_of,
    topology_of,
    with_paths,
)

few = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
LIMITS = SolveLimits(time_s=20.0)


def solved(problem, solver, objective="additive-latency"):
    try:
        return solve(problem, solver, objective=objective, limits=LIMITS, in_process=True)
    except (InfeasibleProblem, NoPlacementFound):
        return None


def require_room(problem, placed, sizes):
    for place, size in enumerate(sizes):
        assert int(placed[place].sum()) * size <= problem.capacity_bytes[place], problem.place_name(place)


@few
@pytest.mark.parametrize("solver", ["milp", "cpsat", "decomposition"])
@given(drawn=mixed_problems())
def test_solvers_agree_with_brute_force_over_bytes(solver, drawn):
    problem, sizes = drawn
    best = with_paths(problem, brute_force(problem, unit_cost(problem, "additive-latency"), sizes))
    found = solved(problem, solver)
    assert (found is None) == (best is None)
    if found is not None:
        assert found.result.bound <= best * (1 + 1e-9) + 1e-12
        assert found.result.objective >= best * (1 - 1e-6)
        if solver != "decomposition":
            assert found.result.objective == pytest.approx(best, rel=1e-6, abs=1e-12)
        require_room(problem, found.placed, sizes)
        assert violations(problem, found.placed, found.routing) == []


@few
@given(
    drawn=mixed_problems(), solver=st.sampled_from(["auto", "uniform", "popularity", "eplb", "dancemoe", "ordermoe"])
)
def test_no_placement_takes_more_bytes_than_there_are(drawn, solver):
    problem, sizes = drawn
    found = solved(problem, solver, "latency")
    if found is not None:
        require_room(problem, found.placed, sizes)


@few
@given(drawn=mixed_problems())
def test_every_stage_of_a_migration_keeps_within_bytes(drawn):
    problem, sizes = drawn
    first, second = solved(problem, "uniform"), solved(problem, "dancemoe", "latency")
    if first is None or second is None:
        return
    before, after = (placement_records(problem, one.placed) for one in (first, second))
    index = {(problem.node_ids[n], problem.tier(p)): p for p, n in enumerate(problem.place_node.tolist())}
    held = {(index[r.node, r.tier], r.layer, r.expert) for r in before}
    try:
        steps = migration_steps(problem, before, after).steps
    except UnsafePlan:
        return  # no slot is free anywhere
    for step in steps:
        if step.action == "switch":
            continue
        record = (index[step.node, step.tier], step.layer, step.expert)
        assert step.bytes == sizes[record[0]]
        held = held | {record} if step.action == "replicate" else held - {record}
        for place, size in enumerate(sizes):
            assert sum(at == place for at, _, _ in held) * size <= problem.capacity_bytes[place]
    assert held == {(index[r.node, r.tier], r.layer, r.expert) for r in after}


LADDER = tuple(SIZES)
COST = {"checkpoint": 0.0, "int8": 2e-4, "int4": 2e-3}


@settings(few, max_examples=12)
@given(
    rooms=st.lists(st.integers(2, 8), min_size=2, max_size=2),
    budget=st.sampled_from([1e-4, 1e-3, 4e-3, 1e-1]),
    seed=st.integers(0, 5),
)
def test_precisions_are_the_best_of_all_within_the_budget(rooms, budget, seed):
    model = model_spec(layers=2, experts=4, top_k=2)
    nodes = [node(name, device=room, rate=20) for name, room in zip("ab", rooms, strict=True)]
    costs = PrecisionCosts({low: np.full(model.layers, nll) for low, nll in COST.items()})

    def rate(assignment):
        held = [{**each, "precision": low} for each, low in zip(nodes, assignment, strict=True)]
        problem = problem_of(topology_of(held, line("a", "b")), model, seed=seed, sizes=SIZES)
        found = solved(problem, "milp")
        if found is None:
            return Rated(np.inf, 0.0)
        return Rated(found.result.objective, float(expected_rise(problem, found.routing, assignment, costs).max()))

    chosen, _ = choose_precisions([LADDER, LADDER], rate, budget=budget)
    everything = {assignment: rate(assignment) for assignment in product(LADDER, LADDER)}
    allowed = {a: rated for a, rated in everything.items() if rated.rise <= budget * (1 + 1e-9)}
    least = min((rated.objective for rated in allowed.values()), default=np.inf)
    if np.isinf(least):
        assert chosen == ("checkpoint", "checkpoint")
        return
    assert allowed[chosen].objective <= least * (1 + WORTH) * (1 + 1e-9)
    good = [rated.rise for rated in allowed.values() if rated.objective <= least * (1 + WORTH)]
    assert allowed[chosen].rise == pytest.approx(min(good), abs=1e-12)


@settings(few, max_examples=60)
@given(data=st.data(), count=st.integers(3, 6), budget=st.floats(0, 0.05))
def test_a_search_over_many_nodes_keeps_the_budget_and_is_no_worse_than_no_choice(data, count, budget):
    """What nodes save and lose is made up here: it is the search that is tested."""
    saves = data.draw(st.lists(st.floats(0, 1), min_size=count, max_size=count))
    loses = data.draw(st.lists(st.floats(1e-4, 0.02), min_size=count, max_size=count))

    def rate(assignment):
        steps = [LADDER.index(low) for low in assignment]
        objective = 10 * count - sum(s * step for s, step in zip(saves, steps, strict=True))
        return Rated(objective, sum(lost * step for lost, step in zip(loses, steps, strict=True)))

    chosen, rated = choose_precisions([LADDER] * count, rate, budget=budget)
    assert rated[chosen].rise <= budget * (1 + 1e-9)
    assert rated[chosen].objective <= rate(LADDER[:1] * count).objective * (1 + WORTH)
    for position in range(count):  # no single step down is worth it and within the budget
        lower = LADDER.index(chosen[position]) + 1
        if lower < len(LADDER):
            step = rate((*chosen[:position], LADDER[lower], *chosen[position + 1 :]))
            assert step.rise > budget or step.objective >= rated[chosen].objective * (1 - WORTH) - 1e-9
