"""Who serves whom where the nearest holders would break load or link rows: every call whole, steered by prices.

Decides the prices of rows for given holders. Must not know how holders are found. Calls are many and small, so that
leaving each whole loses little against splitting it.
"""

from dataclasses import dataclass

import numpy as np

from planner.solvers.decomposition.arrays import Bools, Floats, PlacementArrays, Places
from planner.solvers.decomposition.evaluate import nearest_places
from planner.solvers.regions.rows import SparseRows, flow_of

ROUNDS = 60
STEP = 0.2  # of the mean cost of a call, where a row is `FULL` beyond its limit or more
FULL = 0.05
SHRINK = 0.95  # of the step, per round
HEADROOM = 0.02  # share of a limit that prices aim to leave free, as whole calls overshoot


@dataclass(frozen=True)
class Service:
    """Who serves whom, and at which prices of rows.

    Parameters
    ----------
    place
        `[I, K]`; None where none was found that keeps the rows.
    price
        `[R]`, seconds per unit of each row; where none was found, those of the least excess.
    """

    place: Places | None
    price: Floats


def serve(arrays: PlacementArrays, rows: SparseRows | None, holders: Bools) -> Service:
    """Return the cheapest service found that keeps the rows; `holders` `[K, P]` leave no expert without."""
    place = nearest_places(arrays, holders, arrays.cost[None])
    if rows is None:
        return Service(place, np.zeros(0))
    best, price, step = Service(None, np.zeros(len(rows.limit))), np.zeros(len(rows.limit)), STEP
    unit = float(arrays.cost.mean()) / np.maximum(rows.mean_use, 1e-300)
    aim = np.maximum(rows.limit * (1 - HEADROOM), 1e-300)
    least, cheapest = np.inf, np.inf
    for _ in range(ROUNDS):
        flow = flow_of(arrays, place.astype(np.int64))
        use, cost = rows.use(flow), float((flow * arrays.cost).sum())
        broken = rows.broken(use)
        if not broken.any():
            if cost < cheapest:
                best, cheapest = Service(place, price), cost
            if not price.any():
                break  # the nearest holders will do
        elif best.place is None and (excess := float((use / aim)[broken].sum())) < least:
            best, least = Service(None, price), excess
        price = np.maximum(price + step * unit * np.clip((use / aim - 1) / FULL, -1.0, 1.0), 0.0)
        step *= SHRINK
        place = nearest_places(arrays, holders, rows.priced(arrays.cost, price)[None])
    return best
