"""A placement and what every single change to it would gain or lose, kept up to date expert by expert.

Decides which changes are allowed. Must not know which are made. Experts do not touch each other but by the slots they
take, so changes to different experts add up.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from planner.solvers.decomposition.arrays import Bools, Floats, Ints, PlacementArrays
from planner.solvers.decomposition.holder_sets import num_domains
from planner.solvers.regions.savings import Mapper, savings

FAR = 4.0  # in the greatest cost: what a caller pays that no holder serves
MISSING = 1e6  # in the worst cost of a mean expert and the dearest copy: what a missing replica weighs


class Standing:
    """Holders, who serves whom, gains of adding and losses of dropping. `put` and `refresh` modify it.

    Attributes
    ----------
    holders
        `[K, P]`.
    near, second, place
        `[K, I]`, cost of an evaluation at the nearest and the second nearest holder, s; place of the nearest.
    gain, loss
        `[K, P]`, s: of one more replica (−inf where it may not be), of one less (inf where it is not or must stay).
    """

    def __init__(self, arrays: PlacementArrays, cost: Floats, holders: Bools, mapper: Mapper = map) -> None:
        self.arrays, self.cost, self.holders, self._map = arrays, cost, holders.copy(), mapper
        self.demand = np.ascontiguousarray(arrays.demand.T)
        self.far = FAR * float(cost.max(initial=0.0)) + 1e-30
        dearest = 0.0 if arrays.new_copies is None else float(arrays.new_copies.price.max())
        self.missing = MISSING * (self.far * float(self.demand.sum()) / len(holders) + dearest + 1e-30)
        self._domain = arrays.domains[arrays.node_of_place]
        self._is_single = len(np.unique(self._domain)) == len(self._domain)
        self._usable = arrays.slots > 0
        self._required = max(arrays.required, 1)
        self.near = np.empty(self.demand.shape)
        self.second = np.empty(self.demand.shape)
        self.place = np.zeros(self.demand.shape, dtype=np.int16)
        self.gain, self.loss = np.empty(holders.shape), np.empty(holders.shape)
        self.refresh(np.arange(len(holders)))

    @property
    def value(self) -> float:
        """Cost of all experts, s; what is missing counts as far."""
        new = self.arrays.new_copies
        total = float(np.einsum("ki,ki->", self.demand, self.near))
        return total if new is None else total + float(new.price[self.holders].sum())

    @property
    def free(self) -> Ints:
        """Free slots of each place, `[P]`."""
        return np.asarray(self.arrays.slots - self.holders.sum(axis=0))

    def put(self, experts: Ints, holders: Bools) -> None:
        """Give `experts` `[X]` the holders `[X, P]`."""
        self.holders[experts] = holders
        self.refresh(experts)

    def refresh(self, experts: Ints) -> None:
        """Bring everything about `experts` up to date with their holders."""
        lost = np.zeros((len(experts), self.holders.shape[1]))
        for row, k in enumerate(experts):
            held = np.flatnonzero(self.holders[k])
            if len(held) == 0:
                self.near[k] = self.second[k] = self.far
                continue
            cost = self.cost[:, held]
            which = cost.argmin(axis=1)
            near = cost[np.arange(len(cost)), which]
            second = np.partition(cost, 1, axis=1)[:, 1] if len(held) > 1 else np.full(len(cost), self.far)
            self.near[k], self.second[k], self.place[k] = near, second, held[which]
            lost[row, held] = np.bincount(which, weights=self.demand[k] * (second - near), minlength=len(held))
        gained = savings(self.demand[experts], self.near[experts], self.cost, self._map)
        if self.arrays.new_copies is not None:
            gained = gained - self.arrays.new_copies.price[experts]
            lost = lost - self.arrays.new_copies.price[experts]
        held_here = self.holders[experts]
        self.gain[experts] = gained + self.urgency(experts, held_here)
        self.gain[experts] = np.where(self.may_add(experts, held_here), self.gain[experts], -np.inf)
        self.loss[experts] = np.where(self._may_drop(experts, held_here), lost, np.inf)

    def may_add(self, experts: Ints, held: Bools) -> Bools:
        """Whether a place may hold `experts` beside `held` `[X, P]`: not banned, no other tier of the node has it."""
        fine: Bools = (_replicas_in(held, self.arrays.node_of_place) == 0) & self._usable
        return fine if self.arrays.allowed is None else fine & self.arrays.allowed[experts]

    def urgency(self, experts: Ints, held: Bools) -> Floats:
        """Return what a replica at a place is worth because a pin or a failure domain misses it there, `[X, P]`."""
        absent = _replicas_in(held, self._domain) == 0
        short = self._num_domains(held) < self._required
        urgent = np.where(short[:, None] & absent, self.missing, 0.0)
        if self.arrays.pinned is not None:
            absent = self.arrays.pinned[experts][:, self.arrays.node_of_place]
            absent &= _replicas_in(held, self.arrays.node_of_place) == 0
            urgent += np.where(absent, 2 * self.missing, 0.0)
        return urgent

    def _may_drop(self, experts: Ints, held: Bools) -> Bools:
        """Whether the replica may go: not pinned, and enough domains remain."""
        enough = self._num_domains(held) > self._required
        fine: Bools = held & (enough[:, None] | (_replicas_in(held, self._domain) > 1))
        if self.arrays.pinned is not None:
            fine &= ~self.arrays.pinned[experts][:, self.arrays.node_of_place]
        return fine

    def _num_domains(self, held: Bools) -> Ints:
        """Count the failure domains of each row of `held` `[X, P]`, `[X]`."""
        if self._is_single:
            return np.asarray(held.sum(axis=1))
        return num_domains(self.arrays, held)


def _replicas_in(held: Bools, group: Ints) -> npt.NDArray[Any]:
    """Count the replicas in the group of each place, `[X, P]`, for `held` `[X, P]` and groups `[P]`."""
    if len(np.unique(group)) == len(group):
        return held
    same = (group[:, None] == group).astype(np.float32)
    counts: npt.NDArray[Any] = held.astype(np.float32) @ same
    return counts
