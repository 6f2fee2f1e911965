"""A lower bound on what any paths with any placement cost a token.

Decides what is proven without a search. For every set S of nodes that the path of an ingress may visit, each at least
once::

    cost >= ring(S) + compute(S) + waits(S)

ring(S)
    The cheapest closed way through all of S.
compute(S)
    One layer at each node of S, the others given to them from the fastest on, each as many as its memory could hold
    with nothing else there.
waits(S)
    Every event is blamed on its chosen experts, in parts that add up to 1: ``m[l,e]`` is the blame that expert e of
    layer l has over all events. An event is local only if all its experts are, so a layer that lacks the experts D
    waits for another node with probability at least ``sum of m over D``. All layers together find no more experts local
    than fit into S beside one trunk and its KV cache, so waits are at least ``r(S)`` times the sum of all m but the
    slots(S) largest, r(S) the cheapest call from S elsewhere. Any blame is valid; the more equal, the better.

The least over all S holds for every path. Ingresses are bounded one by one, as if each had the cluster to itself.
Where sets are too many, all of one size are bounded together. Must not know solvers.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np

from planner.objective import ObjectiveName, path_seconds
from planner.problem import Events, Floats, Ints, Problem
from planner.trunk.rings import MOST_NODES, all_rings, shortest_ways

_ROUNDS: Final = 25  # of spreading blame
_MOST_TERMS: Final = 20_000_000  # chosen experts looked at, in all rounds


def joint_bound(problem: Problem, objective: ObjectiveName, blame: Floats | None = None) -> float | None:
    """Lower bound of the objective over all trunks and placements; None for remote calls, which may be 0.

    Parameters
    ----------
    blame
        That of the objective, where it is known already.
    """
    if objective == "remote-calls":
        return None
    return float(problem.tokens_per_s @ path_bounds(problem, blame_of(problem, objective) if blame is None else blame))


def blame_of(problem: Problem, objective: ObjectiveName) -> Floats:
    """Blame of each expert for an ingress's waits, float64 ``[I, L, E]``; 1 for each layer."""
    if objective == "latency":
        return np.stack([_blame(events, problem.experts) for events in problem.events])
    return np.asarray(problem.share / problem.top_k)


