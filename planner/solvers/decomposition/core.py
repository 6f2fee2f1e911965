"""The restricted model: choose one column per expert under every shared limit, by branch and bound.

Decides nothing but how columns become rows of a HiGHS model. Must not know where columns come from.
"""

from dataclasses import dataclass

import highspy
import numpy as np

from planner.solvers.decomposition.arrays import Floats, Ints
from planner.solvers.decomposition.columns import Columns
from planner.solvers.decomposition.prices import Coupling


@dataclass(frozen=True)
class CoreResult:
    """Answer of the restricted model.

    Parameters
    ----------
    picked
        `[K]`, index of each expert's column; None where none was found.
    bound
        No choice among these columns costs less, s.
    is_solved
        Whether the model was solved to its gap.
    """

    picked: Ints | None
    bound: float
    is_solved: bool


@dataclass(frozen=True)
class CoreLimits:
    """When to stop: seconds, relative gap, or an objective (s) that is good enough."""

    seconds: float
    gap: float
    good_enough: float
    threads: int
    seed: int


def choose_columns(coupling: Coupling, columns: Columns, limits: CoreLimits) -> CoreResult:
    """Minimise own costs and heaviest nodes over one column per expert.

    Experts with one column are constants; the others (free) have a binary per column.
    """
    counts = np.bincount(columns.expert, minlength=coupling.arrays.num_experts)
    is_free = counts[columns.expert] > 1
    fixed, free = columns.take(np.flatnonzero(~is_free)), columns.take(np.flatnonzero(is_free))
    picked = columns.first.copy()
    unit = float(coupling.scale[coupling.memory].max())
    builder = _Core(coupling, fixed, free, unit)
    builder.set_limits(limits)
    values, bound, solved = builder.solve()
    if values is None:
        return CoreResult(None, bound, solved)
    position = np.flatnonzero(is_free)
    best = np.lexsort((-values, free.expert))
    winners = best[np.flatnonzero(np.diff(free.expert[best], prepend=-1))]
    picked[free.expert[winners]] = position[winners]
    return CoreResult(picked, bound, solved)


class _Core:
    """One HiGHS model, in units of `unit` seconds."""

    def __init__(self, coupling: Coupling, fixed: Columns, free: Columns, unit: float) -> None:
        self._coupling, self._fixed, self._free, self._unit = coupling, fixed, free, unit
        self._model = highspy.Highs()
        self._model.setOptionValue("output_flag", False)
        self._add_variables()
        self._add_one_column_each()
        self._add_shared_limits()
        self._add_heaviest_nodes()

    def set_limits(self, limits: CoreLimits) -> None:
        offset = self._fixed.own.sum() / self._unit
        self._model.changeObjectiveOffset(offset)
        for name, value in (
            ("time_limit", max(limits.seconds, 0.05)),
            ("mip_rel_gap", limits.gap),
            ("objective_target", limits.good_enough / self._unit),
            ("threads", limits.threads),
            ("random_seed", limits.seed % (1 << 31)),
        ):
            self._model.setOptionValue(name, value)

    def solve(self) -> tuple[Floats | None, float, bool]:
        """Return the values of the free columns (None without a solution), the bound in s, and whether it is solved."""
        self._model.run()
        status, info = self._model.getModelStatus(), self._model.getInfo()
        if status == highspy.HighsModelStatus.kInfeasible:
            return None, np.inf, True
        has_binaries = len(self._free) > 0
        bound = (info.mip_dual_bound if has_binaries else info.objective_function_value) * self._unit
        if info.primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
            return None, bound, False
        values = np.asarray(self._model.getSolution().col_value)[: len(self._free)]
        return values, bound, status == highspy.HighsModelStatus.kOptimal

    def _add_variables(self) -> None:
        """Binaries z per free column; where heaviest nodes cost, one height h ≥ 0 per layer."""
        count, makespan = len(self._free), self._coupling.arrays.makespan
        weight = np.zeros(0) if makespan is None else makespan.weight
        cost = np.concatenate([self._free.own, weight]) / self._unit
        high = np.concatenate([np.ones(count), np.full(len(weight), highspy.kHighsInf)])
        none = np.zeros(0, dtype=np.int32)
        self._model.addCols(len(cost), cost, np.zeros(len(cost)), high, 0, none, none, np.zeros(0))
        kinds = np.full(count, int(highspy.HighsVarType.kInteger), dtype=np.uint8)
        self._model.changeColsIntegrality(count, np.arange(count, dtype=np.int32), kinds)

    def _add_one_column_each(self) -> None:
        """Σ z = 1 over the columns of each free expert."""
        count = len(self._free)
        start = np.flatnonzero(np.diff(self._free.expert, prepend=-1))
        ones = np.ones(len(start))
        index = np.arange(count, dtype=np.int32)
        self._model.addRows(len(start), ones, ones, count, start.astype(np.int32), index, np.ones(count))

    def _add_shared_limits(self) -> None:
        """Σ use · z ≤ limit − use of the fixed experts, for memory, new copies and rows."""
        width = self._coupling.heaviest.start
        left = self._coupling.limit[:width] - self._fixed.use.sum(axis=0)
        scale = np.maximum(np.abs(self._free.use).max(axis=0, initial=0.0), 1e-30)
        scale[self._coupling.memory] = 1.0
        scale[self._coupling.copies] = 1.0
        row, column = np.nonzero(self._free.use.T)
        start = np.searchsorted(row, np.arange(width)).astype(np.int32)
        value = (self._free.use / scale)[column, row]
        floor = np.full(width, -highspy.kHighsInf)
        self._model.addRows(width, floor, left / scale, len(row), start, column.astype(np.int32), value)

    def _add_heaviest_nodes(self) -> None:
        """Σ load · z − h ≤ − load of the fixed experts, for each layer and node."""
        arrays = self._coupling.arrays
        if arrays.makespan is None:
            return
        base = np.zeros((arrays.num_layers, arrays.num_nodes))
        np.add.at(base, arrays.layer_of_expert[self._fixed.expert], self._fixed.load)
        column, node = np.nonzero(self._free.load)
        row = arrays.layer_of_expert[self._free.expert[column]] * arrays.num_nodes + node
        count = base.size
        height = len(self._free) + np.arange(count) // arrays.num_nodes
        order = np.argsort(np.concatenate([row, np.arange(count)]), kind="stable")
        index = np.concatenate([column, height])[order].astype(np.int32)
        value = np.concatenate([self._free.load[column, node], -np.ones(count)])[order]
        start = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=count) + 1)[:-1]]).astype(np.int32)
        floor = np.full(count, -highspy.kHighsInf)
        self._model.addRows(count, floor, -base.reshape(-1), len(index), start, index, value)
