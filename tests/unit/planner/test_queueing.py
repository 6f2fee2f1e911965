"""Queues at busy holders: what they cost, and a placement that avoids them."""

import numpy as np
import pytest

from planner.objective import node_load
from planner.queueing import queue_seconds, queued_latency_s, solve_with_queues, with_queues
from planner.solve import solve
from planner.solvers.base import SolveLimits
from tests.planning import line, model_spec, node, problem_of, topology_of


def crowded():
    """One ingress without much room, a near slow helper that gets busy, and a farther fast one."""
    nodes = [
        node("a", device=2, rate=100),
        node("b", device=8, expert_us=2500),
        node("c", device=8, expert_us=100),
    ]
    links = [
        {"between": ["a", "b"], "latency": "1 ms", "bandwidth": "1 Gbit/s"},
        {"between": ["a", "c"], "latency": "3 ms", "bandwidth": "1 Gbit/s"},
    ]
    return problem_of(topology_of(nodes, links), model_spec())


def additive(problem):
    return solve(problem, "milp", objective="additive-latency", limits=SolveLimits(), in_process=True)


def test_an_evaluation_takes_its_time_over_what_is_left():
    problem = problem_of(topology_of([node("a", device=8, rate=5), node("b", device=8)], line("a", "b")), model_spec())
    seconds = queue_seconds(problem, np.array([0.0, 0.8]))
    assert seconds[0] == 0
    assert problem.service_s[1] + seconds[1] == pytest.approx(problem.service_s[1] / (1 - 0.8))
    assert np.isfinite(queue_seconds(problem, np.array([1.0, 7.0]))).all()


def test_queues_only_add_to_costs():
    problem = crowded()
    assert (with_queues(problem, np.array([0.1, 0.5, 0.0])).cost_s >= problem.cost_s).all()


def test_a_busy_helper_is_relieved():
    problem = crowded()
    blind = additive(problem)
    seeing = solve_with_queues(problem, additive)
    busy, relieved = (node_load(problem, found.routing)[1] for found in (blind, seeing))
    assert relieved < busy
    assert queued_latency_s(problem, seeing.routing) < queued_latency_s(problem, blind.routing)
    assert seeing.result.bound <= seeing.result.objective


def test_solve_counts_queues_where_asked(planner, workspace):
    quick = ("--objective", "additive-latency", "--json")
    plain, queued = (
        planner("solve", workspace.write(), *quick),
        planner("solve", workspace.write(), *quick, "--queueing"),
    )
    assert queued.code == 0, queued.err
    assert '"queued_latency_s"' in plain.out
    assert "with queues at busy nodes" in planner("solve", workspace.write(), "--objective", "additive-latency").out
