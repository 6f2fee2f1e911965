"""DanceMoE's placement (Prism, arXiv 2508.12851), from its description.

Slots of a node for a layer in proportion to the entropy of the node's activations there; slots shifted between layers
until every layer can be covered; each node takes its own most used experts; experts that nobody took replace the
least used duplicates. Its proxy is the number of remote calls; it knows neither links nor compute. What it says about
adopting a new plan over a current one belongs to replanning, not here.
"""

import numpy as np

from planner.objective import ObjectiveName
from planner.problem import Bools, Floats, Ints, Problem
from planner.solvers.base import Report, Result, SolveLimits
from planner.solvers.strategies.common import node_demand, run_strategy


def solve_dancemoe(problem: Problem, *, objective: ObjectiveName, limits: SolveLimits, report: Report) -> Result:  # noqa: ARG001
    """Place by activation entropy."""
    return run_strategy("dancemoe", choose, problem, objective=objective)


def choose(problem: Problem) -> Bools:
    """Return which nodes hold which experts, bool ``[N, K]``, before coverage is mended."""
    demand = node_demand(problem).reshape(problem.num_nodes, problem.layers, problem.experts)
    slots = cover_layers(layer_slots(demand, problem.node_slots), problem.experts * problem.required, problem.experts)
    rank = (-demand).argsort(axis=2, kind="stable").argsort(axis=2, kind="stable")
    taken: Bools = (rank < slots[:, :, None]).reshape(problem.num_nodes, -1)
    return taken


def layer_slots(demand: Floats, slots: Ints) -> Ints:
    """Split each node's slots over layers in proportion to entropy, int64 ``[N, L]``.

    Whole parts first, then one each by largest remainder; what a layer cannot use goes to the others.
    """
    share = demand / np.maximum(demand.sum(axis=2, keepdims=True), 1e-300)
    entropy = -(share * np.log(np.maximum(share, 1e-12))).sum(axis=2)
    experts = demand.shape[2]
    split = np.zeros(entropy.shape, dtype=np.int64)
    for node, total in enumerate(slots):
        weights = np.maximum(entropy[node], 1e-9)
        exact = total * weights / weights.sum()
        split[node] = np.minimum(np.floor(exact), experts).astype(np.int64)
        while (left := int(total - split[node].sum())) > 0:
            open_to = split[node] < experts
            order = np.argsort(np.where(open_to, split[node] - exact, np.inf), kind="stable")
            split[node, order[: min(left, int(open_to.sum()))]] += 1
    return split


def cover_layers(split: Ints, wanted: int, experts: int) -> Ints:
    """Shift slots inside nodes, from layers with most to spare, until each layer has `wanted` over all nodes."""
    split = split.copy()
    total = split.sum(axis=0)
    while (total < wanted).any() and (total > wanted).any():
        poor, rich = int(total.argmin()), int(total.argmax())
        can = np.where((split[:, rich] > 0) & (split[:, poor] < experts), split[:, rich] - split[:, poor], -experts - 1)
        node = int(can.argmax())
        if can[node] < -experts:
            break
        split[node, rich] -= 1
        split[node, poor] += 1
        total[rich] -= 1
        total[poor] += 1
    return split
