"""The solvers there are, by the name a user writes. Imports a solver's library only when it is asked for."""

from typing import Final

from planner.solvers.base import Solver

EXACT: Final = ("milp", "milp:cbc", "cpsat")
STRATEGIES: Final = ("uniform", "dancemoe")
SOLVERS: Final = ("auto", *EXACT, *STRATEGIES)


def find_solver(name: str) -> Solver:
    """Return the solver of that name; `auto` is the one that is exact and quick at today's sizes."""
    match name:
        case "auto" | "milp":
            from planner.solvers.milp.solver import solve_highs

            return solve_highs
        case "milp:cbc":
            from planner.solvers.milp.solver import solve_cbc

            return solve_cbc
        case "cpsat":
            from planner.solvers.cpsat.solver import solve_cpsat

            return solve_cpsat
        case "uniform":
            from planner.solvers.strategies.uniform import solve_uniform

            return solve_uniform
        case "dancemoe":
            from planner.solvers.strategies.dancemoe import solve_dancemoe

            return solve_dancemoe
    raise ValueError(f"there is no solver {name!r}; there are {', '.join(SOLVERS)}")
