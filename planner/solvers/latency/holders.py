"""Who may hold one expert: feasible holder sets, and the repairs that keep a layer feasible.

Decides coverage, pins and one place per node, for one layer. Must not know events. Prices are per slot, ``[P]``.
"""

from dataclasses import dataclass
from itertools import product
from typing import Final

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_flow

from planner.solvers.latency.instance import Bools, Floats, Ints, LatencyInstance

MAX_SETS: Final = 1100  # all sets of 10 nodes with one place each; more are not enumerated


@dataclass(frozen=True, eq=False)
class HolderSets:
    """Candidate sets of places for one expert.

    Attributes
    ----------
    holds
        bool ``[S, P]``.
    complete
        Whether these are all: then a minimum over them is a minimum over every placement.
    """

    holds: Bools
    complete: bool


def holder_sets(instance: LatencyInstance, max_sets: int = MAX_SETS) -> HolderSets:
    """Enumerate holder sets with at most one place per node and at least `required` nodes, the small ones if many."""
    options = [[-1, *np.flatnonzero(column)] for column in instance.on_node.T]
    total = float(np.prod([float(len(option)) for option in options]))
    if total <= max_sets:
        return HolderSets(_as_rows(product(*options), instance), complete=True)
    rows = np.eye(instance.num_places, dtype=bool)
    sets = rows
    while len(sets) + len(rows) * instance.num_places <= max_sets * 4:
        grown = np.unique(
            (rows[:, None] | np.eye(instance.num_places, dtype=bool)[None]).reshape(-1, rows.shape[1]), axis=0
        )
        rows = grown[(grown.astype(np.int64) @ instance.on_node <= 1).all(axis=1)]
        larger = np.unique(np.concatenate([sets, rows]), axis=0)
        if len(larger) > max_sets:
            break
        sets = larger
    return HolderSets(sets, complete=False)


def _as_rows(choices: "product[tuple[int, ...]]", instance: LatencyInstance) -> Bools:
    rows = [[place in choice for place in range(instance.num_places)] for choice in choices]
    holds = np.array(rows, dtype=bool)
    return np.asarray(holds[holds.sum(axis=1) >= instance.required])


class Repair:
    """Keeps the holders ``[E, P]`` of one layer feasible but for memory. Does not modify what it is given."""

    def __init__(self, instance: LatencyInstance, layer: int) -> None:
        self.allowed = np.ascontiguousarray(instance.allowed[:, layer].T & (instance.capacity > 0))
        self.forced = np.ascontiguousarray(instance.forced[:, layer].T)
        self.required = instance.required
        self.on_node = instance.on_node
        self.siblings = self.on_node @ self.on_node.T  # [P, P] places of one node
        self.affinity = instance.cost_s[:, layer].T @ instance.tokens_per_s  # [P] nearer to all is better

    def num_nodes(self, hold: Bools) -> Ints:
        """Nodes that hold each expert, int64 ``[E]``; a node holds an expert in one place at most."""
        return np.asarray(hold.sum(axis=1), dtype=np.int64)

    def with_place(self, hold: Bools, place: int) -> Bools:
        """Hold all that may be held at one place, instead of at its node's other places."""
        take = self.allowed[:, place] & ~(self.forced & self.siblings[place]).any(axis=1)
        changed = hold.copy()
        changed[np.ix_(take, self.siblings[place])] = False
        changed[:, place] |= take
        return changed

    def without_place(self, hold: Bools, place: int, price: Floats) -> Bools:
        """Hold nothing at one place but what is forced; what nobody else covers goes to the cheapest other node."""
        changed = hold.copy()
        changed[:, place] = self.forced[:, place]
        charged = price.copy()
        charged[place] = np.inf
        changed = self.covered(changed, charged)
        stuck = self.num_nodes(changed) < self.required
        changed[stuck] = hold[stuck]
        return changed

    def covered(self, hold: Bools, price: Floats) -> Bools:
        """Add the cheapest places until every expert is on `required` nodes, as far as that can be."""
        changed = hold.copy()
        rank = np.argsort(np.lexsort((self.affinity, price)))
        for _ in range(self.required):
            short = np.flatnonzero(self.num_nodes(changed) < self.required)
            if not len(short):
                break
            free = self.allowed[short] & ~(changed[short] @ self.siblings) & np.isfinite(price)
            choice = np.where(free, rank, len(rank)).argmin(axis=1)
            ok = free.any(axis=1)
            changed[short[ok], choice[ok]] = True
        return changed

    def anchored(self, place: int, price: Floats) -> Bools:
        """One place holds all that it may; the rest goes where it is cheapest."""
        return self.covered(self.with_place(self.forced, place), price)


def any_placement(instance: LatencyInstance) -> Bools | None:
    """Find a placement ``[P, L, E]`` that satisfies every constraint; None where there is none (a maximum flow)."""
    placed = instance.forced.copy()
    experts = instance.num_layers * instance.num_experts
    nodes = instance.on_node.shape[1]
    free = instance.capacity - placed.sum(axis=(1, 2))
    need = np.maximum(instance.required - placed.sum(axis=0).ravel(), 0)
    if (free < 0).any():
        return None
    holding = np.einsum("ple,pn->len", placed, instance.on_node).reshape(experts, nodes)
    place, expert = np.nonzero(instance.allowed.reshape(len(free), experts))
    node = instance.node_of_place[place]
    keep = ~holding[expert, node]
    place, expert, node = place[keep], expert[keep], node[keep]
    source, sink, at_node, at_place = 0, 1, 2 + experts, 2 + experts + experts * nodes
    pair = at_node + expert * nodes + node
    unique_pair, first = np.unique(pair, return_index=True)
    tail = np.concatenate([np.zeros(experts, int), 2 + expert[first], pair, at_place + np.arange(len(free))])
    head = np.concatenate([2 + np.arange(experts), unique_pair, at_place + place, np.full(len(free), sink)])
    room = np.concatenate([need, np.ones(len(first), int), np.ones(len(pair), int), np.minimum(free, experts)])
    size = at_place + len(free)
    flow = maximum_flow(csr_array((room.astype(np.int32), (tail, head)), shape=(size, size)), source, sink)
    if flow.flow_value < need.sum():
        return None
    edges = flow.flow.tocoo()
    used = (edges.row >= at_node) & (edges.col >= at_place) & (edges.data > 0)
    placed.reshape(len(free), experts)[edges.col[used] - at_place, (edges.row[used] - at_node) // nodes] = True
    return placed
