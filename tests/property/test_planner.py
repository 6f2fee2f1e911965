"""Both exact solvers find what brute force finds, agree with feasibility and objective, and with each other."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from planner.errors import BrokenPlacement, InfeasibleProblem, NoPlacementFound
from planner.feasibility import impossible, violations
from planner.objective import judge, nearest, path_seconds, placement_cost, unit_cost
from planner.solve import solve
from planner.solvers.base import SolveLimits, SolveStatus
from planner.solvers.routing import route
from tests.planning import brute_force, problems, with_paths

few = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
many = settings(few, max_examples=150)
objectives = st.sampled_from(["additive-latency", "remote-calls"])


def outcome(problem, solver, objective="additive-latency", time_s=60.0):
    """The solved placement, or None where there is proof that there is none."""
    try:
        return solve(problem, solver, objective=objective, limits=SolveLimits(time_s=time_s), in_process=True)
    except InfeasibleProblem as error:
        return told(error.violations)


def told(found):
    """Nothing, once it is sure that every violation has a message."""
    assert found
    assert all(violation.message for violation in found)


@few
@pytest.mark.parametrize("solver", ["milp", "cpsat"])
@given(problem=problems(), objective=objectives)
def test_exact_solvers_agree_with_brute_force(solver, problem, objective):
    best = with_paths(problem, brute_force(problem, unit_cost(problem, objective)), objective)
    solved = outcome(problem, solver, objective)
    assert (solved is None) == (best is None)
    if solved is not None:
        assert solved.result.objective == pytest.approx(best, rel=1e-6, abs=1e-12)
        assert solved.result.gap <= 1e-4
        assert solved.result.bound <= best * (1 + 1e-9) + 1e-12
        assert violations(problem, solved.placed, solved.routing) == []


@settings(few, max_examples=10)
@given(problem=problems())
def test_cbc_agrees_with_brute_force(problem):
    best = with_paths(problem, brute_force(problem, unit_cost(problem, "additive-latency")))
    solved = outcome(problem, "milp:cbc")
    assert (solved is None) == (best is None)
    if solved is not None:
        assert solved.result.objective == pytest.approx(best, rel=1e-6, abs=1e-12)
        assert solved.result.bound is None or solved.result.bound <= best * (1 + 1e-9) + 1e-12


@settings(few, max_examples=60)
@given(problem=problems(coupled=True))
def test_exact_solvers_agree_when_compute_and_links_are_short(problem):
    """CP-SAT may need long to prove the last tenth of a percent here; what it claims by then must be true."""
    by_milp = outcome(problem, "milp")
    try:
        by_cpsat = outcome(problem, "cpsat", time_s=1.0)
    except NoPlacementFound:
        return
    assert (by_milp is None) == (by_cpsat is None)
    if by_milp is not None:
        best = by_milp.result.objective
        assert by_cpsat.result.objective >= best * (1 - 1e-6) - 1e-9
        if by_cpsat.result.gap <= 1e-4:
            assert by_cpsat.result.objective == pytest.approx(best, rel=2e-4, abs=1e-9)
        for solved in (by_milp, by_cpsat):
            assert violations(problem, solved.placed, solved.routing) == []
            assert solved.result.bound <= by_milp.result.objective * (1 + 1e-6) + 1e-9


@many
@given(problem=problems())
def test_strategies_place_wherever_anything_can_be_placed(problem):
    best = with_paths(problem, brute_force(problem, unit_cost(problem, "additive-latency")))
    for solver in ("uniform", "dancemoe"):
        try:
            solved = outcome(problem, solver)
        except NoPlacementFound:
            solved = None
        assert (solved is None) == (best is None), solver
        if solved is not None:
            assert solved.result.bound is None
            assert solved.result.gap is None
            assert solved.result.status is SolveStatus.FEASIBLE
            assert solved.result.objective >= best * (1 - 1e-9)


@many
@given(problem=problems(coupled=True))
def test_a_strategy_that_breaks_a_limit_is_told_not_written(problem):
    try:
        solved = outcome(problem, "dancemoe")
    except BrokenPlacement as error:
        told(error.violations)
    except NoPlacementFound:
        return
    else:
        assert solved is None or violations(problem, solved.placed, solved.routing) == []


@many
@given(problem=problems(), seed=st.integers(0, 1000))
def test_feasible_means_no_violations(problem, seed):
    rng = np.random.default_rng(seed)
    placed = rng.random((problem.num_places, problem.layers, problem.experts)) < rng.random()
    routing = nearest(problem, placed, "additive-latency") if problem.num_places else None
    if routing is None:
        return
    found = {violation.constraint for violation in violations(problem, placed, routing)}
    nodes = [placed[problem.place_node == n].sum(axis=0) for n in range(problem.num_nodes)]
    holding = sum((count > 0).astype(int) for count in nodes)
    assert bool(found & {"coverage", "replicas"}) == bool((holding < problem.required).any())
    assert ("one-tier" in found) == any((count > 1).any() for count in nodes)
    used = placed.sum(axis=(1, 2)) * problem.expert_bytes
    assert ("memory" in found) == bool((used > problem.capacity_bytes).any())
    pinned, banned = (
        any((array[n] & (have if ban else ~have)).any() for n, have in enumerate(count > 0 for count in nodes))
        for array, ban in ((problem.pinned, False), (problem.banned, True))
    )
    assert ("pin" in found, "ban" in found) == (pinned, banned)
    asked = problem.caller_demand.sum(axis=0) > 0
    assert ("assignment" in found) == bool((asked & (holding == 0)).any())


@many
@given(problem=problems(), seed=st.integers(0, 1000))
def test_judgement_is_what_a_plain_loop_finds(problem, seed):
    if problem.num_places == 0:
        return
    rng = np.random.default_rng(seed)
    shape = (problem.layers, problem.experts)
    placed = np.zeros((problem.num_places, *shape), dtype=bool)
    np.put_along_axis(placed, rng.integers(problem.num_places, size=(1, *shape)), values=True, axis=0)
    routing = nearest(problem, placed, "additive-latency")
    seen = judge(problem, routing)
    for i, events in enumerate(problem.events):
        here = problem.ingress_node[i]
        waited = remote = called = sent = 0
        for token in events:
            for layer, chosen in enumerate(token):
                holders = [int(routing.holder[here, layer, expert]) for expert in chosen]
                nodes = [int(problem.place_node[place]) for place in holders]
                waited += max(problem.cost_s[here, place] for place in holders)
                called += sum(other != here for other in nodes)
                remote += any(other != here for other in nodes)
                sent += len(set(nodes) - {here}) * problem.call_bytes
        calls = events.size
        assert seen.wait_s[i] == pytest.approx(waited / len(events))
        assert seen.latency_s[i] == pytest.approx(waited / len(events) + path_seconds(problem)[i])
        assert seen.remote_calls[i] == pytest.approx(called / calls)
        assert seen.any_remote[i] == pytest.approx(remote / (len(events) * problem.layers))
        assert seen.bytes_per_token[i] == pytest.approx(sent / len(events))
    calls = sum(
        problem.tokens_per_s[i] * problem.share[i, layer, expert] * problem.cost_s[n, routing.holder[n, layer, expert]]
        for i, n in enumerate(problem.ingress_node)
        for layer in range(problem.layers)
        for expert in range(problem.experts)
    )
    assert placement_cost(problem, routing, "additive-latency") == pytest.approx(calls)


@few
@given(problem=problems(coupled=True))
def test_routing_is_no_worse_in_shares_than_to_the_nearest(problem):
    if impossible(problem) or problem.num_places == 0:
        return
    placed = np.zeros((problem.num_places, problem.layers, problem.experts), dtype=bool)
    placed[:] = problem.allowed
    routing = route(problem, placed, "additive-latency")
    if routing is not None and routing.share is not None:
        assert np.allclose(routing.share.sum(axis=1), 1)
        least = placement_cost(problem, nearest(problem, placed, "additive-latency"), "additive-latency")
        assert placement_cost(problem, routing, "additive-latency") >= least * (1 - 1e-9)
