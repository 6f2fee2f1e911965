"""Prices on everything that experts share: memory, new copies, load and link rows, heaviest nodes.

Decides how prices enter an expert's own costs, and what a set of choices uses of each shared thing. Must not know how
prices are found. Prices are one vector θ = [memory P | new copies 0 or 1 | rows R | heaviest node L·N].
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from planner.solvers.decomposition.arrays import Bools, Floats, Ints, PlacementArrays, Places


@dataclass(frozen=True)
class Coupling:
    """Where each shared thing lies in θ, how much of it there is, and how high its price can usefully be."""

    arrays: PlacementArrays

    @cached_property
    def memory(self) -> slice:
        """Prices per slot of each place, s."""
        return slice(0, self.arrays.num_places)

    @cached_property
    def copies(self) -> slice:
        """Price per new copy, s; empty where new copies are not limited."""
        new = self.arrays.new_copies
        return slice(self.memory.stop, self.memory.stop + (new is not None and new.limit is not None))

    @cached_property
    def rows(self) -> slice:
        """Prices per unit of each row."""
        return slice(self.copies.stop, self.copies.stop + (len(self.arrays.rows.limit) if self.arrays.rows else 0))

    @cached_property
    def heaviest(self) -> slice:
        """Prices per second of load of each (layer, node); those of one layer add up to at most its weight."""
        count = self.arrays.num_layers * self.arrays.num_nodes if self.arrays.makespan else 0
        return slice(self.rows.stop, self.rows.stop + count)

    @property
    def size(self) -> int:
        """Number of prices."""
        return int(self.heaviest.stop)

    @cached_property
    def limit(self) -> Floats:
        """How much there is of each shared thing, `[θ]`; the heaviest node has no limit of its own (0)."""
        limit = np.zeros(self.size)
        limit[self.memory] = self.arrays.slots
        if self.arrays.new_copies is not None and self.arrays.new_copies.limit is not None:
            limit[self.copies] = self.arrays.new_copies.limit
        if self.arrays.rows is not None:
            limit[self.rows] = self.arrays.rows.limit
        return limit

    @cached_property
    def unit(self) -> float:
        """What serving a mean expert costs, s: the unit of every model, so that tolerances mean something."""
        arrays = self.arrays
        per_call = float(arrays.cost.mean())
        if arrays.makespan is not None:
            per_call += float(arrays.makespan.weight.max() * arrays.makespan.service.max())
        unit = per_call * float(arrays.demand.sum(axis=0).mean())
        if arrays.new_copies is not None:
            unit += float(arrays.new_copies.price.mean())
        return unit if unit > 0 else 1.0

    @cached_property
    def scale(self) -> Floats:
        """A natural size of each price, `[θ]`, to take steps in; positive."""
        arrays, scale = self.arrays, np.full(self.size, self.unit)
        if arrays.rows is not None:
            used = arrays.rows.weight.max(axis=(1, 2)) * arrays.demand.sum(axis=0).mean()
            scale[self.rows] = self.unit / np.where(used > 0, used, 1.0)
        if arrays.makespan is not None:
            weight = np.where(arrays.makespan.weight > 0, arrays.makespan.weight, 1.0)
            scale[self.heaviest] = np.repeat(weight / arrays.num_nodes, arrays.num_nodes)
        return scale

    @cached_property
    def ceiling(self) -> Floats:
        """Highest price worth trying, `[θ]`: about what an expert can save per unit of the shared thing."""
        arrays, ceiling = self.arrays, 1e3 * self.scale
        spread = float(arrays.demand.sum(axis=0).max()) * float(arrays.cost.max()) + self.unit
        ceiling[self.memory] = np.maximum(10 * spread, ceiling[self.memory])
        if arrays.makespan is not None:
            ceiling[self.heaviest] = np.repeat(arrays.makespan.weight, arrays.num_nodes)
        return ceiling

    def layer_costs(self, theta: Floats) -> Floats:
        """Cost of an evaluation with its prices, `[L', I, P]`; L' = 1 where all layers share it."""
        arrays = self.arrays
        cost = arrays.cost[None]
        if arrays.rows is not None:
            cost = cost + np.tensordot(theta[self.rows], arrays.rows.weight, axes=1)
        if arrays.makespan is not None:
            price = theta[self.heaviest].reshape(arrays.num_layers, arrays.num_nodes)[:, arrays.node_of_place]
            cost = cost + (price * arrays.makespan.service)[:, None, :]
        return cost

    def holder_extras(self, theta: Floats) -> Floats | None:
        """Price of a replica beyond its slot, `[K, P]`, or None where there is none."""
        new = self.arrays.new_copies
        if new is None:
            return None
        return new.price if new.limit is None else new.price + theta[self.copies] * new.is_new


@dataclass(frozen=True)
class Choice:
    """What one choice of holders and servers for every expert amounts to, per group of experts.

    Parameters
    ----------
    own
        `[G]`, cost without prices, s.
    use
        `[G, θ]`, what the group uses of every shared thing.
    """

    own: Floats
    use: Floats


def summarise(coupling: Coupling, held: Bools, place: Places, group: Ints) -> Choice:
    """Add up own costs and use per group.

    Parameters
    ----------
    held
        `[K, P]`, whether the place holds the expert.
    place
        `[I, K]`, place that serves each ingress.
    group
        `[K]`, ascending group of each expert; a group lies within one layer where heaviest nodes are priced.
    """
    arrays, num_groups = coupling.arrays, int(group[-1]) + 1
    starts = np.searchsorted(group, np.arange(num_groups))
    num_ingress, num_places = arrays.cost.shape
    cell = (group[None, :] * num_ingress + np.arange(num_ingress)[:, None]) * num_places + place
    traffic = np.bincount(cell.ravel(), weights=arrays.demand.ravel(), minlength=num_groups * num_ingress * num_places)
    traffic = traffic.reshape(num_groups, num_ingress, num_places)  # evaluations/s [G, I, P]
    own = np.einsum("gip,ip->g", traffic, arrays.cost)
    use = np.zeros((num_groups, coupling.size))
    use[:, coupling.memory] = np.add.reduceat(held.astype(np.float64), starts)
    if arrays.new_copies is not None:
        own += np.add.reduceat((held * arrays.new_copies.price).sum(axis=1), starts)
        if arrays.new_copies.limit is not None:
            use[:, coupling.copies] = np.add.reduceat((held & arrays.new_copies.is_new).sum(axis=1), starts)[:, None]
    if arrays.rows is not None:
        use[:, coupling.rows] = np.einsum("gip,rip->gr", traffic, arrays.rows.weight)
    if arrays.makespan is not None:
        load = np.zeros((num_groups, arrays.num_nodes))
        np.add.at(load.T, arrays.node_of_place, (traffic.sum(axis=1) * arrays.makespan.service).T)
        layer = arrays.layer_of_expert[starts]
        column = coupling.heaviest.start + layer[:, None] * arrays.num_nodes + np.arange(arrays.num_nodes)
        np.put_along_axis(use, column, load, axis=1)
    return Choice(own, use)
