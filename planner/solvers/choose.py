"""The solvers there are, by the name a user writes. Imports a solver's library only when it is asked for."""

from typing import Final

from planner.solvers.base import Solver

EXACT: Final = ("milp", "milp:cbc", "cpsat")
PIPELINES: Final = ("pipeline", "pipeline-speed")  # strategies that decide where the trunk runs, too
STRATEGIES: Final = ("uniform", "popularity", "eplb", "dancemoe", "moetuner", "ordermoe", *PIPELINES)
SOLVERS: Final = ("auto", "decomposition", *EXACT, *STRATEGIES)


def find_solver(name: str) -> Solver:
    """Return the solver of that name; `auto` decides by objective and size."""
    match name:
        case "auto":
            from planner.solvers.auto import solve_auto

            return solve_auto
        case "decomposition":
            from planner.solvers.auto import solve_decomposed

            return solve_decomposed
        case "milp":
            from planner.solvers.milp.solver import solve_highs

            return solve_highs
        case "milp:cbc":
            from planner.solvers.milp.solver import solve_cbc

            return solve_cbc
        case "cpsat":
            from planner.solvers.cpsat.solver import solve_cpsat

            return solve_cpsat
        case _:
            return _find_strategy(name)


def _find_strategy(name: str) -> Solver:
    match name:
        case "uniform":
            from planner.solvers.strategies.uniform import solve_uniform

            return solve_uniform
        case "popularity":
            from planner.solvers.strategies.popularity import solve_popularity

            return solve_popularity
        case "eplb":
            from planner.solvers.strategies.eplb import solve_eplb

            return solve_eplb
        case "dancemoe":
            from planner.solvers.strategies.dancemoe import solve_dancemoe

            return solve_dancemoe
        case _:
            return _find_other(name)


def _find_other(name: str) -> Solver:
    match name:
        case "moetuner":
            from planner.solvers.strategies.moetuner import solve_moetuner

            return solve_moetuner
        case "ordermoe":
            from planner.solvers.strategies.ordermoe import solve_ordermoe

            return solve_ordermoe
        case "pipeline":
            from planner.solvers.strategies.pipeline import solve_pipeline

            return solve_pipeline
        case "pipeline-speed":
            from planner.solvers.strategies.pipeline import solve_pipeline_speed

            return solve_pipeline_speed
        case "packed":
            from planner.solvers.strategies.packed import solve_packed

            return solve_packed
    raise ValueError(f"there is no solver {name!r}; there are {', '.join(SOLVERS)}")
