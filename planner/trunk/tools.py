"""What a search over trunks is given: how placements are made for a trunk that is decided.

Must not know solvers, nor the search.
"""

from collections.abc import Callable
from dataclasses import dataclass

from planner.assemble import Solved
from planner.problem import Bools, Problem
from planner.solvers.base import SolveLimits

Report = Callable[[float, float, float | None], None]  # seconds, objective, bound


@dataclass(frozen=True, eq=False)
class Tools:
    """How placements are made for a trunk that is decided; each raises a `PlannerError` where it finds none.

    Attributes
    ----------
    quick
        A heuristic by name; ``additive`` is the placement of least waits added up.
    improve
        A search of some seconds, from a placement where there is one.
    ask
        The solver that was asked for.
    keep
        A placement as it is, re-checked.
    """

    quick: Callable[[Problem, str], Solved]
    improve: Callable[[Problem, Bools | None, float], Solved]
    ask: Callable[[Problem, SolveLimits], Solved]
    keep: Callable[[Problem, Bools], Solved]
