"""The lower bound that a split of every event's cost over its experts, and prices on memory, prove.

Decides bounds only. Must not know how splits and prices are found: any of them proves a valid bound.

In question r = (level, ingress), event e costs w max_k missing_k, which is at least w sum_k a_k missing_k for every
split a >= 0 with sum_k a_k <= 1. Summed over events the right side is linear, F[r, expert] * missing[r, expert], and
with a price mu >= 0 per slot of each place everything falls apart into one small problem per expert::

    bound(F, mu) = base - sum over p of mu_p M_p + sum over experts of
        min over holder sets S of [ sum over r of F[r, expert] * (S misses r) + sum over p in S of mu_p ]
"""

from dataclasses import dataclass

import numpy as np

from planner.solvers.latency.holders import HolderSets
from planner.solvers.latency.instance import Bools, Floats, LatencyInstance
from planner.solvers.latency.patterns import Levels


@dataclass(frozen=True, eq=False)
class SetCosts:
    """What each holder set misses in one layer.

    Attributes
    ----------
    misses
        1 where a set has no place within the level of a question, float64 ``[S, J * I]``.
    holds
        1 where a set holds a place, float64 ``[S, P]``.
    excluded
        Sets that pins rule out, bool ``[E, S]``; None where there are none.
    """

    misses: Floats
    holds: Floats
    excluded: Bools | None

    def of(self, split: Floats, price: Floats) -> Floats:
        """Cost of every set for every expert, float64 ``[E, S]``, from ``[J * I, E]`` and prices ``[P]``."""
        cost = split.T @ self.misses.T + self.holds @ price
        if self.excluded is not None:
            cost[self.excluded] = np.inf
        return np.asarray(cost)


def set_costs(instance: LatencyInstance, layer: int, levels: Levels, sets: HolderSets) -> SetCosts:
    """Tabulate one layer; pins are left out, which lowers the bound, where not all sets are enumerated."""
    missing = levels.missing(sets.holds)  # the sets in place of experts: [J, I, S]
    excluded = None
    if sets.complete and instance.is_pinned:
        allowed, forced = instance.allowed[:, layer].T, instance.forced[:, layer].T
        outside = (~allowed).astype(np.int64) @ sets.holds.T
        loose = forced & instance.any_tier[:, layer].T
        on_node = sets.holds @ (instance.on_node @ instance.on_node.T)  # any place of the same node
        lacking = (forced & ~loose).astype(np.int64) @ (~sets.holds).T + loose.astype(np.int64) @ (~on_node).T
        excluded = (outside + lacking) > 0
    misses = missing.reshape(-1, len(sets.holds)).T.astype(np.float64)
    return SetCosts(misses, sets.holds.astype(np.float64), excluded)


def least_cost(split: Floats, price: Floats, levels: Levels) -> Floats:
    """Bound the cheapest holder set of each expert from below without enumerating sets, float64 ``[E]``.

    Dual ascent for facility location (Erlenkotter 1978): ingress i bids v_i for being served; a bid above the cost of
    being served at p must be covered by p's price, sum over i of max(0, v_i - cost[i, p]) <= mu_p, and then the sum of
    bids is a lower bound. Bids are raised one ingress after another, in several orders; the best order counts.
    """
    questions, ingresses = levels.step.shape
    by_question = split.reshape(questions, ingresses, split.shape[1])
    beyond = levels.rank[None] > np.arange(questions)[:, None, None]  # [J, I, P]
    serve = np.einsum("jie,jip->ipe", by_question, beyond.astype(np.float64))
    orders = {
        tuple(range(ingresses)),
        tuple(reversed(range(ingresses))),
        tuple(np.argsort(-split.sum(axis=1).reshape(questions, ingresses).sum(axis=0))),
    }
    best = np.zeros(split.shape[1])
    for order in sorted(orders):
        slack = np.repeat(price[:, None], split.shape[1], axis=1)
        total = np.zeros(split.shape[1])
        for ingress in order:
            bid = (serve[ingress] + slack).min(axis=0)
            slack -= np.maximum(bid - serve[ingress], 0.0)
            slack = np.maximum(slack, 0.0)
            total += bid
        best = np.maximum(best, total)
    return best
