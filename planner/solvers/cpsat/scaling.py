"""Integers for CP-SAT, always rounded to the side that keeps its bound and its proofs true.

Costs are rounded down, so that the integer optimum is below the real one. Calls that compete for compute or links
are counted in parts of 1 / PARTS, demand rounded down and limits up, so that whatever is feasible stays so and what
CP-SAT proves infeasible is. Whether a placement really keeps the limits is checked afterwards, see `solver`.
"""

from typing import Final

import numpy as np

from planner.problem import Floats, Ints

# or-tools #5293: a row whose Boolean coefficients add up past 2**31 may lose solutions. Rows over Booleans have
# coefficients 1 here; the objective is no row; parts are no Booleans, and the step at fault is off (see `solver`).
OBJECTIVE_SUM: Final = float(1 << 51)
ROW_SUM: Final = float(1 << 56)
PARTS: Final = 1 << 20


def integer_costs(weights: Floats, parts: int) -> tuple[Ints, float]:
    """Round costs ``[N, P, K]`` per part of a call down to integers; returns them and the factor between both."""
    total = float(weights.max(axis=1, initial=0.0).sum())
    scale = OBJECTIVE_SUM / parts / total if total > 0 else 1.0
    return np.floor(weights * scale).astype(np.int64), scale


def integer_row(coefficients: Floats, limit: float, parts: int) -> tuple[Ints, int]:
    """Scale a row ``sum c a <= limit``, a counted in `parts`, to integers that no feasible a breaks."""
    scale = ROW_SUM / parts / max(float(coefficients.sum()), limit, 1e-30)
    return np.floor(coefficients * scale).astype(np.int64), int(np.ceil(limit * scale * parts))
