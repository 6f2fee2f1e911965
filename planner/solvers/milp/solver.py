"""Builds the PuLP model, runs a backend and reads its answer back as a Result."""

import time
from collections.abc import Callable
from dataclasses import replace

from planner.objective import ObjectiveName
from planner.problem import Problem
from planner.solvers.base import Report, Result, SolveLimits, SolveStatus, with_status
from planner.solvers.milp.backends import Answer, run_cbc, run_highs
from planner.solvers.milp.model import Model, build_model
from planner.solvers.routing import routed_cost
from planner.solvers.terms import exact_terms

Backend = Callable[[Model, SolveLimits, Report], Answer]


def solve_highs(problem: Problem, *, objective: ObjectiveName, limits: SolveLimits, report: Report) -> Result:
    """Solve with HiGHS; for paths and placement together where the trunk may move."""
    if problem.moves:
        from planner.solvers.milp.joint import solve_joint

        return solve_joint(problem, objective=objective, limits=limits, report=report)
    return _solve("milp", run_highs, problem, objective=objective, limits=limits, report=report)


def solve_cbc(problem: Problem, *, objective: ObjectiveName, limits: SolveLimits, report: Report) -> Result:
    """Solve with CBC."""
    return _solve("milp:cbc", run_cbc, problem, objective=objective, limits=limits, report=report)


def _solve(
    name: str, backend: Backend, problem: Problem, *, objective: ObjectiveName, limits: SolveLimits, report: Report
) -> Result:
    start = time.monotonic()
    model = build_model(problem, exact_terms(problem, objective), objective)
    left = max(limits.time_s - (time.monotonic() - start), 0.1)
    answer = backend(model, replace(limits, time_s=left), report)
    placed = model.placement() if answer.has_placement else None
    result = Result(
        solver=name,
        status=SolveStatus.INFEASIBLE if answer.infeasible else SolveStatus.UNKNOWN,
        stop_reason=answer.stop_reason,
        seconds=time.monotonic() - start,
        placed=placed,
        objective=None if placed is None else routed_cost(problem, placed, objective),
        bound=None if answer.bound is None else answer.bound / model.scale,
        detail=answer.detail,
    )
    return with_status(result, limits.gap)
