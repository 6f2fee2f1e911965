"""MoETuner's two steps (arXiv 2502.06643), from its description: balance experts into clusters, then map clusters.

First an integer programme per layer deals its experts into one cluster per node so that clusters are equally loaded;
then another maps clusters to nodes so that communication is cheapest. As published, tokens travel from expert to
expert inside a data centre, every device has equally many experts and each expert one place. Here a call starts where
the trunk runs, so communication is demand times the cost of calling; clusters have sizes in proportion to memory; and
slots that are left once every expert has its place are filled with the hottest experts, since the paper says nothing
of replicas and leaving memory empty would be no fair comparison.
"""

import time
from typing import Final

import numpy as np
import pulp

from planner.objective import ObjectiveName
from planner.problem import Bools, Floats, Ints, Problem
from planner.solvers.base import Report, Result, SolveLimits
from planner.solvers.strategies.common import run_strategy
from planner.solvers.strategies.eplb import even_slots, pack
from planner.solvers.strategies.popularity import fill_in_order

_BALANCE_GAP: Final = 0.01  # of the heaviest cluster; the last per cent takes most of the time
_LAYER_S: Final = 2.0


def solve_moetuner(problem: Problem, *, objective: ObjectiveName, limits: SolveLimits, report: Report) -> Result:  # noqa: ARG001
    """Balance, then map."""
    deadline = time.monotonic() + limits.time_s
    return run_strategy("moetuner", lambda asked: choose(asked, deadline), problem, objective=objective)


def choose(problem: Problem, deadline: float) -> Bools:
    """Return which nodes hold which experts, bool ``[N, K]``; balances greedily once `deadline` is over."""
    room = even_slots(problem)
    demand = problem.caller_demand
    cost = np.full((problem.num_nodes, problem.num_nodes), np.inf)
    np.minimum.at(cost.T, problem.place_node, problem.cost_s.T)
    held = np.zeros((problem.num_nodes, problem.layers, problem.experts), dtype=bool)
    for layer in range(problem.layers):
        sizes = cluster_sizes(room[:, layer], problem.experts)
        if sizes is None:  # the layer does not fit as it is split; what is missing is mended afterwards
            continue
        load = demand[:, layer].sum(axis=0)
        left = min(deadline - time.monotonic(), _LAYER_S)
        cluster = balance(load, sizes, left) if left > 0 else _balance_greedily(load, sizes)
        asked = np.stack([demand[:, layer, cluster == number].sum(axis=1) for number in range(len(sizes))])
        price = np.where(np.isfinite(cost), asked @ np.where(np.isfinite(cost), cost, 0.0), np.inf)
        node_of = assign(price, sizes, room[:, layer])
        held[node_of[cluster], layer, np.arange(problem.experts)] = True
    flat = held.reshape(problem.num_nodes, -1)
    fill_in_order(flat, np.argsort(-demand.sum(axis=0).ravel(), kind="stable"), problem.node_slots)
    return flat


def cluster_sizes(room: Ints, experts: int) -> Ints | None:
    """Split a layer's experts over nodes in proportion to room, int64 ``[N]``; None where there is too little."""
    if room.sum() < experts:
        return None
    exact = experts * room / room.sum()
    sizes: Ints = np.floor(exact).astype(np.int64)
    order = np.argsort(sizes - exact, kind="stable")
    sizes[order[: experts - int(sizes.sum())]] += 1
    return sizes


def balance(load: Floats, sizes: Ints, time_s: float) -> Ints:
    """Deal experts into clusters of given sizes so that the heaviest is lightest, int64 ``[E]``."""
    experts, clusters = range(len(load)), range(len(sizes))
    model = pulp.LpProblem("balance", pulp.LpMinimize)
    heaviest = pulp.LpVariable("heaviest", 0)
    scale = max(float(load.sum()), 1e-300)
    x = {(e, g): pulp.LpVariable(f"x_{e}_{g}", cat="Binary") for e in experts for g in clusters}
    model.setObjective(heaviest)
    for e in experts:
        model.addConstraint(pulp.lpSum(x[e, g] for g in clusters) == 1)
    for g in clusters:
        model.addConstraint(pulp.lpSum(x[e, g] for e in experts) == int(sizes[g]))
        model.addConstraint(pulp.lpSum(float(load[e]) / scale * x[e, g] for e in experts) <= heaviest)
    model.solve(pulp.HiGHS(msg=False, gapRel=_BALANCE_GAP, timeLimit=time_s))
    values = np.array([[x[e, g].varValue or 0.0 for g in clusters] for e in experts])
    found: Ints = values.argmax(axis=1)
    whole = (np.bincount(found, minlength=len(sizes)) == sizes).all() and (values.max(axis=1) > 0.5).all()
    return found if whole else _balance_greedily(load, sizes)


def _balance_greedily(load: Floats, sizes: Ints) -> Ints:
    """Heaviest first to the lightest cluster with room, int64 ``[E]``."""
    held = pack(load, np.ones(len(load), dtype=np.int64), sizes, np.ones(len(sizes)))
    cluster: Ints = held.argmax(axis=0)
    return cluster


def assign(price: Floats, sizes: Ints, room: Ints) -> Ints:
    """Map clusters to nodes, one each, at least total price, int64 ``[G]``.

    Parameters
    ----------
    price
        Of each cluster at each node, float64 ``[G, N]``; infinite where it cannot be.
    """
    pairs = np.argwhere(np.isfinite(price) & (sizes[:, None] <= room[None, :]))
    model = pulp.LpProblem("mapping", pulp.LpMinimize)
    y = {(int(g), int(n)): pulp.LpVariable(f"y_{g}_{n}", cat="Binary") for g, n in pairs}
    scale = 1.0 / max(float(price[np.isfinite(price)].max(initial=0.0)), 1e-300)
    model.setObjective(pulp.LpAffineExpression([(y[g, n], float(price[g, n]) * scale) for g, n in y]))
    for g in range(len(sizes)):
        model.addConstraint(pulp.lpSum(v for (cluster, _), v in y.items() if cluster == g) == 1)
    for n in range(len(room)):
        model.addConstraint(pulp.lpSum(v for (_, node), v in y.items() if node == n) <= 1)
    if model.solve(pulp.HiGHS(msg=False)) != pulp.LpStatusOptimal:
        return np.arange(len(sizes))  # each cluster where its size was made for
    chosen = np.arange(len(sizes))
    for (g, n), v in y.items():
        if (v.varValue or 0.0) > 0.5:
            chosen[g] = n
    return chosen
