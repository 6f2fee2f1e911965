"""What every place would save an expert's callers, who now pay a price of their own: the one sum that is large.

Decides nothing but in which order it is summed. Nothing of size experts × callers × places is ever held.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from planner.solvers.decomposition.arrays import Real

TILE = 64  # experts per call of a worker

Mapper = Callable[[Callable[[slice], None], Iterable[slice]], Iterator[None]]


def savings(demand: Real, paid: Real, cost: Real, mapper: Mapper = map) -> Real:
    """Return Σ_i demand[k, i] · max(0, paid[k, i] − cost[i, p]), `[K, P]`, in the precision of `demand`.

    Parameters
    ----------
    demand, paid
        `[K, I]`, evaluations per second; seconds that each caller pays per evaluation.
    cost
        `[I, P]`, seconds per evaluation.
    mapper
        ``map``, or that of a pool.
    """
    saved: npt.NDArray[Any] = np.empty((len(demand), cost.shape[1]), dtype=demand.dtype)

    def sum_tile(tile: slice) -> None:
        room: npt.NDArray[Any] = np.empty(cost.shape, dtype=demand.dtype)
        for asked, price, out in zip(demand[tile], paid[tile], saved[tile], strict=True):
            np.subtract(price[:, None], cost, out=room)
            np.maximum(room, 0, out=room)
            np.dot(asked, room, out=out)

    for _ in mapper(sum_tile, [slice(at, at + TILE) for at in range(0, len(demand), TILE)]):
        pass
    return saved
