"""What it costs a node to run a span of layers for all ingresses, and how a ring of nodes best shares the layers.

Decides by estimates that need no placement: a node fills what trunk and KV cache leave it with the experts of its own
span, and a token waits for the rest as for the nearest other node. Exact where whole layers fit. Spans are layers
a … b-1, arrays ``[L + 1, L + 1]`` by a and b.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from planner.problem import Bools, Floats, Ints, Problem


@dataclass(frozen=True, eq=False)
class Spans:
    """Estimates of every node and span.

    Attributes
    ----------
    whole_s
        Seconds a token of all ingresses' mean takes in a span, infinite where not all experts of its layers fit,
        float64 ``[N, L + 1, L + 1]``.
    mixed_s
        The same where experts may be elsewhere, infinite where trunk and KV cache do not fit.
    """

    whole_s: Floats
    mixed_s: Floats


def find_spans(problem: Problem) -> Spans:
    """Estimate every span at every node."""
    taken, missing = _taken_bytes(problem), _missing(problem)
    compute = np.concatenate([np.zeros((problem.num_nodes, 1)), problem.compute_s.cumsum(axis=1)], axis=1)
    whole, mixed = [], []
    for node in range(problem.num_nodes):
        seconds = compute[node][None, :] - compute[node][:, None]
        fits, all_local, extra = _waits(problem, node, taken, missing)
        whole.append(np.where(all_local, seconds + extra, np.inf))
        mixed.append(np.where(fits, seconds + extra, np.inf))
    return Spans(np.stack(whole), np.stack(mixed))


def _taken_bytes(problem: Problem) -> Ints:
    """Bytes of trunk and KV cache of all ingresses in a span, int64 ``[L + 1, L + 1]``."""
    room, layers, ingresses = problem.room, problem.layers, len(problem.ingress_node)
    each = np.concatenate([[0], (room.layer_bytes + ingresses * room.kv_bytes).cumsum()])
    bytes_ = each[None, :] - each[:, None]
    bytes_[0, 1:] += room.input_bytes
    bytes_[:layers, layers] += room.head_bytes
    bytes_[0, layers] += room.both_bytes - room.input_bytes - room.head_bytes
    return np.asarray(bytes_)


def _missing(problem: Problem) -> Floats:
    """Share of tokens that miss an expert where a node holds a layer's c most used, summed over layers before l.

    float64 ``[L + 1, E + 1]`` by l and c.
    """
    weights = problem.tokens_per_s / problem.tokens_per_s.sum()
    used = np.einsum("i,ile->le", weights, problem.share)
    rank = (-used).argsort(axis=1, kind="stable").argsort(axis=1, kind="stable")
    layers, table = np.arange(problem.layers), np.zeros((problem.layers + 1, problem.experts + 1))
    for weight, events in zip(weights.tolist(), problem.events, strict=True):
        last = rank[layers[None, :, None], events].max(axis=2)  # [T, L]: slots that make the event local, less one
        for layer in range(problem.layers):
            count = np.bincount(last[:, layer] + 1, minlength=problem.experts + 1).cumsum()
            table[layer + 1] += weight * (1 - count / len(events))
    return np.asarray(table.cumsum(axis=0))


def _waits(problem: Problem, node: int, taken: Ints, missing: Floats) -> tuple[Bools, Bools, Floats]:
    """Whether trunk and KV cache of spans fit, whether all experts do, and seconds waited, ``[L + 1, L + 1]`` each."""
    places = np.flatnonzero(problem.place_node == node)
    count = np.arange(problem.layers + 1)[None, :] - np.arange(problem.layers + 1)[:, None]
    left = np.where(count > 0, problem.room.own_bytes[node] - taken, -1)
    wanted = np.maximum(count, 0) * problem.experts
    held, slower = np.zeros_like(wanted), np.zeros(wanted.shape)
    for place in places.tolist():
        tier = int(problem.place_tier[place])
        own = left if tier == problem.room.trunk_tier[node] else problem.room.room_bytes[node, tier]
        here = np.minimum(np.maximum(own, 0) // problem.expert_bytes, wanted - held)
        slower += here / problem.experts * problem.cost_s[node, place]
        held = held + here
    elsewhere = problem.place_node != node
    remote = float(problem.cost_s[node, elsewhere].min()) if elsewhere.any() else 0.0
    waits = slower + remote * _missed(held, np.maximum(count, 1), missing)
    return left >= 0, (left >= 0) & (held == wanted), waits


def _missed(held: Ints, count: Ints, missing: Floats) -> Floats:
    """Layers of a span in which a token misses an expert: slots spread evenly, or spent on whole layers first."""
    experts = missing.shape[1] - 1
    first, after = np.arange(len(missing))[:, None], np.arange(len(missing))[None, :]
    even = np.minimum(held // count, experts)
    spread = missing[after, even] - missing[first, even]
    whole, rest = held // experts, held % experts
    mean = (missing[after, rest] - missing[first, rest]) / count
    packed = np.where(held >= count * experts, 0.0, count - whole - 1 + mean)
    return np.asarray(np.minimum(spread, packed))


def share_layers(costs: Sequence[Floats]) -> tuple[float, tuple[int, ...]]:
    """Give each of some nodes, in order, a span of at least one layer, at least cost in all.

    Parameters
    ----------
    costs
        By node, ``[L + 1, L + 1]``, infinite where it cannot run a span.

    Returns
    -------
    tuple
        The cost, infinite where nothing fits, and the layer behind the last of each node.
    """
    reached, choices = costs[0][0], []
    for cost in costs[1:]:
        through = reached[:, None] + cost
        choices.append(through.argmin(axis=0))
        reached = through.min(axis=0)
    ends = [len(reached) - 1]
    for choice in reversed(choices):
        ends.append(int(choice[ends[-1]]))
    return float(reached[-1]), tuple(reversed(ends))


def path_of(nodes: Sequence[int], ends: Sequence[int]) -> Ints:
    """Return the node of every layer, int64 ``[L]``, from nodes in order and the layer behind the last of each."""
    counts = np.diff([0, *ends])
    return np.repeat(np.array(nodes, dtype=np.int64), counts)
