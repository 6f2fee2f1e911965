"""Highest dual value over prices: cutting planes per group of experts, stabilised by a box around the best prices.

Decides the next prices to try. Must not know how experts answer them.
Flow: `propose` θ → the oracle answers → `learn` the answer → … until the model promises too little.

Notes
-----
Every choice of holders is a cut: φ_g(θ) ≤ own_g + use_g·θ, whichever prices it was found at. The model maximises
Σ_g t_g − limit·θ under all cuts within |θ − center| ≤ radius (boxstep method, Marsten, Hogan and Blankenship 1975).
"""

import highspy
import numpy as np

from planner.solvers.decomposition.arrays import Floats
from planner.solvers.decomposition.highs import INF, add_columns, add_rows, join, new_model
from planner.solvers.decomposition.prices import Choice, Coupling

SERIOUS = 0.1  # share of the promised gain that must come true before the box grows
KEEP_CUTS = 24  # passes for which a cut may stay without binding


class Bundle:
    """Cuts, the box and its centre. All methods modify it."""

    def __init__(self, coupling: Coupling, num_groups: int, start: Floats) -> None:
        self.coupling, self.num_groups = coupling, num_groups
        self.center, self.radius = start, 1.0
        self.value, self.promise = -np.inf, np.inf
        self._unit = coupling.unit  # objective seconds per unit of the model
        self._scale = coupling.scale
        self._idle = np.zeros(0, dtype=np.int64)  # passes since each cut bound
        self._model = new_model()
        self._model.setOptionValue("presolve", "off")
        self._add_columns()

    def learn(self, theta: Floats, value: float, choice: Choice) -> bool:
        """Take in the dual `value` at θ and the choice behind it; return whether θ is the new centre."""
        self._add_cuts(choice)
        gained, promised = value - self.value, self.promise - self.value
        if np.isinf(self.value):
            self.center, self.value = theta, value
            return True
        if gained > 0:
            self.center, self.value = theta, value
        if gained > SERIOUS * promised:
            self.radius = min(self.radius * (2.0 if gained > 0.5 * promised else 1.2), 16.0)
        elif gained <= 0:
            self.radius *= 0.6
        return gained > 0

    def restate(self, value: float) -> None:
        """Correct the dual value at the centre, once more holder sets are looked at; steps become small again."""
        self.value, self.radius = value, 0.05

    def propose(self) -> Floats:
        """Return the prices at which the model is highest within the box, and set `promise` to that height."""
        step = self.radius * np.maximum(self.center, self._scale)
        low = np.maximum(self.center - step, 0.0) / self._scale
        high = np.minimum(self.center + step, self.coupling.ceiling) / self._scale
        index = np.arange(self.coupling.size, dtype=np.int32)
        self._model.changeColsBounds(len(index), index, low, np.maximum(low, high))
        self._model.run()
        if self._model.getModelStatus() != highspy.HighsModelStatus.kOptimal:
            self._model.clearSolver()
            self._model.run()
        solution = self._model.getSolution()
        point = np.asarray(solution.col_value)
        self.promise = -self._model.getInfo().objective_function_value * self._unit
        self._age(np.abs(np.asarray(solution.row_dual)[self._first_cut :]) > 1e-9)
        return np.clip(point[: self.coupling.size] * self._scale, 0.0, self.coupling.ceiling)

    def _add_columns(self) -> None:
        """θ in units of its scale, then one height t_g per group; minimise limit·θ − Σ t_g."""
        coupling, size = self.coupling, self.coupling.size
        cost = np.concatenate([coupling.limit * self._scale / self._unit, -np.ones(self.num_groups)])
        low = np.concatenate([np.zeros(size), np.full(self.num_groups, -INF)])
        add_columns(self._model, cost, low, np.full(len(cost), INF))
        self._first_cut = 0
        if coupling.arrays.makespan is not None:
            self._add_weight_rows(coupling.arrays.makespan.weight)

    def _add_weight_rows(self, weight: Floats) -> None:
        """Prices of a layer's heaviest node add up to at most the layer's weight."""
        column = np.arange(self.coupling.heaviest.start, self.coupling.heaviest.stop)
        row = np.arange(len(column)) // self.coupling.arrays.num_nodes
        add_rows(self._model, np.full(len(weight), -INF), weight, (row, column, self._scale[column]))
        self._first_cut = len(weight)

    def _add_cuts(self, choice: Choice) -> None:
        """t_g − use_g·θ ≤ own_g."""
        group, price = np.nonzero(choice.use)
        used = (group, price, -(choice.use * self._scale / self._unit)[group, price])
        every = np.arange(self.num_groups)
        heights = (every, self.coupling.size + every, np.ones(self.num_groups))
        add_rows(self._model, np.full(self.num_groups, -INF), choice.own / self._unit, join(used, heights))
        self._idle = np.concatenate([self._idle, np.zeros(self.num_groups, dtype=np.int64)])

    def _age(self, binding: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> None:
        self._idle = np.where(binding, 0, self._idle + 1)
        stale = np.flatnonzero(self._idle > KEEP_CUTS)
        if len(stale) > 2 * self.num_groups:
            self._model.deleteRows(len(stale), (stale + self._first_cut).astype(np.int32))
            self._idle = np.delete(self._idle, stale)
