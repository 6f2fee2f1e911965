"""Problems of the planner as instances of the latency solver."""

import numpy as np
import pytest
from hypothesis import given, settings

from planner.feasibility import violations
from planner.objective import judge, nearest
from planner.solvers.latency import Schedule, solve_latency
from planner.solvers.latency.adapter import instance_of, keeps_limits
from tests.planning import problems

QUICK = Schedule(dual_steps=30, rounds=1, select_steps=50)


@settings(max_examples=60, deadline=None)
@given(problems())
def test_the_objective_is_the_predicted_latency_and_nothing_infeasible_returns(problem) -> None:
    rates = problem.tokens_per_s.sum()
    if not rates or (problem.pinned & problem.banned).any():
        return
    outcome = solve_latency(instance_of(problem), schedule=QUICK, acceptable=keeps_limits(problem))
    if outcome.placed is None:
        return
    routing = nearest(problem, outcome.placed, "additive-latency")
    assert violations(problem, outcome.placed, routing) == []
    assert outcome.objective is not None
    assert outcome.objective == pytest.approx(problem.tokens_per_s @ judge(problem, routing).wait_s)
    assert np.isfinite(outcome.bound)
    assert outcome.bound <= outcome.objective
