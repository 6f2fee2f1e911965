"""HiGHS models from triplets.

Decides only how rows are handed over. Must not know what they mean.
"""

import highspy
import numpy as np
import numpy.typing as npt

from planner.solvers.decomposition.arrays import Floats

INF = highspy.kHighsInf
Index = npt.NDArray[np.integer]


def new_model() -> highspy.Highs:
    """Return an empty, silent model that runs on one thread: HiGHS shares one pool between all models of a process."""
    model = highspy.Highs()
    model.setOptionValue("threads", 1)
    model.setOptionValue("output_flag", False)
    return model


def add_columns(model: highspy.Highs, cost: Floats, low: Floats, high: Floats) -> None:
    """Add variables `low ≤ x ≤ high` with a cost each, all `[n]`. Modifies the model."""
    none = np.zeros(0, dtype=np.int32)
    model.addCols(len(cost), cost, low, high, 0, none, none, np.zeros(0))


def add_rows(model: highspy.Highs, low: Floats, high: Floats, entries: tuple[Index, Index, Floats]) -> None:
    """Add rows `low ≤ A x ≤ high`, both `[n]`, A as (row, column, value) of its nonzeros. Modifies the model."""
    row, column, value = entries
    order = np.argsort(row, kind="stable")
    start = np.searchsorted(row[order], np.arange(len(low))).astype(np.int32)
    model.addRows(len(low), low, high, len(row), start, column[order].astype(np.int32), value[order])


def set_binary(model: highspy.Highs, count: int) -> None:
    """Make the first `count` variables integer. Modifies the model."""
    kinds = np.full(count, int(highspy.HighsVarType.kInteger), dtype=np.uint8)
    model.changeColsIntegrality(count, np.arange(count, dtype=np.int32), kinds)


def join(*entries: tuple[Index, Index, Floats]) -> tuple[Index, Index, Floats]:
    """Join triplets of the same rows."""
    row, column, value = (np.concatenate(part) for part in zip(*entries, strict=True))
    return row, column, value
