"""Uniform: experts dealt round-robin in proportion to memory, whoever asks for them."""

import numpy as np

from planner.objective import ObjectiveName
from planner.problem import Bools, Problem
from planner.solvers.base import Report, Result, SolveLimits
from planner.solvers.strategies.common import run_strategy


def solve_uniform(problem: Problem, *, objective: ObjectiveName, limits: SolveLimits, report: Report) -> Result:  # noqa: ARG001
    """Deal all experts in turn until every slot is taken."""
    return run_strategy("uniform", deal, problem, objective=objective)


def deal(problem: Problem) -> Bools:
    """Deal experts to nodes, bool ``[N, K]``: the next slot goes to the node that is furthest behind its share."""
    slots, count = problem.node_slots, problem.layers * problem.experts
    held = np.zeros((problem.num_nodes, count), dtype=bool)
    dealt, expert = np.zeros(problem.num_nodes), 0
    share = slots / max(slots.sum(), 1)
    for turn in range(int(slots.sum())):
        node = int(np.where(dealt < slots, share * (turn + 1) - dealt, -np.inf).argmax())
        lacking = np.flatnonzero(~held[node])
        later = lacking[lacking >= expert]
        chosen = int(later[0] if later.size else lacking[0])
        held[node, chosen] = True
        dealt[node] += 1
        expert = (chosen + 1) % count
    return held
