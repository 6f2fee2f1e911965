"""Builds the CP-SAT model, runs it and reads its answer back as a Result."""

import time

import numpy as np
from ortools.sat.python import cp_model

from planner.objective import ObjectiveName
from planner.problem import Bools, Problem
from planner.solvers.base import Bound, Incumbent, Report, Result, SolveLimits, SolveStatus, StopReason, with_status
from planner.solvers.cpsat.model import Model, build_model, forbid_subsets
from planner.solvers.routing import routed_cost
from planner.solvers.terms import exact_terms


def solve_cpsat(problem: Problem, *, objective: ObjectiveName, limits: SolveLimits, report: Report) -> Result:
    """Solve with CP-SAT.

    Where compute or links are short the model counts shares of calls in parts and leaves out what rounding loses, so
    its best placement may turn out to break a limit by a hair: that placement is ruled out and the search goes on.
    """
    start = time.monotonic()
    model = build_model(problem, exact_terms(problem, objective), objective)
    best: Bools | None = None
    value: float | None = None
    bound: float | None = None
    while True:
        solver = _engine(limits, max(limits.time_s - (time.monotonic() - start), 0.1))
        status = solver.solve(model.cp, _Listener(problem, objective, model, report))
        if status == cp_model.INFEASIBLE:
            break
        bound = max(bound or 0.0, solver.best_objective_bound / model.scale)
        report(Bound(bound))
        found = status in {cp_model.OPTIMAL, cp_model.FEASIBLE}
        placed = model.variables.placement(solver.value, model.shape) if found else None
        cost = None if placed is None else routed_cost(problem, placed, objective)
        if cost is not None and (value is None or cost < value):
            best, value = placed, cost
        out_of_time = time.monotonic() - start >= limits.time_s
        if status != cp_model.OPTIMAL or placed is None or cost is not None or out_of_time:
            break
        forbid_subsets(model, [np.flatnonzero(places).tolist() for places in placed.reshape(len(placed), -1).T])
    result = Result(
        solver="cpsat",
        status=SolveStatus.INFEASIBLE if status == cp_model.INFEASIBLE else SolveStatus.UNKNOWN,
        stop_reason=StopReason.FINISHED if status in {cp_model.OPTIMAL, cp_model.INFEASIBLE} else StopReason.TIME,
        seconds=time.monotonic() - start,
        placed=best,
        objective=value,
        bound=bound,
        detail=solver.status_name(status).lower(),
    )
    return with_status(result, limits.gap)


def _engine(limits: SolveLimits, time_s: float) -> cp_model.CpSolver:
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = time_s
    solver.parameters.relative_gap_limit = limits.gap / 2  # the rest is for what rounding costs
    solver.parameters.random_seed = limits.seed
    # Two to four workers share out strategies of which none proves much here; one with the whole linear relaxation
    # takes 0.1 s where two find no bound in a minute.
    solver.parameters.num_workers = 1
    solver.parameters.linearization_level = 2
    solver.parameters.presolve_inclusion_work_limit = 0  # or-tools #5293: this step overflows on large coefficients
    return solver


class _Listener(cp_model.CpSolverSolutionCallback):  # type: ignore[misc]  # untyped library
    """Reports every better placement."""

    def __init__(self, problem: Problem, objective: ObjectiveName, model: Model, report: Report) -> None:
        super().__init__()
        self._problem, self._objective, self._model, self._report = problem, objective, model, report

    def on_solution_callback(self) -> None:
        """Hand the placement over, and the bound that holds now."""
        model = self._model
        placed = model.variables.placement(self.value, model.shape)
        cost = routed_cost(self._problem, placed, self._objective)
        if cost is not None:
            self._report(Incumbent(placed, cost))
        self._report(Bound(self.best_objective_bound / model.scale))
