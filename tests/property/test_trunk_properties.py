"""Paths and placement together: never worse than any of the ways they stand for, and bracketed by an exact model."""

import numpy as np
import pytest

from planner.errors import BrokenPlacement, InfeasibleProblem, NoPlacementFound
from planner.feasibility import violations
from planner.objective import plan_cost
from planner.solve import solve
from planner.solvers.base import SolveLimits
from planner.trunk.bound import blame_of, joint_bound, trunk_bound
from tests.paths import least_cost, random_cluster

QUICK = SolveLimits(time_s=0.1, gap=1e-5)
NOTHING = (InfeasibleProblem, NoPlacementFound, BrokenPlacement)


def solved(problem, solver, limits=QUICK):
    try:
        return solve(problem, solver, limits=limits, in_process=True)
    except NOTHING:
        return None


@pytest.mark.parametrize("block", range(8))
def test_moving_is_never_worse_than_staying_or_a_pipeline(block):
    for seed in range(25 * block, 25 * block + 25):
        problem = random_cluster(seed, prompt_tokens=300 if seed % 3 == 0 else 0, mixed=seed % 5 == 0)
        if problem is None:
            continue
        ours = solved(problem, "auto")
        for rival in ("dancemoe", "pipeline", "pipeline-speed"):
            other = solved(problem, rival)
            if other is not None:
                assert ours is not None, (seed, rival)
                best, theirs = (one.judgement.predicted_latency_s for one in (ours, other))
                assert best <= theirs * (1 + 1e-9), (seed, rival)
        if ours is not None:
            assert violations(ours.problem, ours.placed, ours.routing) == []
            assert ours.result.bound <= ours.result.objective * (1 + 1e-9)
            taken, kv = ours.problem.room.taken(ours.problem.trunk_node)
            used = ours.placed.sum(axis=(1, 2)) * ours.problem.place_bytes
            per_node = np.bincount(ours.problem.place_node, weights=used, minlength=ours.problem.num_nodes)
            assert (per_node + taken + kv <= ours.problem.room.room_bytes.sum(axis=1)).all()


@pytest.mark.parametrize("seed", range(12))
def test_the_joint_model_is_between_bound_and_search(seed):
    problem = random_cluster(seed, nodes=3, layers=3, experts=3, ingresses=2, tokens=6, mixed=seed % 3 == 0)
    if problem is None:
        return
    exact = solved(problem, "milp", SolveLimits(time_s=20, gap=1e-4))
    found = solved(problem, "decomposition", SolveLimits(time_s=8, gap=1e-5))
    if exact is None or found is None:  # where no slot is to spare, the search may miss the one way there is
        assert found is None
        assert exact is None or exact.problem.node_slots.sum() == problem.layers * problem.experts
        return
    least = joint_bound(problem, "latency")
    assert least <= exact.result.objective * (1 + 1e-9)
    assert exact.result.bound <= found.result.objective * (1 + 1e-9)
    assert found.result.objective <= exact.result.objective * 1.25
    assert exact.result.objective == pytest.approx(plan_cost(exact.problem, exact.routing, "latency"))
    rate = problem.tokens_per_s.sum()
    for one in (exact, found):
        assert trunk_bound(one.problem, blame_of(problem, "latency")) * rate <= one.result.objective * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(30, 42))
@pytest.mark.parametrize("mixed", [False, True])
def test_the_joint_model_finds_what_trying_everything_finds(seed, mixed):
    problem = random_cluster(seed, nodes=2, layers=2, experts=2, ingresses=2, tokens=3, mixed=mixed)
    if problem is None or len(set(problem.place_node.tolist())) < problem.num_places:
        return
    best, exact = least_cost(problem), solved(problem, "milp", SolveLimits(time_s=20, gap=1e-6))
    assert (best is None) == (exact is None)
    if best is not None:
        assert exact.result.objective == pytest.approx(best, rel=1e-5)
        assert joint_bound(problem, "latency") <= best * (1 + 1e-9)
