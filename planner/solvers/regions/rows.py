"""Load and link rows as a sparse matrix: a call crosses few links, however many there are.

Decides nothing but how rows are laid out. Must not know what they stand for. A flow is evaluations per second from
each ingress to each place, `[I, P]`.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse

from planner.solvers.decomposition.arrays import Bools, Floats, Ints, PlacementArrays

MARGIN = 1e-9  # relative; kept free, so that sums in another order keep the row too


@dataclass(frozen=True)
class SparseRows:
    """Limits on flows: Σ weight[r, i, p] flow[i, p] ≤ limit[r].

    Parameters
    ----------
    weight
        Sparse `[R, I · P]`, ≥ 0.
    limit
        `[R]`.
    """

    weight: Any  # scipy has no types
    limit: Floats

    @property
    def mean_use(self) -> Floats:
        """What an evaluation uses of each row where it uses it at all, on average, `[R]`."""
        total: Floats = np.asarray(self.weight.sum(axis=1)).ravel()
        return np.asarray(total / np.maximum(np.diff(self.weight.indptr), 1))

    def use(self, flow: Floats) -> Floats:
        """Use of each row, `[R]`."""
        return np.asarray(self.weight @ flow.ravel())

    def broken(self, use: Floats) -> Bools:
        """Whether each row is broken, `[R]`."""
        return np.asarray((use > 0) & (use > self.limit * (1 - MARGIN)))

    def priced(self, cost: Floats, price: Floats) -> Floats:
        """Cost of an evaluation with the prices `[R]` of what it uses, `[I, P]`."""
        extra: Floats = (self.weight.T @ price).reshape(cost.shape)
        return cost + extra


def sparse_rows(arrays: PlacementArrays) -> SparseRows | None:
    """Return the rows of a problem; None where it has none."""
    rows = arrays.rows
    if rows is None:
        return None
    return SparseRows(sparse.csr_matrix(rows.weight.reshape(len(rows.limit), -1)), rows.limit)


def flow_of(arrays: PlacementArrays, place: Ints) -> Floats:
    """Flow `[I, P]` where `place` `[I, K]` serves all of each ingress's demand."""
    ingresses, places = arrays.cost.shape
    cell = np.arange(ingresses)[:, None] * places + place
    total = np.bincount(cell.ravel(), weights=arrays.demand.ravel(), minlength=ingresses * places)
    return total.reshape(ingresses, places).astype(np.float64)
