"""EPLB, the load balancer of DeepSeek-V3 (arXiv 2412.19437; github.com/deepseek-ai/EPLB), from its description.

Layer by layer: the expert with the highest load per replica gets one more replica until the slots are used; then
replicas go, heaviest first, to the node with the least load that has a slot left. It balances compute over equal
accelerators and does not know who asks.

As published every accelerator has equally many slots per layer. Here a node's slots are split evenly over layers and
"equal counts" become each node's own; a node never holds an expert twice, so an expert has at most one replica per
node; load counts seconds of the node's compute, which for equal nodes is the published rule. Calls still go to the
nearest replica, which is kinder to it than its own even split.
"""

import numpy as np

from planner.objective import ObjectiveName
from planner.problem import Bools, Floats, Ints, Problem
from planner.solvers.base import Report, Result, SolveLimits
from planner.solvers.strategies.common import run_strategy
from planner.solvers.strategies.dancemoe import cover_layers
from planner.solvers.strategies.popularity import fill_in_order


def solve_eplb(problem: Problem, *, objective: ObjectiveName, limits: SolveLimits, report: Report) -> Result:  # noqa: ARG001
    """Replicate what is loaded most, then balance."""
    return run_strategy("eplb", choose, problem, objective=objective)


def choose(problem: Problem) -> Bools:
    """Return which nodes hold which experts, bool ``[N, K]``."""
    slots = cover_layers(even_slots(problem), problem.experts * problem.required, problem.experts)
    load = problem.caller_demand.sum(axis=0)
    seconds = np.full(problem.num_nodes, np.inf)
    np.minimum.at(seconds, problem.place_node, problem.service_s)
    held = np.zeros((problem.num_nodes, problem.layers, problem.experts), dtype=bool)
    for layer in range(problem.layers):
        copies = replicate(load[layer], int(slots[:, layer].sum()), int((slots[:, layer] > 0).sum()))
        held[:, layer] = pack(load[layer] / copies, copies, slots[:, layer], seconds)
    flat = held.reshape(problem.num_nodes, -1)
    fill_in_order(flat, np.argsort(-load.ravel(), kind="stable"), problem.node_slots)  # slots that took no replica
    return flat


def even_slots(problem: Problem) -> Ints:
    """Split each node's slots evenly over layers, int64 ``[N, L]``; remainders go to one layer after the other."""
    layers = problem.layers
    split = np.empty((problem.num_nodes, layers), dtype=np.int64)
    turn = 0
    for node, total in enumerate(problem.node_slots.tolist()):
        split[node] = total // layers
        rest = total % layers
        split[node, (turn + np.arange(rest)) % layers] += 1
        turn += rest
    return np.minimum(split, problem.experts)


def replicate(load: Floats, slots: int, most: int) -> Ints:
    """Return replicas of each expert, int64 ``[E]``: one each, then one more where load / replicas is highest.

    >>> replicate(np.array([6.0, 1.0, 1.0]), 5, 3)
    array([3, 1, 1])
    """
    copies = np.ones(len(load), dtype=np.int64)
    for _ in range(slots - len(load)):
        open_to = copies < most
        if not open_to.any():
            break
        copies[int(np.where(open_to, load / copies, -1.0).argmax())] += 1
    return copies


def pack(load: Floats, copies: Ints, slots: Ints, seconds: Floats) -> Bools:
    """Give replicas to nodes, heaviest first to the least busy node with a slot, bool ``[N, E]``.

    Parameters
    ----------
    load
        Of each replica, float64 ``[E]``.
    seconds
        Compute per unit of load, float64 ``[N]``.
    """
    held = np.zeros((len(slots), len(load)), dtype=bool)
    busy, left = np.zeros(len(slots)), slots.copy()
    heaviest = np.argsort(-load, kind="stable")
    for expert in np.repeat(heaviest, copies[heaviest]).tolist():
        open_to = (left > 0) & ~held[:, expert]
        if open_to.any():
            node = int(np.where(open_to, busy, np.inf).argmin())
            held[node, expert] = True
            busy[node] += load[expert] * seconds[node]
            left[node] -= 1
    return held
