"""Cheapest rings through sets of nodes.

Decides which sets are looked at (all where nodes are few, else sets grown node by node) and the order in which a ring
visits one. Must not know layers or experts.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from planner.problem import Floats, Ints

MOST_NODES: Final = 10  # up to which all sets of nodes are looked at: 1023


@dataclass(frozen=True, order=True)
class Ring:
    """Nodes in the order in which a ring visits them, and the seconds of its hops."""

    nodes: tuple[int, ...]
    hops_s: float


def all_rings(hop_s: Floats) -> list[Ring]:
    """Return the cheapest ring through every set of nodes (Held and Karp 1962), small sets first."""
    size = len(hop_s)
    best: dict[tuple[int, int], tuple[float, int]] = {}  # (set, last) → cost of a way from the set's lowest node
    rings = []
    for members in range(1, 1 << size):
        inside = [node for node in range(size) if members >> node & 1]
        start = inside[0]
        if len(inside) == 1:
            best[members, start] = (0.0, start)
        for last in inside[1:]:
            rest = members ^ (1 << last)
            ways = [
                (best[rest, before][0] + float(hop_s[before, last]), before)
                for before in inside
                if before != last and (before != start or len(inside) == 2)
            ]
            best[members, last] = min(ways)
        rings.append(_closed(members, inside, best, hop_s))
    return sorted(rings, key=lambda ring: len(ring.nodes))


def _closed(members: int, inside: list[int], best: dict[tuple[int, int], tuple[float, int]], hop_s: Floats) -> Ring:
    start = inside[0]
    if len(inside) == 1:
        return Ring((start,), 0.0)
    cost, last = min((best[members, last][0] + float(hop_s[last, start]), last) for last in inside[1:])
    order, left = [last], members
    while order[-1] != start:
        here = order[-1]
        order.append(best[left, here][1])
        left ^= 1 << here
    return Ring(tuple(reversed(order)), cost)


def grown_rings(hop_s: Floats, seeds: Ints, most: int) -> list[Ring]:
    """Grow rings from each seed: the node that a ring takes in at least cost comes next, up to `most` nodes."""
    rings = []
    for seed in seeds.tolist():
        nodes, cost = [seed], 0.0
        rings.append(Ring((seed,), 0.0))
        while len(nodes) < min(most, len(hop_s)):
            here, onward = np.array(nodes), np.roll(nodes, -1)
            extra = hop_s[here][:, :] + hop_s[:, onward].T - hop_s[here, onward][:, None]  # [ring, N]
            extra[:, nodes] = np.inf
            position, node = np.unravel_index(int(extra.argmin()), extra.shape)
            cost += float(extra[position, node])
            nodes.insert(int(position) + 1, int(node))
            rings.append(Ring(tuple(nodes), cost))
    return rings


def turns(ring: Ring) -> Iterator[tuple[int, ...]]:
    """Yield the ring from each of its nodes, both ways round; either way costs the same where links do."""
    for nodes in {ring.nodes, ring.nodes[::-1]}:
        for first in range(len(nodes)):
            yield nodes[first:] + nodes[:first]


def shortest_ways(hop_s: Floats) -> Floats:
    """Seconds from node to node over any others, float64 ``[N, N]``."""
    ways = hop_s.copy()
    for middle in range(len(ways)):
        np.minimum(ways, ways[:, [middle]] + ways[[middle], :], out=ways)
    return ways
