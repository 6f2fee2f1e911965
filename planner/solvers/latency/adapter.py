"""The latency instance of a `planner.problem.Problem`, and the limits that stay outside it.

Decides how places, pins and trunks of a problem become arrays here. Must not know how they are solved.
"""

from collections.abc import Callable

import numpy as np

from planner.feasibility import violations
from planner.objective import nearest
from planner.problem import Bools, Problem
from planner.solvers.latency.instance import LatencyInstance, latency_instance


def instance_of(problem: Problem) -> LatencyInstance:
    """Count waits from where the trunk of each layer runs; the objective is seconds waited per second.

    A pin says that a node holds an expert in any tier. Where the node has several, the search keeps to one of them,
    the bound to none.
    """
    forced = pins_by_place(problem)
    siblings = np.bincount(problem.place_node, minlength=problem.num_nodes)[problem.place_node]
    return latency_instance(
        problem.events,
        problem.tokens_per_s,
        problem.cost_s[problem.trunk_node],
        problem.slots,
        node_of_place=problem.place_node,
        num_experts=problem.experts,
        required=problem.required,
        allowed=problem.allowed,
        forced=forced,
        any_tier=forced & (siblings > 1)[:, None, None],
    )


def pins_by_place(problem: Problem) -> Bools:
    """Put each node's pinned experts into its fastest places, as many as fit, most asked for first; ``[P, L, E]``.

    Experts are of one size and tiers differ in speed alone, so this leaves a placement wherever there is one.
    """
    forced = np.zeros((problem.num_places, problem.layers * problem.experts), dtype=bool)
    demand = problem.caller_demand.sum(axis=0).ravel()
    for node in np.flatnonzero(problem.pinned.any(axis=(1, 2))):
        pinned = np.flatnonzero(problem.pinned[node])
        waiting = pinned[np.argsort(-demand[pinned], kind="stable")]
        for place in np.flatnonzero(problem.place_node == node):
            forced[place, waiting[: problem.slots[place]]] = True
            waiting = waiting[problem.slots[place] :]
    return forced.reshape(problem.num_places, problem.layers, problem.experts)


def keeps_limits(problem: Problem) -> Callable[[Bools], bool]:
    """Whether a placement, each call to its nearest replica, keeps every constraint, those of load and links too."""
    return lambda placed: not violations(problem, placed, nearest(problem, placed, "latency"))
