"""Regions: nodes that all callers see at about the same cost, and the problem between regions.

Decides which nodes form a region, from costs alone. Must not know names, nor how either problem is solved.
"""

from dataclasses import dataclass

import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import pdist

from planner.solvers.decomposition.arrays import Floats, Ints, PlacementArrays

MOST_REGIONS = 16
FEWEST_NODES = 5  # of a region, on average
MOST_NODES = 30


@dataclass(frozen=True)
class Regions:
    """Which region places and callers belong to.

    Parameters
    ----------
    of_place, of_ingress
        `[P]` and `[I]`, index of a region; each region has a place.
    """

    of_place: Ints
    of_ingress: Ints

    @property
    def count(self) -> int:
        """Number of regions."""
        return int(self.of_place.max()) + 1


def find_regions(arrays: PlacementArrays) -> Regions:
    """Join nodes by how differently callers reach them (average linkage), and cut where the next join is farthest.

    Two nodes are as far apart as the caller that tells them apart best finds them: at metric costs, their distance.
    """
    nodes = np.unique(arrays.node_of_place)
    seen = np.stack([arrays.cost[:, arrays.node_of_place == node].min(axis=1) for node in nodes])
    region = _cut(seen)
    of_place = region[np.searchsorted(nodes, arrays.node_of_place)]
    return Regions(of_place, of_place[arrays.cost.argmin(axis=1)])


def between_regions(arrays: PlacementArrays, regions: Regions) -> PlacementArrays:
    """Return the problem in which a region is a place and a caller, at mean costs; only memory constrains it."""
    caller = _members(regions.of_ingress, regions.count)
    weight = caller * (arrays.demand.sum(axis=1) + 1e-300)
    room = _members(regions.of_place, regions.count) * np.maximum(arrays.slots, 1e-9)
    cost = weight @ arrays.cost @ room.T / np.outer(weight.sum(axis=1) + 1e-300, room.sum(axis=1))
    capacity = _members(regions.of_place, regions.count) @ arrays.slots
    return PlacementArrays(
        demand=caller @ arrays.demand,
        cost=cost,
        capacity=capacity.astype(np.float64),
        expert_bytes=1.0,
        node_of_place=np.arange(regions.count),
        layer_of_expert=arrays.layer_of_expert,
    )


def _cut(seen: Floats) -> Ints:
    """Region of each row of `seen` `[N, I]`."""
    count = len(seen)
    fewest, most = max(1, -(-count // MOST_NODES)), min(MOST_REGIONS, count // FEWEST_NODES)
    if most <= 1:
        return np.zeros(count, dtype=np.int64)
    tree = linkage(pdist(seen, "chebyshev"), "average")
    fewest = min(max(fewest, 2), most)
    heights = tree[:, 2]  # ascending; count − n joins leave n regions
    options = np.arange(fewest, most + 1)
    jump = heights[count - options] / (heights[count - options - 1] + 1e-12 * heights[-1] + 1e-300)
    labels = fcluster(tree, int(options[jump.argmax()]), "maxclust")
    return np.asarray(np.unique(labels, return_inverse=True)[1], dtype=np.int64)


def _members(region: Ints, count: int) -> Floats:
    return np.asarray(np.arange(count)[:, None] == region, dtype=np.float64)
