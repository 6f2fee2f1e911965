"""The best path of a token for a placement that is decided: a shortest ring through layers and nodes.

Decides where each layer's trunk runs, exactly where memory does not bind: Viterbi's recursion over layers, closed into
a ring by trying every first node. Trunk weights that other ingresses have at a node anyway cost no memory; further
ones, and KV cache, may take only what the experts leave. Where that binds, memory is priced and the cheapest path met
that fits is kept, so that a path is never worse than the one before. Must not know solvers.
"""

from typing import Final

import numpy as np

from planner.problem import Bools, Floats, Ints, Problem

_STEPS: Final = 24  # changes of the prices on memory
_MOST_NODES: Final = 24  # nodes that paths may use besides those that they have


def ring_path(cost: Floats, hop_s: Floats) -> tuple[float, Ints]:
    """Return the least cost of a ring and its nodes, int64 ``[L]``.

    Parameters
    ----------
    cost
        Of running a layer at a node, float64 ``[N, L]``; infinite where it may not.
    hop_s
        Of going on at another node, float64 ``[N, N]``; also from the last layer back to the first.
    """
    size, layers = cost.shape
    reached = np.where(np.eye(size, dtype=bool), cost[:, 0], np.inf)  # [first node, node]
    before = np.zeros((layers, size, size), dtype=np.int64)
    for layer in range(1, layers):
        ways = reached[:, :, None] + hop_s[None]  # [first, from, to]
        before[layer] = ways.argmin(axis=1)
        reached = ways.min(axis=1) + cost[None, :, layer]
    closed = reached + hop_s.T
    first, last = np.unravel_index(int(closed.argmin()), closed.shape)
    path = [int(last)]
    for layer in range(layers - 1, 0, -1):
        path.append(int(before[layer, first, path[-1]]))
    return float(closed[first, last]), np.array(path[::-1], dtype=np.int64)


def node_waits(problem: Problem, placed: Bools, nodes: Ints) -> Floats:
    """Seconds that a token of each ingress waits in each layer if some node ran its trunk, float64 ``[I, N, L]``.

    Infinite at nodes that are not among `nodes`.
    """
    layers = np.arange(problem.layers)
    waits = np.full((len(problem.events), problem.num_nodes, problem.layers), np.inf)
    for node in nodes.tolist():
        cost = np.where(placed, problem.cost_s[node][:, None, None], np.inf).min(axis=0)
        for ingress, events in enumerate(problem.events):
            waits[ingress, node] = cost[layers[None, :, None], events].max(axis=2).mean(axis=0)
    return waits


def better_paths(problem: Problem, placed: Bools, *, within_memory: bool = True) -> Ints:
    """Return trunk nodes ``[I, L]`` of least latency for a placement ``[P, L, E]``, one ingress after another.

    Parameters
    ----------
    within_memory
        Else memory is looked at no further than that each layer's trunk fits alone.
    """
    trunk = problem.trunk_node.copy()
    waits = node_waits(problem, placed, _usable(problem, placed))
    for ingress, rate in enumerate(problem.tokens_per_s.tolist()):
        if rate > 0:
            cost = problem.compute_s + waits[ingress]
            trunk[ingress] = _path(problem, placed, trunk, ingress, cost, within_memory=within_memory)
    return trunk


def _path(problem: Problem, placed: Bools, trunk: Ints, ingress: int, cost: Floats, *, within_memory: bool) -> Ints:
    needs, free = _memory(problem, placed, trunk, ingress)
    if not within_memory:
        free = problem.room.own_bytes
    allowed = np.where(needs <= np.maximum(free, 0)[:, None], cost, np.inf)
    allowed[trunk[ingress], np.arange(problem.layers)] = cost[trunk[ingress], np.arange(problem.layers)]
    best: Ints = trunk[ingress].copy()
    least = _seconds(problem, cost, best)
    price = np.zeros(problem.num_nodes)
    step = least / max(float(np.abs(needs).max()) * problem.layers, 1.0)
    for turn in range(_STEPS):
        _, path = ring_path(allowed + price[:, None] * needs, problem.hop_s)
        over = np.bincount(path, weights=needs[path, np.arange(problem.layers)], minlength=problem.num_nodes) - free
        if not within_memory or _fits(problem, placed, trunk, ingress, path):
            if (seconds := _seconds(problem, cost, path)) < least * (1 - 1e-9):
                best, least = path, seconds
            if turn == 0 or not price.any():
                break
        price = np.maximum(price + step / (1 + turn / 4) * over / max(float(np.abs(over).max()), 1.0), 0.0)
    return best


def _usable(problem: Problem, placed: Bools) -> Ints:
    """Nodes that paths may use: those of the paths there are, and where there are many, those that hold most."""
    held = np.bincount(problem.place_node, weights=placed.sum(axis=(1, 2)), minlength=problem.num_nodes)
    most = np.argsort(-held, kind="stable")[:_MOST_NODES]
    return np.asarray(np.unique(np.concatenate([most, problem.trunk_node.ravel()])))


def _seconds(problem: Problem, cost: Floats, path: Ints) -> float:
    return float(cost[path, np.arange(problem.layers)].sum() + problem.hop_s[path, np.roll(path, -1)].sum())


def _memory(problem: Problem, placed: Bools, trunk: Ints, ingress: int) -> tuple[Ints, Ints]:
    """Bytes that an ingress's layers take at each node ``[N, L]``, and what experts and other paths leave ``[N]``."""
    room, others = problem.room, np.delete(trunk, ingress, axis=0)
    runs = (others[None] == np.arange(problem.num_nodes)[:, None, None]).any(axis=1)
    needs = np.where(runs, 0, room.layer_bytes[None, :]) + room.kv_bytes[None, :]
    needs[:, 0] += np.where(runs[:, 0], 0, room.input_bytes)
    needs[:, -1] += np.where(runs[:, -1], 0, room.head_bytes)
    taken, kv = room.taken(others)
    return needs, np.asarray(room.own_bytes - taken - kv - _expert_bytes(problem, placed))


def _expert_bytes(problem: Problem, placed: Bools) -> Ints:
    """Bytes of experts in the tier that the trunk of their node takes, int64 ``[N]``."""
    beside = problem.place_tier == problem.room.trunk_tier[problem.place_node]
    used = np.where(beside, placed.sum(axis=(1, 2)), 0) * problem.place_bytes
    return np.bincount(problem.place_node, weights=used, minlength=problem.num_nodes).astype(np.int64)


def _fits(problem: Problem, placed: Bools, trunk: Ints, ingress: int, path: Ints) -> bool:
    moved = trunk.copy()
    moved[ingress] = path
    taken, kv = problem.room.taken(moved)
    return bool((taken + kv + _expert_bytes(problem, placed) <= problem.room.own_bytes).all())
