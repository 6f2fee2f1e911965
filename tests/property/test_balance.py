"""The heaviest node of each layer in the objective: both solvers that know it agree."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from planner.errors import InfeasibleProblem
from planner.objective import layer_load, node_load, plan_cost
from planner.solve import solve
from planner.solvers.base import SolveLimits
from tests.planning import problems

few = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))


def solved_by(problem, solver):
    limits = SolveLimits(time_s=20)
    try:
        return solve(problem, solver, objective="additive-latency", limits=limits, in_process=True)
    except InfeasibleProblem:
        return None


@few
@given(problem=problems(), weight=st.sampled_from([0.5, 20.0]))
def test_the_decomposition_brackets_the_balanced_optimum(problem, weight):
    balanced = replace(problem, balance=weight)
    exact, prices = solved_by(balanced, "milp"), solved_by(balanced, "decomposition")
    assert (exact is None) == (prices is None)
    if exact is None:
        return
    assert exact.result.gap <= 1e-4
    assert prices.result.bound <= exact.result.objective * (1 + 1e-6) + 1e-9
    assert prices.result.objective >= exact.result.bound * (1 - 1e-6) - 1e-9
    load = layer_load(balanced, exact.routing)
    assert load.sum(axis=0) == pytest.approx(node_load(balanced, exact.routing))
    waits = plan_cost(problem, exact.routing, "additive-latency")
    assert exact.result.objective == pytest.approx(waits + weight * np.sum(load.max(axis=1)))
