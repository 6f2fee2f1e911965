"""Solve a placement problem over many nodes by regions.

Decides the order of the steps and the time of each. Must not know what happens inside a step.
Flow: partition → problem between regions: holders and prices (`between_regions`, `polish`, `ascent`) → holders within
regions, polished region by region → the regions' prices refined to every caller, which proves the bound for the whole →
what takes the slots at these prices, polished → where calls break load or link rows, again with prices on those.
"""

from dataclasses import replace

import numpy as np

from planner.solvers.decomposition.arrays import (
    Bools,
    Floats,
    Incumbent,
    Outcome,
    PlacementArrays,
    Settings,
    Stop,
)
from planner.solvers.decomposition.evaluate import holders_are_feasible, objective_of, serve_whole
from planner.solvers.decomposition.holder_sets import num_domains
from planner.solvers.decomposition.run import Run, workers
from planner.solvers.regions.ascent import Ascent, Prices, spread
from planner.solvers.regions.partition import Regions, between_regions, find_regions
from planner.solvers.regions.polish import exchange, polish
from planner.solvers.regions.rows import SparseRows, sparse_rows
from planner.solvers.regions.savings import Mapper
from planner.solvers.regions.serve import serve
from planner.solvers.regions.standing import Standing
from planner.solvers.regions.within import place_within

FIRST_STEP = 1.0  # of the ascent between regions, which starts from nothing
NEXT_STEP = 0.3  # of the ascent over the whole, which starts from the regions' prices
COARSE_SHARE = 0.1  # of the time left, between regions
FIRST_SHARE = 0.35  # of the time left, for the first placement
PRICE_SHARE = 0.7  # of the time left then, for prices
ROW_ROUNDS = 6  # of placing and pricing rows


class Search:
    """One problem, its regions, and what is shared between steps. Methods modify the run."""

    def __init__(self, arrays: PlacementArrays, rows: SparseRows | None, run: Run, mapper: Mapper) -> None:
        self.arrays, self.rows, self.run, self.map = arrays, rows, run, mapper
        self.rng = np.random.default_rng(run.settings.seed)
        self.regions: Regions = find_regions(arrays)
        self.row_price = np.zeros(0 if rows is None else len(rows.limit))

    @property
    def cost(self) -> Floats:
        """Cost of an evaluation with the prices of rows, `[I, P]`."""
        return self.arrays.cost if self.rows is None else self.rows.priced(self.arrays.cost, self.row_price)

    def until(self, share: float) -> "Deadline":
        """Return a deadline at a share of the time left."""
        return Deadline(self.run, self.run.seconds + share * self.run.seconds_left)

    def offer(self, holders: Bools, phase: str) -> None:
        """Offer holders with each call at the cheapest that keeps rows, and price rows as these calls make them."""
        if not holders_are_feasible(self.arrays, holders):
            self.run.note(phase)
            return
        service = serve(self.arrays, self.rows, holders)
        self.row_price = 0.5 * (self.row_price + service.price) if service.place is None else service.price
        if service.place is None:
            self.run.note(f"{phase}, rows broken")
            return
        serving = serve_whole(service.place)
        self.run.offer(Incumbent(holders, serving, objective_of(self.arrays, holders, serving)), phase)


class Deadline:
    """Says whether there is time left; asking modifies nothing."""

    def __init__(self, run: Run, at_s: float) -> None:
        self._run, self._at_s = run, at_s

    def __call__(self) -> bool:
        """Whether to go on."""
        return self._run.seconds < self._at_s and not self._run.is_over


def solve_regions(
    arrays: PlacementArrays,
    settings: Settings | None = None,
    *,
    rows: SparseRows | None = None,
    start: Bools | None = None,
) -> Outcome:
    """Place experts on many nodes; `start` `[K, P]` is a placement to begin from, ignored where it fits not.

    Parameters
    ----------
    arrays
        Without heaviest nodes, and without a limit of new copies.
    rows
        Load and link rows, in place of those of `arrays`.

    Does not modify its arguments. The outcome is deterministic for a seed unless the time limit cuts in. With rows,
    every call of the incumbent is whole; the bound holds for calls that are split, too.
    """
    if arrays.makespan is not None or (arrays.new_copies is not None and arrays.new_copies.limit is not None):
        raise ValueError("the solver by regions knows neither heaviest nodes nor a limit of new copies")
    run = Run(arrays, settings or Settings())
    if num_domains(arrays, (arrays.slots > 0)[None])[0] < max(arrays.required, 1):
        run.prove(np.inf, "too few failure domains have room")
        return run.outcome(Stop.INFEASIBLE, np.zeros(arrays.num_places))
    rows = sparse_rows(arrays) if rows is None else rows
    with workers(run.settings.threads) as pool:
        return _solve(Search(replace(arrays, rows=None), rows, run, pool.map if pool else map), start)


