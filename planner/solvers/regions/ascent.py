"""Prices that callers pay per expert, raised until they prove a bound: works between regions and on all nodes alike.

Decides prices and the bound they prove. Must not know regions, nor how placements are made of prices.

Notes
-----
Let every caller pay v[i,k] for expert k wherever it is served. Then no placement costs less than
Σ v + Σ_k required · u[k] − Σ_p (sum of the slots[p] greatest ρ[k,p] > 0), where
ρ[k,p] = u[k] + Σ_i max(0, v[i,k] − d[i,k] c[i,p]) − price of a new copy: the assignment and the cover of every expert
are relaxed (Beasley 1993, "Lagrangean heuristics for location problems"), memory is kept exactly, so memory needs no
prices. Prices are kept per evaluation, r = v / d; a step is the same for all callers of an expert, averaged over past
slopes, of Polyak's length. Slopes are steered in float32; what is proved is summed in float64.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from planner.solvers.decomposition.arrays import Bools, Floats, Ints, PlacementArrays, Real
from planner.solvers.regions.savings import Mapper, savings

PATIENCE = 10  # steps without gain until they become shorter
SHORTER = 0.7
SHORTEST = 1e-3
GAIN = 1e-4  # relative; less does not count as gain
MEMORY = 0.7  # share of past slopes in a step
CERTIFY_EVERY = 40
COVER_SHARE = 0.1  # of an expert's demand: what its cover weighs in a step
CEILING = 1e3  # in the greatest cost of an evaluation: the most that anyone pays
ROUNDING = 1e-12
TILE = 512

Singles = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Prices:
    """What callers pay.

    Parameters
    ----------
    paid
        r, `[K, I]`, seconds per evaluation.
    cover
        u, `[K]`, seconds per required replica.
    """

    paid: Singles
    cover: Floats


class Ascent:
    """The relaxed problem of one problem at one cost matrix. Does not change."""

    def __init__(self, arrays: PlacementArrays, cost: Floats, mapper: Mapper = map) -> None:
        self.arrays, self.cost, self._map = arrays, cost, mapper
        self.demand = np.ascontiguousarray(arrays.demand.T)  # [K, I]
        self._demand32, self._cost32 = self.demand.astype(np.float32), cost.astype(np.float32)
        self._ceiling = CEILING * float(cost.max(initial=0.0))
        asked = self.demand.sum(axis=1)
        needs_cover = (asked == 0) | (arrays.required > 1)
        mean = float(asked.mean()) or 1.0
        self._cover_weight = np.where(needs_cover, COVER_SHARE * np.where(asked > 0, asked, mean), 0.0)

    @cached_property
    def _forced(self) -> Bools | None:
        """Whether a place must take an expert, `[K, P]`: the only place with room of a node that it is pinned to."""
        arrays = self.arrays
        if arrays.pinned is None:
            return None
        node, usable = arrays.node_of_place, arrays.slots > 0
        alone = usable & (np.bincount(node[usable], minlength=arrays.num_nodes)[node] == 1)
        forced: Bools = arrays.pinned[:, node] & alone
        return forced

    @cached_property
    def free(self) -> Prices:
        """Nobody pays."""
        return Prices(np.zeros(self.demand.shape, dtype=np.float32), np.zeros(len(self.demand)))

    def certify(self, prices: Prices) -> float:
        """Return a bound that holds, in float64."""
        paid = prices.paid.astype(np.float64)
        value = self._relax(prices, savings(self.demand, paid, self.cost, self._map))[0]
        size = float((self.demand * paid).sum()) + float(prices.cover.sum())
        return value - ROUNDING * (len(self.cost) + len(self.demand)) * size

    def chosen(self, prices: Prices) -> Bools:
        """Places that would take each expert at these prices, `[K, P]`: they fit memory, but may not cover."""
        return self._relax(prices, savings(self._demand32, prices.paid, self._cost32, self._map))[1]

    def memory_price(self, prices: Prices) -> Floats:
        """Return what the last slot of each place saves, `[P]`, s."""
        worth = self._worth(prices, savings(self._demand32, prices.paid, self._cost32, self._map))
        slots, count = self.arrays.slots, len(self.demand)
        last = [np.sort(one)[count - room] if 0 < room < count else 0.0 for one, room in zip(worth, slots, strict=True)]
        return np.maximum(np.asarray(last, dtype=np.float64), 0.0)

    def climb(
        self, start: Prices, target: float, *, step: float, keep_going: Callable[[Prices, float | None], bool]
    ) -> Prices:
        """Return the best prices found; `target` is about the best cost known.

        `keep_going` hears of the best prices after every step, now and then with the bound they certify.
        """
        prices, best, best_value = start, start, -np.inf
        slope: Prices | None = None
        stale = since = 0
        certified = -np.inf
        while step > SHORTEST:
            value, chosen = self._relax(prices, savings(self._demand32, prices.paid, self._cost32, self._map))
            fresh = self._slope(prices, chosen)
            slope = fresh if slope is None else _blend(slope, fresh)
            stale = 0 if value > best_value + GAIN * abs(best_value) else stale + 1
            if value > best_value:
                best, best_value = prices, value
            since += 1
            proved = None
            if since >= CERTIFY_EVERY and best_value > certified:
                proved, certified, since = self.certify(best), best_value, 0
            if not keep_going(best, proved):
                break
            if stale >= PATIENCE:
                prices, step, stale = best, step * SHORTER, 0
            prices = self._moved(prices, slope, step * max(target - value, 1e-4 * abs(target)))
        keep_going(best, self.certify(best))
        return best

    def _worth(self, prices: Prices, saved: Real) -> Real:
        """ρ `[P, K]`; −inf where a place may not take the expert."""
        worth: npt.NDArray[Any] = np.ascontiguousarray(saved.T)
        if prices.cover.any():
            worth = worth + prices.cover.astype(worth.dtype)
        if self.arrays.new_copies is not None:
            worth = worth - self.arrays.new_copies.price.T.astype(worth.dtype)
        if self.arrays.allowed is not None:
            worth = np.where(self.arrays.allowed.T, worth, worth.dtype.type(-np.inf))
        return worth

    def _relax(self, prices: Prices, saved: Real) -> tuple[float, Bools]:
        """Value of the relaxed problem, and which places take which expert, `[K, P]`."""
        arrays, worth, count = self.arrays, self._worth(prices, saved), len(self.demand)
        chosen = np.zeros(worth.shape, dtype=np.bool_)
        value = float(np.einsum("ki,ki->", self.demand, prices.paid, dtype=np.float64))
        value += max(arrays.required, 1) * float(prices.cover.sum())
        for place, room in enumerate(arrays.slots):
            if room == 0:
                continue
            here = worth[place]
            rank = here if self._forced is None else np.where(self._forced[:, place], np.inf, here)
            top = np.argpartition(rank, count - room)[count - room :] if room < count else np.arange(count)
            top = top[rank[top] > 0]
            chosen[place, top] = True
            value -= float(here[top].sum(dtype=np.float64))
        return value, np.ascontiguousarray(chosen.T)

    def _slope(self, prices: Prices, chosen: Bools) -> Prices:
        """How far each caller is from being served exactly once, and each expert from its replicas."""
        slope = np.ones(self.demand.shape, dtype=np.float32)
        for at in range(0, len(slope), TILE):
            expert, place = np.nonzero(chosen[at : at + TILE])
            if len(expert) == 0:
                continue
            served = prices.paid[at + expert] > self._cost32.T[place]
            first = np.flatnonzero(np.diff(expert, prepend=-1))
            slope[at + expert[first]] -= np.add.reduceat(served, first, axis=0, dtype=np.float32)
        return Prices(slope, max(self.arrays.required, 1) - chosen.sum(axis=1, dtype=np.float64))

    def _moved(self, prices: Prices, slope: Prices, rise: float) -> Prices:
        """Prices after a step along `slope` that would raise the value by `rise`, were it straight."""
        length = float(np.einsum("ki,ki,ki->", self._demand32, slope.paid, slope.paid, dtype=np.float64))
        length += float(self._cover_weight @ slope.cover**2)
        if length <= 0:
            return prices
        by = min(rise / length, self._ceiling)  # slopes that nearly cancel must not throw prices out of sight
        paid = prices.paid + np.float32(by) * slope.paid
        np.clip(paid, 0, self._ceiling, out=paid)
        cover = prices.cover + by * self._cover_weight * slope.cover
        return Prices(paid, np.clip(cover, 0.0, self._ceiling * self._cover_weight))


def spread(prices: Prices, region_of_ingress: Ints) -> Prices:
    """Let every caller pay what its region paid."""
    return replace(prices, paid=np.ascontiguousarray(prices.paid[:, region_of_ingress]))


def _blend(past: Prices, fresh: Prices) -> Prices:
    paid = np.float32(MEMORY) * past.paid + np.float32(1 - MEMORY) * fresh.paid
    return Prices(paid, MEMORY * past.cover + (1 - MEMORY) * fresh.cover)
