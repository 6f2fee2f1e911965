"""Replicas in distinct failure domains: every solver keeps them, and those that prove agree."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from planner.errors import InfeasibleProblem
from planner.feasibility import violations
from planner.objective import nearest
from planner.solve import solve
from planner.solvers.base import SolveLimits, ignore
from planner.solvers.latency import Schedule
from planner.solvers.latency.solver import solve_by_events
from tests.planning import line, model_spec, node, problem_of, problems, topology_of

few = settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
QUICK = Schedule(dual_steps=20, rounds=1, select_steps=50)


@st.composite
def divided(draw):
    """A problem of three nodes, two of which fail together, with two replicas in different domains."""
    problem = draw(problems())
    assume(problem.num_nodes == 3)
    roomy = problem.capacity_bytes * draw(st.sampled_from([1, 3]))
    return replace(
        problem, capacity_bytes=roomy, required=2, domain=np.array(draw(st.permutations([0, 0, 1])), dtype=np.int64)
    )


def solved_by(problem, solver):
    limits = SolveLimits(time_s=20)
    try:
        return solve(problem, solver, objective="additive-latency", limits=limits, in_process=True)
    except InfeasibleProblem:
        return None


@few
@given(problem=divided())
def test_solvers_agree_on_what_domains_cost(problem):
    milp, cpsat, prices = (solved_by(problem, solver) for solver in ("milp", "cpsat", "decomposition"))
    assert (milp is None) == (cpsat is None) == (prices is None)
    if milp is None:
        return
    assert cpsat.result.objective == pytest.approx(milp.result.objective, rel=1e-6, abs=1e-12)
    assert prices.result.bound <= milp.result.objective * (1 + 1e-9) + 1e-12
    assert prices.result.objective >= milp.result.bound * (1 - 1e-9) - 1e-12
    for found in (milp, cpsat, prices):
        held = problem.held(found.placed)
        for expert in np.argwhere(np.ones(held.shape[1:])).tolist():
            assert len(set(problem.domain[held[:, *expert]].tolist())) >= 2


@few
@given(problem=divided())
def test_the_latency_solver_keeps_domains_and_its_bound_holds(problem):
    exact = solved_by(problem, "milp")
    assume(exact is not None)
    result = solve_by_events(problem, limits=SolveLimits(time_s=20), report=ignore, schedule=QUICK)
    assert violations(problem, result.placed, nearest(problem, result.placed, "latency")) == []
    assert result.bound <= result.objective * (1 + 1e-9)


def test_two_nodes_of_one_domain_do_not_count_twice():
    problem = _three_nodes()
    everywhere = np.ones((problem.num_places, problem.layers, problem.experts), dtype=bool)
    in_one_domain = everywhere.copy()
    in_one_domain[2] = False
    assert [v.constraint for v in violations(problem, everywhere, nearest(problem, everywhere, "latency"))] == []
    broken = violations(problem, in_one_domain, nearest(problem, in_one_domain, "latency"))
    assert [v.unit for v in broken] == ["failure domains"]


def _three_nodes():
    nodes = [node(name, device=8, rate=5) | {"domain": domain} for name, domain in zip("abc", "rrs", strict=True)]
    return problem_of(topology_of(nodes, line(*"abc"), replicas={"survive": 1}), model_spec())
