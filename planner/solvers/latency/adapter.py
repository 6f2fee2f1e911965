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

    A pin says that a node holds an expert in any tier. Where the node has several, the fastest is taken: such a pin
    makes the problem narrower than it is, and the bound that of the narrower problem.
    """
    pinned = problem.pinned[problem.place_node]
    first = np.zeros(problem.num_places, dtype=bool)
    first[np.unique(problem.place_node, return_index=True)[1]] = True
    return latency_instance(
        problem.events,
        problem.tokens_per_s,
        problem.cost_s[problem.trunk_node],
        problem.slots,
        node_of_place=problem.place_node,
        num_experts=problem.experts,
        required=problem.required,
        allowed=problem.allowed,
        forced=pinned & first[:, None, None],
    )


def keeps_limits(problem: Problem) -> Callable[[Bools], bool]:
    """Whether a placement, each call to its nearest replica, keeps every constraint, those of load and links too."""
    return lambda placed: not violations(problem, placed, nearest(problem, placed, "additive-latency"))
