"""OrderMoE's similarity groups (arXiv 2607.17154), from its description; no code of it is published.

Experts of a layer that do alike work form groups, and a group is spread over the servers, so that a server that lacks
an expert holds one that may stand in for it. There similarity is the cosine of router rows; here routers are not at
hand, so experts are alike that are chosen beside the same others: the cosine of their rows of co-activation counts,
each expert's own left out. Groups have as many members as there are nodes with room. What is left of memory goes to
the hottest experts. The online choice of a stand-in needs a quality budget, which this comparison does not spend.
"""

import numpy as np

from planner.objective import ObjectiveName
from planner.problem import Bools, Floats, Ints, Problem
from planner.solvers.base import Report, Result, SolveLimits
from planner.solvers.strategies.common import run_strategy
from planner.solvers.strategies.popularity import fill_in_order


def solve_ordermoe(problem: Problem, *, objective: ObjectiveName, limits: SolveLimits, report: Report) -> Result:  # noqa: ARG001
    """Group alike experts and spread each group."""
    return run_strategy("ordermoe", choose, problem, objective=objective)


def choose(problem: Problem) -> Bools:
    """Return which nodes hold which experts, bool ``[N, K]``."""
    held = np.zeros((problem.num_nodes, problem.layers, problem.experts), dtype=bool)
    left = problem.node_slots.copy()
    asked = problem.caller_demand.sum(axis=0)
    size = max(int((left > 0).sum()), 1)
    for layer in range(problem.layers):
        for group in group_alike(similarity(problem, layer), asked[layer], size):
            _spread(held[:, layer], group, left, problem.node_slots)
    flat = held.reshape(problem.num_nodes, -1)
    fill_in_order(flat, np.argsort(-asked.ravel(), kind="stable"), problem.node_slots)
    return flat


def similarity(problem: Problem, layer: int) -> Floats:
    """Cosine of experts' co-activation rows over all ingresses, float64 ``[E, E]``."""
    together = np.zeros((problem.experts, problem.experts))
    for events in problem.events:
        chosen = events[:, layer].astype(np.int64)
        np.add.at(together, (chosen[:, :, None], chosen[:, None, :]), 1.0)
    np.fill_diagonal(together, 0.0)
    length = np.maximum(np.linalg.norm(together, axis=1), 1e-12)
    return together @ together.T / np.outer(length, length)


def group_alike(alike: Floats, asked: Floats, size: int) -> list[Ints]:
    """Group experts: the hottest that is left takes those most like it, until all are grouped."""
    left = np.ones(len(asked), dtype=bool)
    groups = []
    for leader in np.argsort(-asked, kind="stable").tolist():
        if left[leader]:
            left[leader] = False
            others = np.flatnonzero(left)
            nearest = others[np.argsort(-alike[leader, others], kind="stable")[: size - 1]]
            left[nearest] = False
            groups.append(np.array([leader, *nearest], dtype=np.int64))
    return groups


def _spread(held: Bools, group: Ints, left: Ints, slots: Ints) -> None:
    """Give members to different nodes, those with most of their room left first. Modifies `held` and `left`."""
    used = np.zeros(len(left), dtype=bool)
    for expert in group.tolist():
        open_to = (left > 0) & ~used
        if not open_to.any():
            open_to = left > 0  # fewer nodes with room than members
        if not open_to.any():
            return
        node = int(np.where(open_to, left / np.maximum(slots, 1), -1.0).argmax())
        held[node, expert] = used[node] = True
        left[node] -= 1
