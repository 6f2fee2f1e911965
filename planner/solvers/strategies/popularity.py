"""Popularity: every expert once, and the experts that all tokens together ask for most on every node.

The plain baseline of caching work (FORMULATION.md): one global ranking, whoever asks.
"""

import numpy as np

from planner.objective import ObjectiveName
from planner.problem import Bools, Ints, Problem
from planner.solvers.base import Report, Result, SolveLimits
from planner.solvers.strategies.common import run_strategy


def solve_popularity(problem: Problem, *, objective: ObjectiveName, limits: SolveLimits, report: Report) -> Result:  # noqa: ARG001
    """Deal every expert once, then fill every node with the globally hottest."""
    return run_strategy("popularity", choose, problem, objective=objective)


def choose(problem: Problem) -> Bools:
    """Return which nodes hold which experts, bool ``[N, K]``."""
    count = problem.layers * problem.experts
    hottest = np.argsort(-problem.caller_demand.sum(axis=0).ravel(), kind="stable")
    held = deal_once(hottest, problem.node_slots, problem.required, count)
    fill_in_order(held, hottest, problem.node_slots)
    return held


def deal_once(order: Ints, slots: Ints, copies: int, count: int) -> Bools:
    """Deal `copies` of every expert in `order` to the nodes with most of their slots left, bool ``[N, K]``."""
    held = np.zeros((len(slots), count), dtype=bool)
    left = slots.astype(np.float64)
    for expert in np.tile(order, copies).tolist():
        open_to = (left > 0) & ~held[:, expert]
        if not open_to.any():
            break
        node = int(np.where(open_to, left / np.maximum(slots, 1), -1.0).argmax())
        held[node, expert] = True
        left[node] -= 1
    return held


def fill_in_order(held: Bools, order: Ints, slots: Ints) -> None:
    """Fill every node's free slots with the first experts of `order` that it lacks. Modifies `held`."""
    for node, total in enumerate(slots.tolist()):
        lacking = order[~held[node, order]]
        held[node, lacking[: max(total - int(held[node].sum()), 0)]] = True