def _solve(search: Search, start: Bools | None) -> Outcome:
    run, arrays = search.run, search.arrays
    if start is not None:
        search.offer(start, "current placement")
    holders, prices = _between(search)
    begin = place_within(arrays, search.regions, holders, search.rng)
    kept = run.incumbent.holders if run.incumbent is not None else None
    standing = _polished(search, begin, FIRST_SHARE, "first placement")
    if kept is not None:
        _polished(search, kept, FIRST_SHARE, "current placement, polished")
    for _ in range(ROW_ROUNDS):
        if not search.row_price.any() or run.is_over:
            break
        standing = _polished(search, standing.holders, 0.1, "placement at prices of rows")
    prices = _prove(search, spread(prices, search.regions.of_ingress), standing.value)
    if search.row_price.any():
        prices = _prove(search, prices, standing.value, with_rows=True)
    _polished(search, _taken(search, prices), 0.5, "placement at prices")
    if not run.is_over and run.incumbent is not None:
        _polished(search, run.incumbent.holders, 1.0, "last polish")
    price = Ascent(arrays, search.cost, search.map).memory_price(prices) / arrays.expert_bytes
    return run.outcome(run.stop, price)


def _between(search: Search) -> tuple[Bools, Prices]:
    """Which regions hold each expert, `[K, regions]`, and what each region pays."""
    coarse = between_regions(search.arrays, search.regions)
    deadline = search.until(COARSE_SHARE)
    standing = Standing(coarse, coarse.cost, np.zeros((coarse.num_experts, coarse.num_places), dtype=np.bool_))
    exchange(standing, search.rng, keep_going=deadline)
    polish(standing, np.zeros(coarse.num_places, dtype=np.int64), search.rng, keep_going=deadline)
    ascent = Ascent(coarse, coarse.cost)
    prices = ascent.climb(ascent.free, standing.value, step=FIRST_STEP, keep_going=lambda *_: deadline())
    search.run.note(f"{search.regions.count} regions")
    return standing.holders, prices


def _polished(search: Search, holders: Bools, share: float, phase: str) -> Standing:
    standing = Standing(search.arrays, search.cost, holders, search.map)
    polish(standing, search.regions.of_place, search.rng, keep_going=search.until(share))
    search.offer(standing.holders, phase)
    return standing


def _taken(search: Search, prices: Prices) -> Bools:
    """Holders at these prices, `[K, P]`, the fastest tier where a node has several."""
    holders = Ascent(search.arrays, search.cost, search.map).chosen(prices)
    for node in np.flatnonzero(np.bincount(search.arrays.node_of_place) > 1):
        places = np.flatnonzero(search.arrays.node_of_place == node)
        holders[:, places] &= holders[:, places].cumsum(axis=1) == 1
    return holders


def _prove(search: Search, prices: Prices, value: float, *, with_rows: bool = False) -> Prices:
    """Raise prices, and with them the bound; return the best. Without prices of rows, rows are left out."""
    run, deadline = search.run, search.until(PRICE_SHARE)
    paid_rows = float(search.rows.limit @ search.row_price) if with_rows and search.rows is not None else 0.0
    cost = search.cost if with_rows else search.arrays.cost
    target = value if run.incumbent is None else run.incumbent.objective + paid_rows

    def keep_going(_: Prices, proved: float | None) -> bool:
        if proved is not None:
            run.prove(proved - paid_rows, "prices")
        return deadline()

    return Ascent(search.arrays, cost, search.map).climb(prices, target, step=NEXT_STEP, keep_going=keep_going)
