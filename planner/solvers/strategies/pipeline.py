"""Pipelines: contiguous whole layers per node, the trunk of a layer where its experts are, one path for every ingress.

`pipeline` is exo's ring (github.com/exo-explore/exo, ring memory-weighted partitioning), from its description: nodes
in order of memory, layers in proportion to it. `pipeline-speed` follows prima.cpp (arXiv 2504.08791) and Petals (arXiv
2209.01188): the fastest nodes run as many layers as fit, so that a token computes least; nodes in order of speed.
Neither knows how far nodes are from each other, nor which experts tokens ask for. Where whole layers do not fit, there
is no pipeline.
"""

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from planner.errors import InfeasibleProblem, Violation
from planner.objective import ObjectiveName
from planner.problem import Bools, Floats, Ints, Problem
from planner.solvers.base import Report, Result, SolveLimits
from planner.solvers.strategies.common import run_strategy
from planner.trunk.spans import find_spans, path_of, share_layers
from schemas.units import format_bytes


def solve_pipeline(problem: Problem, *, objective: ObjectiveName, limits: SolveLimits, report: Report) -> Result:  # noqa: ARG001
    """Give layers in proportion to memory; raises `InfeasibleProblem` where whole layers do not fit."""
    return _solve("pipeline", by_memory, problem, objective)


def solve_pipeline_speed(problem: Problem, *, objective: ObjectiveName, limits: SolveLimits, report: Report) -> Result:  # noqa: ARG001
    """Fill the fastest nodes first; raises `InfeasibleProblem` where whole layers do not fit."""
    return _solve("pipeline-speed", by_speed, problem, objective)


def _solve(name: str, choose: Callable[[Problem], Ints | None], problem: Problem, objective: ObjectiveName) -> Result:
    start = time.monotonic()
    path = choose(problem)
    if path is None:
        raise InfeasibleProblem([_no_room(problem, name)])
    trunk = np.tile(path, (len(problem.ingress_node), 1))
    moved = problem.with_trunk(trunk)
    result = run_strategy(name, whole_layers, moved, objective=objective)
    return replace(result, trunk_node=trunk, seconds=time.monotonic() - start)


def whole_layers(problem: Problem) -> Bools:
    """Keep all experts of a layer at every node that runs its trunk, bool ``[N, K]``."""
    runs = (problem.trunk_node[None] == np.arange(problem.num_nodes)[:, None, None]).any(axis=1)  # [N, L]
    return np.repeat(runs, problem.experts, axis=1)


def by_memory(problem: Problem) -> Ints | None:
    """Node of every layer, int64 ``[L]``: shares of layers as near to shares of memory as whole layers fit."""
    memory = problem.room.room_bytes.sum(axis=1)
    order = np.argsort(-memory, kind="stable")
    wished = problem.layers * memory / max(int(memory.sum()), 1)
    count = np.arange(problem.layers + 1)[None, :] - np.arange(problem.layers + 1)[:, None]
    whole = find_spans(problem).whole_s
    costs = [_or_none(np.where(np.isfinite(whole[n]), (count - wished[n]) ** 2, np.inf), wished[n] ** 2) for n in order]
    return _path(order, costs)


def by_speed(problem: Problem) -> Ints | None:
    """Node of every layer, int64 ``[L]``: least compute in all, within memory."""
    order = np.argsort(problem.compute_s.sum(axis=1), kind="stable")
    compute = np.concatenate([np.zeros((problem.num_nodes, 1)), problem.compute_s.cumsum(axis=1)], axis=1)
    whole = find_spans(problem).whole_s
    costs = [
        _or_none(np.where(np.isfinite(whole[n]), compute[n][None, :] - compute[n][:, None], np.inf), 0.0) for n in order
    ]
    return _path(order, costs)


def _or_none(cost: Floats, nothing: float) -> Floats:
    """Allow a node to run no layer at all."""
    cost = cost.copy()
    np.fill_diagonal(cost, nothing)
    return cost


def _path(order: Ints, costs: list[Floats]) -> Ints | None:
    value, ends = share_layers(costs)
    return path_of(order.tolist(), ends) if np.isfinite(value) else None


def _no_room(problem: Problem, name: str) -> Violation:
    room, ingresses = problem.room, len(problem.ingress_node)
    layer = int(room.layer_bytes.max() + ingresses * room.kv_bytes.max()) + problem.experts * problem.expert_bytes
    need = int(room.trunk_bytes(np.ones(problem.layers, dtype=bool)) + ingresses * room.kv_bytes.sum())
    need += problem.layers * problem.experts * problem.expert_bytes
    have = int(room.room_bytes.sum())
    message = (
        f"{name}: whole layers do not fit one after another: the model with the KV cache of {ingresses} ingresses "
        f"({room.sessions} × {room.tokens} tokens each) takes {format_bytes(need)}, a layer with its experts up to "
        f"{format_bytes(layer)} in one piece, and nodes have {format_bytes(have)} in pieces of their own; enlarge a "
        "node or let experts be spread (--solver auto)"
    )
    return Violation("trunk", "all nodes", need, have, "bytes", message)
