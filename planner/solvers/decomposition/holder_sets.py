"""Sets of places that may hold one expert: at most one tier per node, enough failure domains.

Decides which sets there are, and how far they can be enumerated. Must not know prices or demand.
"""

from dataclasses import dataclass

import numpy as np

from planner.solvers.decomposition.arrays import Bools, Floats, Ints, PlacementArrays, Places

ENUMERABLE_SETS = 1 << 17


@dataclass(frozen=True)
class HolderSets:
    """Enumerated holder sets.

    Parameters
    ----------
    member
        `[S, P]`, whether the place belongs to the set; sets in order of size.
    """

    member: Bools

    def __len__(self) -> int:
        return len(self.member)

    @property
    def size(self) -> Ints:
        """Replicas in each set, `[S]`."""
        return np.asarray(self.member.sum(axis=1))

    def smallest(self, limit: int) -> Ints:
        """Return indices of all sets up to some size, the largest that keeps them within `limit`."""
        size = self.size
        counts = np.searchsorted(size, np.arange(size[0], size[-1] + 1), side="right")
        fitting = counts[counts <= limit]
        return np.arange(int(fitting[-1]) if len(fitting) else int(counts[0]))

    def nearest(self, cost: Floats, index: Ints) -> tuple[Floats, Places]:
        """Return the cheapest cost `[I, S']` from each ingress into each set of `index` `[S']`, and the place it is at.

        `cost` is `[I, P]`; ties go to the lower place.
        """
        member = self.member[index]
        best = np.full((len(cost), len(index)), np.inf)
        place = np.zeros(best.shape, dtype=np.int16)
        for p in range(member.shape[1]):
            closer = member[:, p] & (cost[:, p, None] < best)
            np.copyto(best, cost[:, p, None], where=closer)
            place[closer] = p
        return best, place


def count_sets(arrays: PlacementArrays) -> int:
    """Return how many sets there are before domains are counted, the empty one included."""
    usable = arrays.node_of_place[arrays.slots > 0]
    total = 1
    for tiers in np.bincount(usable, minlength=arrays.num_nodes):
        total *= 1 + int(tiers)
    return total


def enumerate_sets(arrays: PlacementArrays) -> HolderSets:
    """Enumerate every set over places with room that spans at least `required` failure domains, small sets first."""
    usable = arrays.slots > 0
    member = np.zeros((1, arrays.num_places), dtype=np.bool_)
    for node in range(arrays.num_nodes):
        options = [member]
        for place in np.flatnonzero(usable & (arrays.node_of_place == node)):
            chosen = member.copy()
            chosen[:, place] = True
            options.append(chosen)
        member = np.concatenate(options)
    member = member[num_domains(arrays, member) >= max(arrays.required, 1)]
    return HolderSets(member[np.argsort(member.sum(axis=1), kind="stable")])


def num_domains(arrays: PlacementArrays, member: Bools) -> Ints:
    """Count the failure domains that each row of `member` `[X, P]` spans, `[X]`."""
    domain_of_place = arrays.domains[arrays.node_of_place]
    spanned = [member[:, domain_of_place == domain].any(axis=1) for domain in np.unique(domain_of_place)]
    return np.asarray(np.sum(spanned, axis=0, dtype=np.int64))
