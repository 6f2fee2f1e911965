"""Which solver `auto` and `decomposition` mean, by objective and size.

Decides from counts alone. Must not know how any of them works.
"""

import time
from dataclasses import replace
from typing import Final

from planner.objective import ObjectiveName
from planner.problem import Problem
from planner.solvers.base import Report, Result, SolveLimits, Solver, SolveStatus, with_status
from planner.solvers.events import event_patterns
from planner.solvers.terms import exact_terms

TINY_SHARES: Final = 3_000  # shares of calls up to which the exact model is as quick as any
TINY_ROWS: Final = 4_000  # rows of events up to which it takes seconds for the latency objective
TAIL_SHARE: Final = 0.5  # of the time, to shorten the slowest waits
EXACT_SHARE: Final = 0.5  # of the time, before the latency solver takes over


def solve_decomposed(problem: Problem, *, objective: ObjectiveName, limits: SolveLimits, report: Report) -> Result:
    """Solve by prices: on experts where waits add up, on whole layers where a layer waits for its slowest call."""
    return _then_for_the_slowest(_decomposed, problem, objective=objective, limits=limits, report=report)


def solve_auto(problem: Problem, *, objective: ObjectiveName, limits: SolveLimits, report: Report) -> Result:
    """Solve by the exact model where that is tiny, else decomposed; for latency decomposed where time was too short."""
    return _then_for_the_slowest(_auto, problem, objective=objective, limits=limits, report=report)


def _then_for_the_slowest(
    solver: Solver, problem: Problem, *, objective: ObjectiveName, limits: SolveLimits, report: Report
) -> Result:
    """Solve, and where `tail` asks for it shorten the slowest waits in the time that is left."""
    if not limits.tail or objective != "latency":
        return solver(problem, objective=objective, limits=limits, report=report)
    begun = time.monotonic()
    from planner.solvers.latency.solver import shortened

    part = replace(limits, time_s=(1 - TAIL_SHARE) * limits.time_s)
    found = solver(problem, objective=objective, limits=part, report=report)
    left = 0.95 * limits.time_s - (time.monotonic() - begun)
    return shortened(problem, found, replace(limits, time_s=left))


def _decomposed(problem: Problem, *, objective: ObjectiveName, limits: SolveLimits, report: Report) -> Result:
    if objective == "latency":
        from planner.solvers.latency.solver import solve_by_events

        return solve_by_events(problem, objective=objective, limits=limits, report=report)
    from planner.solvers.decomposition.solver import solve_decomposition

    return solve_decomposition(problem, objective=objective, limits=limits, report=report)


def _auto(problem: Problem, *, objective: ObjectiveName, limits: SolveLimits, report: Report) -> Result:
    if _num_shares(problem) > TINY_SHARES or (objective == "latency" and _num_rows(problem) > TINY_ROWS):
        return _decomposed(problem, objective=objective, limits=limits, report=report)
    share = EXACT_SHARE if objective == "latency" else 1.0
    exact = _exact(problem, objective=objective, limits=replace(limits, time_s=share * limits.time_s), report=report)
    left = limits.time_s - exact.seconds
    done = exact.status in {SolveStatus.OPTIMAL, SolveStatus.INFEASIBLE} or left < 0.2 * limits.time_s
    if done:
        return exact
    limits = replace(limits, time_s=left, start=limits.start if exact.placed is None else exact.placed)
    return _better(exact, _decomposed(problem, objective=objective, limits=limits, report=report), limits.gap)


def _exact(problem: Problem, *, objective: ObjectiveName, limits: SolveLimits, report: Report) -> Result:
    from planner.solvers.milp.solver import solve_highs

    return solve_highs(problem, objective=objective, limits=limits, report=report)


def _num_rows(problem: Problem) -> int:
    return event_patterns(problem).num_rows


def _num_shares(problem: Problem) -> int:
    return len(exact_terms(problem, "additive-latency").pairs()) * problem.num_places


def _better(first: Result, second: Result, gap: float) -> Result:
    """Return the better placement with the better bound."""
    if second.status is SolveStatus.INFEASIBLE:
        return second
    values = {id(result): result.objective for result in (first, second) if result.objective is not None}
    kept = first if values.get(id(first), float("inf")) <= values.get(id(second), float("inf")) else second
    bounds = [result.bound for result in (first, second) if result.bound is not None]
    seconds = first.seconds + second.seconds
    merged = replace(kept, bound=max(bounds, default=None), seconds=seconds, stop_reason=second.stop_reason)
    return with_status(replace(merged, solver=f"{first.solver}, {second.solver}"), gap)
