"""Columns: complete placements of one layer, with their wait and the slots they use.

Decides which columns are worth keeping. Must not know how they are made or chosen.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np

from planner.solvers.latency.holders import Repair
from planner.solvers.latency.instance import Bools, Floats, Ints
from planner.solvers.latency.paths import Path, relink
from planner.solvers.latency.patterns import Layer

_FROM_SAMPLE: Final = 6  # columns of a path that was found on a sample of the events
MAX_COLUMNS: Final = 6000  # of one layer; the best at the current prices stay


@dataclass(frozen=True, eq=False)
class Front:
    """Columns of one layer that may be chosen: wait ``[C]``, slots used ``[C, P]``, their place in the pool ``[C]``."""

    wait: Floats
    used: Ints
    index: Ints


class LayerPool:
    """Columns of one layer. `add`, `add_path` and `trim` modify it. `guide` is the layer, or a sample of its events."""

    def __init__(self, layer: Layer, guide: Layer, repair: Repair, capacity: Ints) -> None:
        self.layer, self.guide, self.repair, self.capacity = layer, guide, repair, capacity
        self._wait: list[float] = []
        self._used: list[Ints] = []
        self._hold: list[bytes] = []
        self._seen: dict[bytes, int] = {}

    def __len__(self) -> int:
        return len(self._wait)

    def add(self, hold: Bools, wait: float | None = None) -> int:
        """Keep a column, once; return its index."""
        key = np.packbits(hold).tobytes()
        if key not in self._seen:
            self._seen[key] = len(self._wait)
            self._wait.append(self.layer.wait(hold) if wait is None else wait)
            self._used.append(hold.sum(axis=0))
            self._hold.append(key)
        return self._seen[key]

    def hold(self, index: int) -> Bools:
        """Placement of a column, bool ``[E, P]``."""
        shape = self.repair.allowed.shape
        bits = np.unpackbits(np.frombuffer(self._hold[index], dtype=np.uint8), count=shape[0] * shape[1])
        return bits.astype(bool).reshape(shape)

    def wait(self, index: int) -> float:
        """Seconds waited per second under a column."""
        return self._wait[index]

    def add_path(self, path: Path, slack: float) -> None:
        """Keep what lies on a path within `slack` of its best and fits into every place alone.

        A path found on a sample of the events gives a few columns only, as each is evaluated on all events.
        """
        good = path.total <= path.total.min() + slack
        exact = self.guide is self.layer
        if not exact:
            near = np.flatnonzero(good)
            few = np.append(near[:: max(1, len(near) // _FROM_SAMPLE)], path.total.argmin())
            good = np.isin(np.arange(len(good)), few)
        for position, hold in path.walk():
            if good[position] and (hold.sum(axis=0) <= self.capacity).all():
                self.add(hold, float(path.wait[position]) if exact else None)

    def front(self, price: Floats, slack: float, keep: int) -> Front:
        """Columns within `slack` of the best at these prices, the cheapest for each use of slots; `keep` stays."""
        wait, used = np.array(self._wait), np.array(self._used)
        reduced = wait + used @ price
        near = np.flatnonzero(reduced <= reduced.min() + slack)
        near = near[np.lexsort((wait[near], *used[near].T))]
        _, first = np.unique(used[near], axis=0, return_index=True)
        chosen = near[first]
        chosen = chosen[np.argsort(reduced[chosen], kind="stable")]
        if keep not in chosen:
            chosen = np.append(chosen, keep)
        return Front(wait[chosen], used[chosen], chosen)

    def trim(self, price: Floats, keep: int) -> int:
        """Forget the columns that are dearest at these prices; return the new index of `keep`."""
        if len(self) > MAX_COLUMNS:
            reduced = np.array(self._wait) + np.array(self._used) @ price
            reduced[keep] = -np.inf
            stay = np.argsort(reduced, kind="stable")[: MAX_COLUMNS // 2]
            self._wait = [self._wait[i] for i in stay]
            self._used = [self._used[i] for i in stay]
            self._hold = [self._hold[i] for i in stay]
            self._seen = {key: index for index, key in enumerate(self._hold)}
            return 0
        return keep


def sweep(
    pool: LayerPool,
    hold: Bools,
    price: Floats,
    places: list[int],
    slack: float,
    *,
    should_stop: Callable[[], bool] = lambda: False,
) -> Bools:
    """Decide one place of a layer after another anew, the others as they are; return the placement it ends in.

    Each place first holds the whole layer and then drops one expert after another; every placement on the way becomes
    a column, the best at these prices is where the next place starts from.
    """
    for place in places:
        if should_stop():
            break
        full = pool.repair.with_place(hold, place)
        path = relink(pool.guide, full, pool.repair.without_place(full, place, price), price)
        pool.add_path(path, slack)
        hold = path.at(int(path.total.argmin()))
    return hold
