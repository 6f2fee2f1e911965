"""The restricted model: choose one column per expert under every shared limit, by branch and bound.

Decides nothing but how columns become rows of a HiGHS model. Must not know where columns come from.
"""

from dataclasses import dataclass
from typing import Final

import highspy
import numpy as np

from planner.solvers.decomposition.arrays import Floats, Ints
from planner.solvers.decomposition.columns import Columns
from planner.solvers.decomposition.highs import INF, add_columns, add_rows, join, new_model, set_binary
from planner.solvers.decomposition.prices import Coupling

_GIVEN_UP: Final = 1e-6  # HiGHS's tolerance of an objective, in the model's unit
_LARGEST_COST: Final = 1e4  # of a variable, in the model's unit


@dataclass(frozen=True)
class ModelLimits:
    """When a restricted model stops: seconds, relative gap, or an objective (s) that is good enough."""

    seconds: float
    gap: float
    good_enough: float
    seed: int


@dataclass(frozen=True)
class ModelResult:
    """Answer of a restricted model.

    Parameters
    ----------
    values
        Value of each variable; None where no solution was found.
    bound
        No solution of this model costs less, s; inf where it is infeasible.
    is_solved
        Whether the model was solved to its gap, or proved infeasible.
    """

    values: Floats | None
    bound: float
    is_solved: bool


def choose_columns(
    coupling: Coupling, columns: Columns, excess_price: Floats, limits: ModelLimits
) -> tuple[Ints | None, ModelResult]:
    """Minimise own costs and heaviest nodes over one column per expert; return each expert's column `[K]`.

    Experts with one column are constants; the others (free) have a binary per column. Rows of load and links may be
    exceeded at `excess_price` `[R]`, because shares, which are found later, can mend a little excess.
    """
    counts = np.bincount(columns.expert, minlength=coupling.arrays.num_experts)
    position = np.flatnonzero(counts[columns.expert] > 1)
    fixed, free = columns.take(np.flatnonzero(counts[columns.expert] == 1)), columns.take(position)
    unit = coupling.unit
    result = run_model(_build(coupling, fixed, free, excess_price), limits, unit=unit)
    if result.values is None:
        return None, result
    best = np.lexsort((-result.values[: len(free)], free.expert))
    winners = best[np.flatnonzero(np.diff(free.expert[best], prepend=-1))]
    picked = columns.first.copy()
    picked[free.expert[winners]] = position[winners]
    return picked, result


def run_model(model: highspy.Highs, limits: ModelLimits, *, unit: float) -> ModelResult:
    """Solve a model whose costs are in units of `unit` seconds. Modifies the model.

    HiGHS gives up on improvements below 1e-6 in the unit of its objective, so that unit is made small, and what it may
    have given up is taken off the bound.
    """
    unit = _magnified(model, unit)
    for name, value in (
        ("time_limit", max(limits.seconds, 0.05)),
        ("mip_rel_gap", limits.gap),
        ("mip_abs_gap", 0.0),
        ("objective_target", limits.good_enough / unit),
        ("random_seed", limits.seed % (1 << 31)),
    ):
        model.setOptionValue(name, value)
    model.run()
    status, info = model.getModelStatus(), model.getInfo()
    if status == highspy.HighsModelStatus.kInfeasible:
        return ModelResult(None, np.inf, is_solved=True)
    bound = (_proved(model) - _GIVEN_UP) * unit
    if info.primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
        return ModelResult(None, bound, is_solved=False)
    solved = status == highspy.HighsModelStatus.kOptimal
    return ModelResult(np.asarray(model.getSolution().col_value), bound, is_solved=solved)


def _magnified(model: highspy.Highs, unit: float) -> float:
    """Multiply all costs so that the largest is `_LARGEST_COST`; returns the unit that they are in then."""
    lp = model.getLp()
    cost = np.array(lp.col_cost_)
    largest = float(np.abs(cost).max(initial=0.0))
    if largest == 0.0:
        return unit
    factor = _LARGEST_COST / largest
    model.changeColsCost(len(cost), np.arange(len(cost), dtype=np.int32), cost * factor)
    model.changeObjectiveOffset(lp.offset_ * factor)
    return unit / factor


def _proved(model: highspy.Highs) -> float:
    info = model.getInfo()
    if model.getLp().integrality_:
        return float(info.mip_dual_bound)
    solved = model.getModelStatus() == highspy.HighsModelStatus.kOptimal
    return float(info.objective_function_value) if solved else -np.inf


def _build(coupling: Coupling, fixed: Columns, free: Columns, excess_price: Floats) -> highspy.Highs:
    """Binaries z per free column, one height h ≥ 0 per layer where heaviest nodes cost, one excess e ≥ 0 per row."""
    count, makespan, unit = len(free), coupling.arrays.makespan, coupling.unit
    weight = np.zeros(0) if makespan is None else makespan.weight
    model = new_model()
    size = _row_sizes(coupling, free)
    cost = np.concatenate([free.own, weight, excess_price * size]) / unit
    high = np.full(len(cost), INF)
    high[:count] = 1.0
    add_columns(model, cost, np.zeros(len(cost)), high)
    model.changeObjectiveOffset(fixed.own.sum() / unit)
    if count:
        set_binary(model, count)
        _add_one_column_each(model, free)
    _add_shared_limits(model, coupling, fixed, free, size)
    if makespan is not None:
        _add_heaviest_nodes(model, coupling, fixed, free)
    return model


def _add_one_column_each(model: highspy.Highs, free: Columns) -> None:
    """Σ z = 1 over the columns of each free expert."""
    _, row = np.unique(free.expert, return_inverse=True)
    ones = np.ones(int(row[-1]) + 1)
    add_rows(model, ones, ones, (row, np.arange(len(free)), np.ones(len(free))))


def _row_sizes(coupling: Coupling, free: Columns) -> Floats:
    """Largest use of each load and link row by one column: the unit that the row is written in, `[R]`."""
    largest = free.use[:, coupling.rows].max(axis=0, initial=0.0)
    return np.where(largest > 0, largest, 1.0)


def _add_shared_limits(
    model: highspy.Highs, coupling: Coupling, fixed: Columns, free: Columns, row_size: Floats
) -> None:
    """Σ use · z − e ≤ limit − use of the fixed experts, for memory, new copies (both without e) and rows."""
    width, num_rows = coupling.heaviest.start, len(row_size)
    left = coupling.limit[:width] - fixed.use.sum(axis=0)
    size = np.ones(width)
    size[coupling.rows] = row_size
    column, row = np.nonzero(free.use)
    used = (row, column, (free.use / size)[column, row])
    excess = (
        np.arange(coupling.rows.start, width),
        model.getNumCol() - num_rows + np.arange(num_rows),
        -np.ones(num_rows),
    )
    add_rows(model, np.full(width, -INF), left / size, join(used, excess))


def _add_heaviest_nodes(model: highspy.Highs, coupling: Coupling, fixed: Columns, free: Columns) -> None:
    """Σ load · z − h ≤ − load of the fixed experts, for each layer and node."""
    arrays = coupling.arrays
    base = np.zeros((arrays.num_layers, arrays.num_nodes))
    np.add.at(base, arrays.layer_of_expert[fixed.expert], fixed.load)
    column, node = np.nonzero(free.load)
    row = arrays.layer_of_expert[free.expert[column]] * arrays.num_nodes + node
    every = np.arange(base.size)
    heights = (every, len(free) + every // arrays.num_nodes, -np.ones(base.size))
    entries = join((row, column, free.load[column, node]), heights)
    add_rows(model, np.full(base.size, -INF), -base.reshape(-1), entries)
