"""What a search over trunks is given: how placements are made for a trunk that is decided.

Must not know solvers, nor the search.
"""

from collections.abc import Callable
from dataclasses import dataclass

from planner.assemble import Solved
from planner.departure import Departure
from planner.problem import Bools, Ints, Problem
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
    departure
        What is in force; None where nothing is, or does not matter.
    """

    quick: Callable[[Problem, str], Solved]
    improve: Callable[[Problem, Bools | None, float], Solved]
    ask: Callable[[Problem, SolveLimits], Solved]
    keep: Callable[[Problem, Bools], Solved]
    departure: Departure | None = None

    def allows(self, trunk_node: Ints) -> bool:
        """Whether a trunk ``[I, L]`` may be come to from what is in force; quick."""
        return self.departure is None or self.departure.allows(trunk_node)

    def reaches(self, solved: Solved) -> bool:
        """Whether an arrangement can be come to from what is in force."""
        return self.departure is None or self.departure.reaches(solved)
