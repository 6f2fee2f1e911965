"""From which regions hold an expert to which of their places do.

Decides each region's places by exact assignment, block by block. Must not know prices.
"""

import numpy as np
from scipy.optimize import linear_sum_assignment

from planner.solvers.decomposition.arrays import Bools, Ints, PlacementArrays
from planner.solvers.regions.partition import Regions

BLOCK = 256


def place_within(arrays: PlacementArrays, regions: Regions, held: Bools, rng: np.random.Generator) -> Bools:
    """Return holders `[K, P]` that fit memory, of regions `held` `[K, regions]`; other constraints may be broken."""
    holders = np.zeros((arrays.num_experts, arrays.num_places), dtype=np.bool_)
    served = _serving_regions(arrays, regions, held)
    for region in range(regions.count):
        places = np.flatnonzero(regions.of_place == region)
        slots = rng.permutation(np.repeat(places, arrays.slots[places]))
        experts = rng.permutation(np.flatnonzero(held[:, region]))[: len(slots)]
        for at in range(0, len(experts), BLOCK):
            block, room = experts[at : at + BLOCK], slots[at : at + BLOCK] if at + BLOCK < len(experts) else slots[at:]
            callers = np.where(served[:, block] == region, arrays.demand[:, block], 0.0)
            cost = callers.T @ arrays.cost
            if arrays.allowed is not None:
                cost = np.where(arrays.allowed[block], cost, 10 * cost.max() + 1.0)
            row, slot = linear_sum_assignment(cost[:, room[: 4 * BLOCK]])
            holders[block[row], room[slot]] = True
    return holders if arrays.allowed is None else holders & arrays.allowed


def _serving_regions(arrays: PlacementArrays, regions: Regions, held: Bools) -> Ints:
    """Region that serves each caller, `[I, K]`: the cheapest that holds the expert, by the mean of its places."""
    mean = np.stack([arrays.cost[:, regions.of_place == r].mean(axis=1) for r in range(regions.count)], axis=1)
    served = np.zeros(arrays.demand.shape, dtype=np.int64)
    best = np.full(arrays.demand.shape, np.inf)
    for region in range(regions.count):
        cost = np.where(held[:, region], mean[:, region, None], np.inf)
        closer = cost < best
        served[closer] = region
        best = np.minimum(best, cost)
    return served
