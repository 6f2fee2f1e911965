import pytest
from hypothesis import given, settings

from planner.feasibility import impossible, violations
from planner.objective import nearest
from planner.solvers.base import SolveLimits, ignore
from planner.solvers.strategies.eplb import solve_eplb
from planner.solvers.strategies.moetuner import solve_moetuner
from planner.solvers.strategies.ordermoe import solve_ordermoe
from planner.solvers.strategies.popularity import solve_popularity
from tests.planning import problems

UNKNOWN = {"load", "link"}  # no heuristic knows utilisation; solve re-checks it and says so


@pytest.mark.parametrize("solver", [solve_popularity, solve_eplb, solve_moetuner, solve_ordermoe])
@settings(max_examples=60, deadline=None)
@given(problem=problems())
def test_a_placement_keeps_all_that_placing_alone_can_keep_or_there_is_none(solver, problem):
    if impossible(problem):
        return
    result = solver(problem, objective="additive-latency", limits=SolveLimits(), report=ignore)
    if result.placed is None:
        assert result.detail
        return
    broken = violations(problem, result.placed, nearest(problem, result.placed, "additive-latency"))
    assert {violation.constraint for violation in broken} <= UNKNOWN
