"""The cheapest holder set of every expert at given prices, exactly: demand × cost of every set is one matrix product.

Decides each expert's best set, a valid lower bound on it, and which other sets come near. Must not know how prices are
found. Work is cut into tiles of experts × sets that fit a processor's cache; large problems are computed in float32 and
the bound is lowered by the worst rounding that this can cause. Where sets are many, everyday passes look at those that
were ever best and at all small ones; only `certify` looks at all.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from planner.solvers.decomposition.answers import Answer, NearTies
from planner.solvers.decomposition.arrays import Bools, Floats, Ints, PlacementArrays, Places, Real
from planner.solvers.decomposition.holder_sets import HolderSets
from planner.solvers.decomposition.prices import Coupling

WHOLE_SETS = 8192  # up to here every pass looks at all sets
FIRST_SETS = 3000  # beyond, looked at before the first pass over all
EXACT_CELLS = 1 << 26  # experts × sets up to which everything is float64
TILE_CELLS = 1 << 20
TILE_SETS = 1 << 12


@dataclass(frozen=True)
class _Block:
    """Experts with one cost matrix: what the tiles of a pass are cut from."""

    experts: Ints  # [B]
    index: Ints  # [S'], sets that are looked at
    near: Real  # [I, S']
    place: Places  # [I, S']
    price: Real  # [S'], of the slots


class EnumeratingOracle:
    """Minimum over all holder sets. `certify` modifies which sets everyday passes look at."""

    lists_ties = True

    def __init__(self, arrays: PlacementArrays, sets: HolderSets, pool: ThreadPoolExecutor | None = None) -> None:
        self.arrays, self.sets, self.coupling = arrays, sets, Coupling(arrays)
        self._map: Callable[..., Iterator[Any]] = pool.map if pool else map
        self._demand = np.ascontiguousarray(arrays.demand.T)
        self._demand32 = self._demand.astype(np.float32)
        self._masked = _masked_experts(arrays)
        self._blocks = _expert_blocks(arrays)
        self._all = np.arange(len(sets))
        self._index = self._all if len(sets) <= WHOLE_SETS else sets.smallest(FIRST_SETS)
        exact = arrays.num_experts * len(sets) <= EXACT_CELLS
        self.rounding = 0.0 if exact else 2 * self._rounding(np.dtype(np.float32))

    @property
    def is_whole(self) -> bool:
        """Whether `answer` looks at all sets, so that its lower bounds hold."""
        return len(self._index) == len(self._all)

    def answer(self, theta: Floats) -> Answer:
        """Return the best of the sets that are looked at."""
        return self._answer(theta, self._index)[0]

    def certify(self, theta: Floats) -> Answer:
        """Return the best of all sets, and look at those best ones from now on."""
        answer, chosen = self._answer(theta, self._all)
        self._index = np.union1d(self._index, chosen)
        return answer

    def near_ties(
        self, theta: Floats, answer: Answer, slack: float, *, most: int, over_all: bool = False
    ) -> NearTies | None:
        """Return the sets that cost at most `slack` more than the lower bounds of `answer`; None beyond `most`."""
        index = self._all if over_all else self._index
        extras = self.coupling.holder_extras(theta)
        found: list[tuple[Ints, Ints, Floats]] = []
        count = 0
        for block in self._priced_blocks(theta, index):
            within = partial(self._within, block, extras=extras, lower=answer.lower, slack=slack)
            for part in self._map(within, self._row_tiles(block)):
                found.append(part)
                count += len(part[0])
                if count > most:
                    return None
        expert, chosen, reduced = (np.concatenate(column) for column in zip(*found, strict=True))
        order = np.lexsort((reduced, expert))
        return NearTies(expert[order], self.sets.member[index[chosen[order]]])

    def _answer(self, theta: Floats, index: Ints) -> tuple[Answer, Ints]:
        lower = np.full(self.arrays.num_experts, np.inf)
        chosen = np.zeros(self.arrays.num_experts, dtype=np.int64)
        place = np.zeros(self.arrays.demand.shape, dtype=np.int16)
        extras = self.coupling.holder_extras(theta)
        for block in self._priced_blocks(theta, index):
            parts = self._map(partial(self._best, block, extras=extras), self._row_tiles(block))
            best, arg = (np.concatenate(column) for column in zip(*parts, strict=True))
            lower[block.experts], chosen[block.experts] = best, index[arg]
            place[:, block.experts] = block.place[:, arg]
        return Answer(lower, self.sets.member[chosen], place), chosen

    def _priced_blocks(self, theta: Floats, index: Ints) -> Iterator[_Block]:
        costs = self.coupling.layer_costs(theta)
        price = self.sets.member[index] @ theta[self.coupling.memory]
        is_exact = self.arrays.num_experts * len(index) <= EXACT_CELLS
        for layer, experts in enumerate(self._blocks):
            near, place = self.sets.nearest(costs[layer], index)
            if is_exact:
                yield _Block(experts, index, near, place, price)
            else:
                yield _Block(experts, index, near.astype(np.float32), place, price.astype(np.float32))

    def _row_tiles(self, block: _Block) -> list[Ints]:
        rows = max(1, TILE_CELLS // min(len(block.index), TILE_SETS))
        every = np.arange(len(block.experts))
        return [every[at : at + rows] for at in range(0, len(every), rows)]

    def _values(self, block: _Block, rows: Ints, columns: slice, extras: Floats | None) -> Real:
        """Cost with prices of sets `columns` for experts `rows` of the block, `[rows, columns]`; inf where banned."""
        experts = block.experts[rows]
        demand: Any = self._demand if block.near.dtype == np.float64 else self._demand32
        values = demand[experts] @ block.near[:, columns]
        values += block.price[columns]
        if extras is not None:
            member = self.sets.member[block.index[columns]].T.astype(values.dtype)
            values += extras[experts].astype(values.dtype) @ member
        if self._masked[experts].any():
            values[self._violations(experts, block.index[columns])] = np.inf
        result: Real = values
        return result

    def _violations(self, experts: Ints, index: Ints) -> Bools:
        """Whether a set has a banned place or lacks a pinned node, `[experts, index]`."""
        arrays, member = self.arrays, self.sets.member[index]
        broken = np.zeros((len(experts), len(index)))
        if arrays.allowed is not None:
            broken += (~arrays.allowed[experts]).astype(float) @ member.T.astype(float)
        if arrays.pinned is not None:
            on_node = np.zeros((len(index), arrays.num_nodes))
            np.maximum.at(on_node.T, arrays.node_of_place, member.T.astype(float))
            broken += arrays.pinned[experts].astype(float) @ (1 - on_node).T
        return broken > 0.5

    def _best(self, block: _Block, rows: Ints, *, extras: Floats | None) -> tuple[Floats, Ints]:
        best, arg = np.full(len(rows), np.inf), np.zeros(len(rows), dtype=np.int64)
        for start in range(0, len(block.index), TILE_SETS):
            values = self._values(block, rows, slice(start, start + TILE_SETS), extras)
            local = values.argmin(axis=1)
            value = values[np.arange(len(rows)), local].astype(np.float64)
            better = value < best
            best[better], arg[better] = value[better], local[better] + start
        return best * (1 - self._rounding(block.near.dtype)), arg

    def _within(
        self, block: _Block, rows: Ints, *, extras: Floats | None, lower: Floats, slack: float
    ) -> tuple[Ints, Ints, Floats]:
        experts = block.experts[rows]
        floor = lower[experts][:, None]
        found = []
        for start in range(0, len(block.index), TILE_SETS):
            values = self._values(block, rows, slice(start, start + TILE_SETS), extras)
            row, column = np.nonzero(values <= (floor + slack).astype(values.dtype))
            found.append((experts[row], column + start, values[row, column] - floor[row, 0]))
        expert, column, reduced = (np.concatenate(part) for part in zip(*found, strict=True))
        return expert, column, reduced.astype(np.float64)

    def _rounding(self, kind: np.dtype[np.floating]) -> float:
        """Worst relative error of a sum of non-negative products: inputs rounded once, then n additions."""
        terms = len(self.arrays.cost) + self.arrays.num_places + 6
        return terms * float(np.finfo(kind).eps)


def _masked_experts(arrays: PlacementArrays) -> Bools:
    masked = np.zeros(arrays.num_experts, dtype=np.bool_)
    if arrays.allowed is not None:
        masked |= ~arrays.allowed.all(axis=1)
    if arrays.pinned is not None:
        masked |= arrays.pinned.any(axis=1)
    return masked


def _expert_blocks(arrays: PlacementArrays) -> list[Ints]:
    if arrays.makespan is None:
        return [np.arange(arrays.num_experts)]
    return [np.flatnonzero(arrays.layer_of_expert == layer) for layer in range(arrays.num_layers)]