def _blame(events: Events, experts: int) -> Floats:
    """Spread the blame as equally over experts as events allow, by scaling it in turn (Sinkhorn), ``[L, E]``."""
    tokens, layers, _ = events.shape
    flat = np.arange(layers)[None, :, None] * experts + events.astype(np.int64)
    weight = np.ones(layers * experts)
    blame = weight
    for _ in range(int(np.clip(_MOST_TERMS // flat.size, 1, _ROUNDS))):
        part = weight[flat]
        part /= part.sum(axis=2, keepdims=True)
        blame = np.bincount(flat.ravel(), weights=part.ravel(), minlength=len(weight)) / tokens
        weight = np.clip(weight / np.maximum(blame * experts, 1e-3), 1e-9, 1e9)
    return blame.reshape(layers, experts)


def trunk_bound(problem: Problem, blame: Floats) -> float:
    """Seconds that a token takes at least with the trunk where the problem has it, whatever the placement: the mean.

    As ``waits(S)``, with the room that each node really has beside its trunks.
    """
    parts = Parts(problem, blame)
    seconds = path_seconds(problem)
    for ingress, path in enumerate(problem.trunk_node):
        for node in np.unique(path).tolist():
            missed = np.sort(blame[ingress, path == node].ravel())
            lacking = len(missed) - int(problem.node_slots[node])
            seconds[ingress] += float(parts.cheapest_call_s[node] * missed[: max(lacking, 0)].sum())
    return float(problem.tokens_per_s @ seconds / problem.tokens_per_s.sum())


def path_bounds(problem: Problem, blame: Floats) -> Floats:
    """Lower bound of the seconds of a token of each ingress, float64 ``[I]``, from blame ``[I, L, E]``."""
    parts = Parts(problem, blame)
    best = np.full(len(blame), np.inf)
    for nodes, ring_s in _sets(problem):
        if parts.can_run(nodes):
            best = np.minimum(best, ring_s + parts.within(nodes))
    if problem.num_nodes > MOST_NODES:
        best = parts.by_size()
    return np.where(np.isfinite(best), best, 0.0)


def _sets(problem: Problem) -> Iterator[tuple[Ints, float]]:
    if problem.num_nodes <= MOST_NODES:
        for ring in all_rings(shortest_ways(problem.hop_s)):
            yield np.array(ring.nodes, dtype=np.int64), ring.hops_s


@dataclass(frozen=True, eq=False)
class Parts:
    """The parts that sets of nodes are bounded by, from a problem and the blame ``[I, L, E]`` of its experts."""

    problem: Problem
    blame: Floats

    @cached_property
    def most_layers(self) -> Ints:
        """Layers whose trunk and KV cache fit into each node, int64 ``[N]``."""
        room, layers = self.problem.room, self.problem.layers
        each = max(int((room.layer_bytes + room.kv_bytes).min()), 1)
        return np.minimum(room.own_bytes // each, layers)

    @cached_property
    def layer_s(self) -> Floats:
        """Seconds that each node computes a layer at least, float64 ``[N]``."""
        return np.asarray(self.problem.compute_s.min(axis=1))

    @cached_property
    def missed(self) -> Floats:
        """Layers in which a token misses an expert, at least, where so many slots are missing, ``[I, L E + 1]``."""
        ranked = np.sort(self.blame.reshape(len(self.blame), -1), axis=1)
        return np.concatenate([np.zeros((len(ranked), 1)), ranked.cumsum(axis=1)], axis=1)

    @cached_property
    def cheapest_call_s(self) -> Floats:
        """Seconds of the cheapest call from each node to another, float64 ``[N]``; 0 where there is no other."""
        problem = self.problem
        away = problem.place_node[None, :] != np.arange(problem.num_nodes)[:, None]
        least = np.where(away, problem.cost_s, np.inf).min(axis=1, initial=np.inf)
        return np.where(np.isfinite(least), least, 0.0)

    def can_run(self, nodes: Ints) -> bool:
        """Whether a path can visit all these nodes and no others."""
        most = self.most_layers[nodes]
        return len(nodes) <= self.problem.layers <= int(most.sum()) and bool((most > 0).all())

    def compute(self, nodes: Ints, *, each: bool = True) -> float:
        """Seconds of compute at least; with `each`, every node runs a layer."""
        spent = float(self.layer_s[nodes].sum()) if each else 0.0
        left = self.problem.layers - len(nodes) * each
        for node in nodes[np.argsort(self.layer_s[nodes], kind="stable")].tolist():
            here = min(int(self.most_layers[node]) - each, left)
            spent, left = spent + here * float(self.layer_s[node]), left - here
        return spent

    def within(self, nodes: Ints) -> Floats:
        """Seconds of compute and waits at least, where a path visits all these nodes and no others, float64 ``[I]``."""
        return self.compute(nodes) + self.waits(nodes, self.slots(nodes))

    def slots(self, nodes: Ints, trunk_nodes: Ints | None = None) -> int:
        """Experts that fit beside one trunk and its KV cache at most, which may be at `trunk_nodes` (`nodes` if None).

        A byte of trunk takes the place of fewest experts where these are largest.
        """
        room, running = self.problem.room, nodes if trunk_nodes is None else trunk_nodes
        outside = min(room.both_bytes, room.input_bytes + room.head_bytes)
        taken = int((room.layer_bytes + room.kv_bytes).sum()) + outside
        largest = int(room.record_bytes[running, room.trunk_tier[running]].max())
        return int(max(float(self.fitting[nodes].sum()) - taken / largest, 0.0) * (1 + 1e-12) + 1e-9)

    @cached_property
    def fitting(self) -> Floats:
        """Experts that fit into all tiers of each node, parts of experts included, float64 ``[N]``."""
        return np.asarray((self.problem.room.room_bytes / self.problem.room.record_bytes).sum(axis=1))

    def waits(self, nodes: Ints, slots: int) -> Floats:
        """Seconds of waits at least, float64 ``[I]``."""
        lacking = max(self.problem.layers * self.problem.experts - slots, 0)
        return np.asarray(float(self.cheapest_call_s[nodes].min()) * self.missed[:, lacking])

    def by_size(self) -> Floats:
        """Bound all sets of one size together, float64 ``[I]``: the shortest hops, the largest and fastest nodes."""
        problem = self.problem
        everyone = np.arange(problem.num_nodes)
        onward = np.where(np.eye(problem.num_nodes, dtype=bool), np.inf, shortest_ways(problem.hop_s)).min(axis=1)
        hops, largest = np.sort(onward).cumsum(), np.argsort(-self.fitting, kind="stable")
        best = np.full(len(self.blame), np.inf)
        for size in range(1, min(problem.num_nodes, problem.layers) + 1):
            ring_s = float(hops[size - 1]) if size > 1 else 0.0
            slots = self.slots(largest[:size], everyone)
            best = np.minimum(best, ring_s + self.compute(everyone, each=False) + self.waits(everyone, slots))
        return best
