"""Packed: each node keeps whole layers of those whose trunk it runs, as many as fit, then the experts asked for most.

A layer waits once for all its remote experts, so a layer that is held in full saves more than its experts spread over
two. This is how a search over trunks looks at one quickly; pipelines are the case where everything fits.
"""

import numpy as np

from planner.objective import ObjectiveName
from planner.problem import Bools, Problem
from planner.solvers.base import Report, Result, SolveLimits
from planner.solvers.strategies.common import node_demand, run_strategy


def solve_packed(problem: Problem, *, objective: ObjectiveName, limits: SolveLimits, report: Report) -> Result:  # noqa: ARG001
    """Fill nodes layer by layer."""
    return run_strategy("packed", choose, problem, objective=objective)


def choose(problem: Problem) -> Bools:
    """Return which nodes hold which experts, bool ``[N, K]``, before coverage is mended."""
    demand = node_demand(problem).reshape(problem.num_nodes, problem.layers, problem.experts)
    held = np.zeros((problem.num_nodes, problem.layers * problem.experts), dtype=bool)
    asked = problem.caller_demand.sum(axis=2)  # [N, L]
    for node in range(problem.num_nodes):
        order = np.argsort(-asked[node], kind="stable")
        layers = order[asked[node, order] > 0]
        ranked = [layer * problem.experts + np.argsort(-demand[node, layer], kind="stable") for layer in layers]
        if ranked:
            held[node, np.concatenate(ranked)[: problem.node_slots[node]]] = True
    return held
