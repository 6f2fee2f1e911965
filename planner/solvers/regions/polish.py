"""From a placement to a better one: exchanges within places, and exact assignment of replicas to places by blocks.

Decides which changes are made. Must not know prices. A region is solved against what the others hold: each of its
replicas costs what its callers lose by it, given their nearest holder elsewhere (what they pay to import), and the
region's slots are assigned to its replicas at least cost. Blocks of experts over all regions let replicas cross.
"""

from collections.abc import Callable

import numpy as np
from scipy.optimize import linear_sum_assignment

from planner.solvers.decomposition.arrays import Bools, Floats, Ints
from planner.solvers.regions.savings import savings
from planner.solvers.regions.standing import Standing

BLOCK = 256  # replicas assigned at once
PER_PLACE = 8  # exchanges of a place in a round
MOST_ROUNDS = 400
TINY = 1e-9  # of the cost of a mean expert: no gain
STALLED = 2e-5  # relative gain of a sweep after which another is not worth it

KeepGoing = Callable[[], bool]


def polish(standing: Standing, region_of_place: Ints, rng: np.random.Generator, *, keep_going: KeepGoing) -> None:
    """Improve until a sweep over all regions and all experts gains little. Modifies `standing`."""
    exchange(standing, rng, keep_going=keep_going)
    before = np.inf
    while keep_going() and standing.value < before - STALLED * abs(standing.value):
        before = standing.value
        for region in range(int(region_of_place.max()) + 1):
            _assign_region(standing, region_of_place == region, rng, keep_going=keep_going)
        order = rng.permutation(len(standing.holders))
        for at in range(0, len(order), BLOCK):
            if keep_going():
                _assign(standing, order[at : at + BLOCK], np.ones(len(region_of_place), dtype=np.bool_), rng)
        exchange(standing, rng, keep_going=keep_going)


def exchange(standing: Standing, rng: np.random.Generator, *, keep_going: KeepGoing) -> None:
    """Fill free slots and exchange replicas within places, each expert once a round, while it gains."""
    for _ in range(MOST_ROUNDS):
        if not keep_going() or not _exchange_round(standing, rng):
            break


def _exchange_round(standing: Standing, rng: np.random.Generator) -> bool:
    holders, free = standing.holders.copy(), standing.free
    touched = np.zeros(len(holders), dtype=np.bool_)
    tiny = TINY * standing.value / len(holders)
    for place in rng.permutation(len(free)):
        gain = np.where(touched, -np.inf, standing.gain[:, place])
        loss = np.where(touched, np.inf, standing.loss[:, place])
        adds = _first(-gain, PER_PLACE + max(int(free[place]), 0))
        drops = _first(loss, PER_PLACE)
        room = min(max(int(free[place]), 0), len(adds))
        pairs = min(len(adds) - room, len(drops))
        worth = gain[adds[room : room + pairs]] - loss[drops[:pairs]] > tiny
        pairs = pairs if worth.all() else int(worth.argmin())
        filled = adds[:room][gain[adds[:room]] > 0]
        into, out = np.concatenate([filled, adds[room : room + pairs]]), drops[:pairs]
        holders[into, place], holders[out, place] = True, False
        touched[into] = touched[out] = True
    changed = np.flatnonzero(touched)
    standing.put(changed, holders[changed])
    return len(changed) > 0


def _first(key: Floats, count: int) -> Ints:
    """Return the indices of the `count` smallest finite keys, in order; ties go to the lower index."""
    count = min(count, len(key))
    some = np.argpartition(key, count - 1)[:count] if count < len(key) else np.arange(len(key))
    some = np.sort(some[np.isfinite(key[some])])
    return np.asarray(some[np.argsort(key[some], kind="stable")])


def _assign_region(standing: Standing, inside: Bools, rng: np.random.Generator, *, keep_going: KeepGoing) -> None:
    experts = rng.permutation(np.flatnonzero(standing.holders[:, inside].any(axis=1)))
    for at in range(0, len(experts), BLOCK):
        if keep_going():
            _assign(standing, experts[at : at + BLOCK], inside, rng)


def _assign(standing: Standing, experts: Ints, inside: Bools, rng: np.random.Generator) -> None:
    """Take one replica `inside` of each expert, at random, and assign their slots anew at least cost."""
    movable = standing.holders[experts] & inside
    if standing.arrays.pinned is not None:
        movable &= ~standing.arrays.pinned[experts][:, standing.arrays.node_of_place]
    experts, movable = experts[movable.any(axis=1)], movable[movable.any(axis=1)]
    if len(experts) < 2:
        return
    rows = np.arange(len(experts))
    taken = np.where(movable, rng.random(movable.shape), -1.0).argmax(axis=1)
    rest = standing.holders[experts]
    rest[rows, taken] = False
    places, column = np.unique(taken, return_inverse=True)
    cost = _cost_of_one_more(standing, experts, rest, taken, places)[:, column]
    row, slot = linear_sum_assignment(cost)
    if cost[row, slot].sum() >= cost[rows, rows].sum() - TINY * standing.value / len(standing.holders):
        return
    rest[row, taken[slot]] = True
    moved = taken[slot] != taken
    standing.put(experts[moved], rest[moved])


def _cost_of_one_more(standing: Standing, experts: Ints, rest: Bools, taken: Ints, places: Ints) -> Floats:
    """Return the cost of each expert with one holder more than `rest` `[X, P]`, less a constant, `[X, places]`."""
    was_near = standing.place[experts] == taken[:, None]
    import_cost = np.where(was_near, standing.second[experts], standing.near[experts])
    gain = savings(standing.demand[experts], import_cost, standing.cost[:, places])
    if standing.arrays.new_copies is not None:
        gain = gain - standing.arrays.new_copies.price[np.ix_(experts, places)]
    gain = gain + standing.urgency(experts, rest)[:, places]
    barred = ~standing.may_add(experts, rest)[:, places]
    return np.where(barred, np.inf, -gain)
