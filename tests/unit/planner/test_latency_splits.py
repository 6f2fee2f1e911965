"""The bound of the wait from calls added up: it holds for every placement, whatever the weights."""

from dataclasses import replace
from itertools import count

import numpy as np
import pytest

from planner.objective import nearest, placement_cost
from planner.solvers.base import SolveLimits, ignore
from planner.solvers.decomposition.solver import solve_decomposition
from planner.solvers.latency.solver import solve_by_events
from planner.solvers.latency.splits import split_bound
from tests.small_clusters import make_model, make_problem, make_topology

SLOTS, RATES = [9, 12, 10, 14], [3.0, 1.0, 2.0, 0.5]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("links", [None, [(0, 1), (1, 2), (2, 3)]])
def test_it_is_below_the_proven_optimum_and_every_placement_met(seed, links):
    problem = make_problem(make_topology(SLOTS, RATES, links=links), make_model(), seed=seed)
    bound, met = split_bound(problem, time_s=1e6)
    best = solve_by_events(problem, limits=SolveLimits(time_s=2), report=ignore)
    values = [placement_cost(problem, nearest(problem, placed, "latency"), "latency") for placed in met]
    assert best.objective is not None
    assert bound <= min([best.objective, *values]) * (1 + 1e-9)
    assert all((placed.sum(axis=(1, 2)) <= problem.slots).all() for placed in met)


def test_more_weight_on_slow_calls_proves_more_than_equal_weights():
    problem = make_problem(make_topology(SLOTS, RATES, links=[(0, 1), (1, 2), (2, 3)]), make_model())
    ticks = count()
    once, _ = split_bound(problem, time_s=1.5, clock=lambda: float(next(ticks)))
    equal = solve_decomposition(
        problem, objective="additive-latency", limits=SolveLimits(time_s=10, gap=1e-3), report=ignore
    ).bound
    assert equal is not None
    assert once == pytest.approx(equal / problem.top_k, rel=1e-2)
    assert split_bound(problem, time_s=1e6)[0] > 1.05 * once


def test_limits_of_load_and_links_do_not_raise_it():
    problem = make_problem(make_topology(SLOTS, RATES), make_model())
    tight = replace(problem, link_limit=np.full_like(problem.link_limit, 1e-6))
    assert split_bound(tight, time_s=1e6)[0] == pytest.approx(split_bound(problem, time_s=1e6)[0])


def test_many_places_use_it():
    nodes = 26
    topology = make_topology([4] * nodes, [1.0] * nodes, links=[(a, a + 1) for a in range(nodes - 1)])
    problem = make_problem(topology, make_model(layers=2, experts=24), tokens=20)
    found = solve_by_events(problem, limits=SolveLimits(time_s=4), report=ignore)
    assert found.objective is not None
    assert 0 < found.bound <= found.objective
