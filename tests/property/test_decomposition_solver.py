"""The decomposition as a solver: it finds what brute force and the exact models find, on problems as users state them."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from planner.errors import InfeasibleProblem
from planner.feasibility import impossible, violations
from planner.objective import placement_cost, unit_cost
from planner.solve import solve
from planner.solvers.base import Bound, Incumbent, SolveLimits, SolveStatus
from planner.solvers.decomposition.solver import solve_decomposition
from planner.solvers.routing import route
from tests.planning import brute_force, problems

few = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
OBJECTIVES = st.sampled_from(["additive-latency", "remote-calls"])


def run(problem, objective):
    """Result and reports; None for the result where counting shows that there is no placement."""
    told = []
    if impossible(problem):
        return None, told
    limits = SolveLimits(time_s=30, gap=1e-6)
    return solve_decomposition(problem, objective=objective, limits=limits, report=told.append), told


@few
@given(problem=problems(), objective=OBJECTIVES)
def test_it_agrees_with_brute_force(problem, objective):
    best = brute_force(problem, unit_cost(problem, objective))
    result, told = run(problem, objective)
    if result is None or result.status is SolveStatus.INFEASIBLE:
        assert best is None
        return
    assert result.objective == pytest.approx(best, rel=1e-6, abs=1e-12)
    assert result.bound <= best * (1 + 1e-9) + 1e-12
    assert result.status is SolveStatus.OPTIMAL
    routing = route(problem, result.placed, objective)
    assert violations(problem, result.placed, routing) == []
    assert placement_cost(problem, routing, objective) == pytest.approx(result.objective, rel=1e-9, abs=1e-12)
    values = [progress.value for progress in told if isinstance(progress, Incumbent)]
    bounds = [progress.value for progress in told if isinstance(progress, Bound)]
    assert values == sorted(values, reverse=True)
    assert values[-1] == pytest.approx(result.objective)
    assert bounds == sorted(bounds)


@few
@given(problem=problems(coupled=True))
def test_it_agrees_with_the_exact_model_when_compute_and_links_are_short(problem):
    try:
        exact = solve(problem, "milp", objective="additive-latency", in_process=True)
    except InfeasibleProblem:
        exact = None
    result, _ = run(problem, "additive-latency")
    if exact is None:
        assert result is None or result.placed is None
        return
    least = placement_cost(exact.problem, exact.routing, "additive-latency")  # what paths add, no solver decides
    assert result.bound <= least * (1 + 1e-6) + 1e-9
    assert result.objective == pytest.approx(least, rel=1e-4, abs=1e-9)
    routing = route(problem, result.placed, "additive-latency")
    assert violations(problem, result.placed, routing) == []
