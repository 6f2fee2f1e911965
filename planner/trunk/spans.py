"""What it costs a node to run a span of layers for all ingresses, and how a ring of nodes best shares the layers.

Decides by estimates that need no placement: a node fills what trunk and KV cache leave it with the experts of its own
span, and a token waits for the rest as for the nearest other node. Exact where whole layers fit. Spans are layers
a … b-1, arrays ``[L + 1, L + 1]`` by a and b; a wrapped span is all layers but these, so that a ring begins and ends at
one node, which has a tied embedding and head once.
"""

from collections.abc import Callable, Sequence
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


@dataclass(frozen=True, eq=False)
class _Kind:
    """Spans of one kind: layers in each, bytes of trunk and KV cache, and what sums values over the layers of each.

    `missed` says by slots for each layer, ``[L + 1, L + 1]``, in how many layers of a span a token misses an expert.
    """

    count: Ints
    taken: Ints
    added_up: Callable[[Floats], Floats]
    missed: Callable[[Ints], Floats]


def find_spans(problem: Problem, *, wrapped: bool = False) -> Spans:
    """Estimate every span, or every wrapped span, at every node."""
    kind = _kind(problem, _missing(problem), wrapped=wrapped)
    whole, mixed = [], []
    for node in range(problem.num_nodes):
        seconds = kind.added_up(problem.compute_s[node])
        fits, all_local, extra = _waits(problem, node, kind)
        whole.append(np.where(all_local, seconds + extra, np.inf))
        mixed.append(np.where(fits, seconds + extra, np.inf))
    return Spans(np.stack(whole), np.stack(mixed))


def _kind(problem: Problem, missing: Floats, *, wrapped: bool) -> _Kind:
    layers, room, ingresses = problem.layers, problem.room, len(problem.ingress_node)
    first, after = np.arange(layers + 1)[:, None], np.arange(layers + 1)[None, :]

    def added_up(values: Floats) -> Floats:
        total = np.concatenate([[0.0], values.cumsum()])
        inside = total[after] - total[first]
        return np.asarray(total[-1] - inside if wrapped else inside)

    def missed(slots: Ints) -> Floats:
        inside = missing[after, slots] - missing[first, slots]
        return np.asarray(missing[layers, slots] - inside if wrapped else inside)

    starts = (first > 0) if wrapped else (first == 0)
    ends = (after < layers) if wrapped else (after == layers)
    outside = np.where(starts & ends, room.both_bytes, starts * room.input_bytes + ends * room.head_bytes)
    count = np.where(after > first, added_up(np.ones(layers)), 0).astype(np.int64)
    each = (room.layer_bytes + ingresses * room.kv_bytes).astype(np.float64)
    return _Kind(count, added_up(each).astype(np.int64) + outside, added_up, missed)


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


def _waits(problem: Problem, node: int, kind: _Kind) -> tuple[Bools, Bools, Floats]:
    """Whether trunk and KV cache of spans fit, whether all experts do, and seconds waited, ``[L + 1, L + 1]`` each."""
    places = np.flatnonzero(problem.place_node == node)
    left = np.where(kind.count > 0, problem.room.own_bytes[node] - kind.taken, -1)
    wanted = kind.count * problem.experts
    held, slower = np.zeros_like(wanted), np.zeros(wanted.shape)
    for place in places.tolist():
        tier = int(problem.place_tier[place])
        own = left if tier == problem.room.trunk_tier[node] else problem.room.room_bytes[node, tier]
        here = np.minimum(np.maximum(own, 0) // problem.place_bytes[place], wanted - held)
        slower += here / problem.experts * problem.cost_s[node, place]
        held = held + here
    elsewhere = problem.place_node != node
    remote = float(problem.cost_s[node, elsewhere].min()) if elsewhere.any() else 0.0
    waits = slower + remote * _missed(held, kind, problem.experts)
    return left >= 0, (left >= 0) & (held == wanted), waits


def _missed(held: Ints, kind: _Kind, experts: int) -> Floats:
    """Layers of a span in which a token misses an expert: slots spread evenly, or spent on whole layers first."""
    count = np.maximum(kind.count, 1)
    spread = kind.missed(np.minimum(held // count, experts))
    whole, rest = held // experts, held % experts
    mean = kind.missed(rest) / count
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


def share_layers_wrapped(ends_s: Floats, costs: Sequence[Floats]) -> tuple[float, tuple[int, ...]]:
    """Give the first of some nodes a wrapped span, and those that follow the layers between, each at least one.

    Parameters
    ----------
    ends_s
        Of the wrapped span at the first node, ``[L + 1, L + 1]``.
    costs
        By each further node.

    Returns
    -------
    tuple
        The cost, and the layers at which nodes change; the first node comes back behind the last.
    """
    between, choices = costs[0], []
    for cost in costs[1:]:
        ways = between[:, :, None] + cost[None]
        choices.append(ways.argmin(axis=1))
        between = ways.min(axis=1)
    first, after = np.unravel_index(int((ends_s + between).argmin()), between.shape)
    changes = [int(after)]
    for choice in reversed(choices):
        changes.append(int(choice[first, changes[-1]]))
    return float((ends_s + between).min()), (int(first), *reversed(changes))


def path_of(nodes: Sequence[int], ends: Sequence[int]) -> Ints:
    """Return the node of every layer, int64 ``[L]``, from nodes in order and the layer behind the last of each."""
    counts = np.diff([0, *ends])
    return np.repeat(np.array(nodes, dtype=np.int64), counts)
