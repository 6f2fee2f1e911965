"""From nearly right to feasible and better: repair, fill and swaps on holders, scored with prices where rows bind.

Decides which replicas to add, drop or put elsewhere. Must not know where the first holders come from.
An expert's cost here is Σ_i d[i,k] min over holders p of cost[l,i,p], plus the price of its new copies.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from planner.solvers.decomposition.arrays import Bools, Floats, Ints, PlacementArrays
from planner.solvers.decomposition.evaluate import admissible
from planner.solvers.decomposition.holder_sets import num_domains

SWAPS_PER_PLACE = 64


@dataclass(frozen=True)
class Scorer:
    """Costs of holders.

    Parameters
    ----------
    costs
        `[L', I, P]`, seconds per evaluation, prices of rows and heaviest nodes included.
    copy_price
        `[K, P]`, seconds for a replica, or None.
    """

    arrays: PlacementArrays
    costs: Floats
    copy_price: Floats | None

    def cost_at(self, experts: Ints, place: int) -> Floats:
        """Cost of an evaluation at a place, `[I, X]` (or `[I, 1]` where all layers share it)."""
        if len(self.costs) == 1:
            return self.costs[0, :, place, None]
        return self.costs[self.arrays.layer_of_expert[experts], :, place].T

    def value(self, holders: Bools, experts: Ints) -> Floats:
        """Cost of each expert with these holders, `[X]` for `holders` `[X, P]`; 0 where there is none."""
        near = np.full((len(self.arrays.cost), len(experts)), np.inf)
        for place in range(holders.shape[1]):
            np.minimum(near, np.where(holders[:, place], self.cost_at(experts, place), np.inf), out=near)
        total: Floats = (self.arrays.demand[:, experts] * np.where(holders.any(axis=1), near, 0.0)).sum(axis=0)
        return total if self.copy_price is None else total + (holders * self.copy_price[experts]).sum(axis=1)

    def price_of(self, place: int, experts: Ints) -> Floats:
        """Price of a replica at a place, `[X]`."""
        return np.zeros(len(experts)) if self.copy_price is None else self.copy_price[experts, place]


def repair(scorer: Scorer, holders: Bools) -> Bools:
    """Return holders that fit every place, losing as little as possible; may stay over-full where it gets stuck."""
    holders, slots = holders.copy(), scorer.arrays.slots
    for _ in range(6 * len(slots)):
        excess = holders.sum(axis=0) - slots
        if (excess <= 0).all():
            break
        place = int(excess.argmax())
        if not _relieve(scorer, holders, place, int(excess[place])) and not _make_room(scorer, holders, excess):
            break
    return holders


def _relieve(scorer: Scorer, holders: Bools, place: int, excess: int) -> bool:
    """Drop or re-place up to `excess` replicas of an over-full place; return whether any went. Modifies `holders`."""
    arrays = scorer.arrays
    experts = np.flatnonzero(holders[:, place])
    before = scorer.value(holders[experts], experts)
    room = arrays.slots - holders.sum(axis=0)
    without = holders[experts]
    without[:, place] = False
    loss, target = np.full(len(experts), np.inf), np.full(len(experts), -1)
    for other in (-1, *np.flatnonzero(room > 0)):
        option = without.copy()
        if other >= 0:
            option[:, other] = True
        allowed = admissible(arrays, option, experts) & (option.sum(axis=1) == without.sum(axis=1) + (other >= 0))
        here = np.where(allowed, scorer.value(option, experts) - before, np.inf)
        better = here < loss
        loss[better], target[better] = here[better], other
    gone = 0
    for at in np.argsort(loss, kind="stable"):
        other = target[at]
        if gone == excess or not np.isfinite(loss[at]):
            break
        if other >= 0 and room[other] == 0:
            continue
        holders[experts[at], place] = False
        if other >= 0:
            holders[experts[at], other] = True
            room[other] -= 1
        gone += 1
    return gone > 0


def _make_room(scorer: Scorer, holders: Bools, excess: Ints) -> bool:
    """Drop what is missed least from full places, as many replicas as are too many elsewhere. Modifies `holders`."""
    arrays = scorer.arrays
    every = [
        np.flatnonzero(holders[:, place]) if excess[place] <= 0 else np.zeros(0, int) for place in range(len(excess))
    ]
    expert = np.concatenate(every)
    place = np.repeat(np.arange(len(excess)), [len(some) for some in every])
    without = holders[expert]
    without[np.arange(len(expert)), place] = False
    loss = scorer.value(without, expert) - scorer.value(holders[expert], expert)
    loss[~admissible(arrays, without, expert)] = np.inf
    order = np.argsort(loss, kind="stable")
    order = order[np.isfinite(loss[order])]
    _, first = np.unique(expert[order], return_index=True)  # one of each expert: losses do not add up
    chosen = order[np.sort(first)][: int(excess[excess > 0].sum())]
    holders[expert[chosen], place[chosen]] = False
    return len(chosen) > 0


def fill(scorer: Scorer, holders: Bools) -> Bools:
    """Return holders with the most useful replicas added wherever there is room."""
    holders, arrays = holders.copy(), scorer.arrays
    experts = np.arange(arrays.num_experts)
    budget = _copies_left(arrays, holders)
    for place in range(arrays.num_places):
        room = int(min(arrays.slots[place] - holders[:, place].sum(), budget))
        if room <= 0:
            continue
        near, _, _ = _two_nearest(scorer, holders)
        gain = _gain_of_adding(scorer, holders, near, place)
        best = experts[np.argsort(-gain, kind="stable")[:room]]
        added = best[gain[best] > 0]
        holders[added, place] = True
        budget = _copies_left(arrays, holders)
    return holders


def swap(scorer: Scorer, holders: Bools, rounds: int, *, keep_going: Callable[[], bool]) -> Bools:
    """Return holders after up to `rounds` rounds of exchanging replicas within places, each at a gain."""
    holders = holders.copy()
    if scorer.arrays.new_copies is not None and scorer.arrays.new_copies.limit is not None:
        return holders  # an exchange may add a new copy; the restricted model handles that limit
    for _ in range(rounds):
        if not keep_going() or not _swap_round(scorer, holders):
            break
    return holders


def _swap_round(scorer: Scorer, holders: Bools) -> bool:
    near, second, nearest = _two_nearest(scorer, holders)
    slack = scorer.arrays.demand * np.where(np.isfinite(second), second - near, 0.0)  # an only holder must stay anyway
    touched = np.zeros(len(holders), dtype=np.bool_)
    tiny = 1e-9 * float((scorer.arrays.demand * near).sum()) / len(holders)
    for place in range(scorer.arrays.num_places):
        gain = _gain_of_adding(scorer, holders, near, place)
        loss = _loss_of_dropping(scorer, holders, slack, nearest, place)
        gain[touched], loss[touched] = -np.inf, np.inf
        adds = np.argsort(-gain, kind="stable")[:SWAPS_PER_PLACE]
        drops = np.argsort(loss, kind="stable")[:SWAPS_PER_PLACE]
        worth = gain[adds] - loss[drops] > tiny
        adds, drops = adds[worth], drops[worth]
        holders[adds, place], holders[drops, place] = True, False
        touched[adds] = touched[drops] = True
    return bool(touched.any())


def _two_nearest(scorer: Scorer, holders: Bools) -> tuple[Floats, Floats, Ints]:
    """Return cost of the nearest and second nearest holder and the place of the nearest, each `[I, K]`."""
    experts = np.arange(len(holders))
    near = np.full(scorer.arrays.demand.shape, np.inf)
    second, nearest = near.copy(), np.zeros(near.shape, dtype=np.int64)
    for place in range(holders.shape[1]):
        cost = np.where(holders[:, place], scorer.cost_at(experts, place), np.inf)
        closer = cost < near
        second = np.where(closer, near, np.minimum(second, cost))
        nearest[closer] = place
        near = np.minimum(near, cost)
    return near, second, nearest


def _gain_of_adding(scorer: Scorer, holders: Bools, near: Floats, place: int) -> Floats:
    """Seconds saved by one more replica at a place, `[K]`; −inf where it may not be there."""
    arrays, experts = scorer.arrays, np.arange(len(holders))
    gain = (arrays.demand * np.maximum(near - scorer.cost_at(experts, place), 0.0)).sum(axis=0)
    gain -= scorer.price_of(place, experts)
    same_node = arrays.node_of_place == arrays.node_of_place[place]
    barred = holders[:, same_node].any(axis=1)
    if arrays.allowed is not None:
        barred |= ~arrays.allowed[:, place]
    gain[barred] = -np.inf
    return np.asarray(gain)


def _loss_of_dropping(scorer: Scorer, holders: Bools, slack: Floats, nearest: Ints, place: int) -> Floats:
    """Seconds lost by dropping the replica at a place, `[K]`; inf where there is none or it must stay."""
    arrays = scorer.arrays
    held = np.flatnonzero(holders[:, place])
    lost = np.full(len(holders), np.inf)
    here = nearest[:, held] == place
    lost[held] = np.where(here, slack[:, held], 0.0).sum(axis=0, where=here) - scorer.price_of(place, held)
    without = holders[held]
    without[:, place] = False
    must_stay = num_domains(arrays, without) < max(arrays.required, 1)
    if arrays.pinned is not None:
        must_stay |= arrays.pinned[held, arrays.node_of_place[place]]
    lost[held[must_stay]] = np.inf
    return lost


def _copies_left(arrays: PlacementArrays, holders: Bools) -> int:
    new = arrays.new_copies
    if new is None or new.limit is None:
        return arrays.num_experts * arrays.num_places
    return new.limit - int((holders & new.is_new).sum())
