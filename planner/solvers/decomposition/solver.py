"""The decomposition behind the Protocol of all solvers.

Decides how a `Problem` becomes arrays and an outcome a `Result`. Must not know how either is solved.
"""

import time
from dataclasses import replace
from functools import partial

import numpy as np

from planner.objective import ObjectiveName
from planner.problem import Bools, Ints, Problem
from planner.solvers.base import Bound, Report, Result, SolveLimits, SolveStatus, StopReason, with_status
from planner.solvers.base import Incumbent as Placed
from planner.solvers.decomposition.arrays import (
    EvaluationRows,
    Incumbent,
    Makespan,
    Outcome,
    PlacementArrays,
    Progress,
    Settings,
    Stop,
)
from planner.solvers.decomposition.holder_sets import ENUMERABLE_SETS, count_sets
from planner.solvers.decomposition.solve import solve_arrays
from planner.solvers.regions.of_problem import arrays_without_rows, callers_of, problem_rows
from planner.solvers.regions.solve import solve_regions
from planner.solvers.terms import Terms, exact_terms

MOST_NODES = 24  # beyond, by regions
MOST_EXACT_NODES = 64  # up to which splitting calls between holders is tried at all


def solve_decomposition(problem: Problem, *, objective: ObjectiveName, limits: SolveLimits, report: Report) -> Result:
    """Solve with prices on memory, load and links; the bound holds for every placement."""
    begun = time.monotonic()
    settings = Settings(
        gap=limits.gap,
        time_limit_s=limits.time_s,
        seed=limits.seed,
        threads=0,
        on_progress=partial(_pass_on, _Told(), problem, report),
    )
    start = None if limits.start is None else limits.start.reshape(problem.num_places, -1).T
    outcome = _outcome(problem, objective, settings, start)
    incumbent = outcome.incumbent
    result = Result(
        solver="decomposition",
        status=SolveStatus.INFEASIBLE if outcome.stop is Stop.INFEASIBLE else SolveStatus.UNKNOWN,
        stop_reason=_STOPS[outcome.stop],
        seconds=time.monotonic() - begun,
        placed=None if incumbent is None else _placed(problem, incumbent.holders),
        objective=None if incumbent is None else incumbent.objective,
        bound=None if np.isinf(outcome.bound) else outcome.bound,
        slot_price=outcome.memory_price,
    )
    return with_status(result, limits.gap)


def _outcome(problem: Problem, objective: ObjectiveName, settings: Settings, start: Bools | None) -> Outcome:
    """Solve exactly where every expert's holder sets can be listed, by regions where they are too many."""
    if problem.num_nodes > MOST_NODES and not _is_balanced(problem, objective):
        arrays = arrays_without_rows(problem, objective)
        outcome = solve_regions(arrays, settings, rows=problem_rows(problem), start=start)
        if outcome.incumbent is not None or problem.num_nodes > MOST_EXACT_NODES:
            return outcome
        return _tried_again(problem, objective, settings, outcome)
    arrays = placement_arrays(problem, objective)
    if arrays.is_separable and count_sets(arrays) > ENUMERABLE_SETS:
        return solve_regions(arrays, settings, start=start)
    return solve_arrays(arrays, settings, start)


def _tried_again(problem: Problem, objective: ObjectiveName, settings: Settings, first: Outcome) -> Outcome:
    """Use the time left where load and links bind so tightly that calls must be split; keep the better bound."""
    left = settings.time_limit_s - (first.history[-1].seconds if first.history else 0.0)
    if first.stop is not Stop.EXHAUSTED or left <= 0:
        return first
    again = solve_arrays(placement_arrays(problem, objective), replace(settings, time_limit_s=left))
    return replace(again, bound=max(first.bound, again.bound))


def placement_arrays(problem: Problem, objective: ObjectiveName) -> PlacementArrays:
    """Flatten a problem: callers with demand, places, experts in order of layer, rows that may bind."""
    arrays, terms = arrays_without_rows(problem, objective), exact_terms(problem, objective)
    return replace(
        arrays,
        makespan=_makespan(problem) if _is_balanced(problem, objective) else None,
        rows=_rows(problem, terms, callers_of(problem)) if terms.coupled else None,
    )


def _is_balanced(problem: Problem, objective: ObjectiveName) -> bool:
    return objective == "additive-latency" and problem.balance > 0


def _makespan(problem: Problem) -> Makespan:
    return Makespan(np.full(problem.layers, problem.balance), problem.service_s)


def _rows(problem: Problem, terms: Terms, callers: Ints) -> EvaluationRows:
    """Rows that may bind: compute of nodes, then calls over links."""
    on_node = problem.place_node[None, :] == terms.load_nodes[:, None]
    load = np.repeat((on_node * terms.service_s)[:, None, :], len(callers), axis=1)
    weight = np.concatenate([load, terms.crossing[:, callers].astype(np.float64)])
    return EvaluationRows(weight, np.concatenate([terms.load_limit, terms.link_limit]))


def _placed(problem: Problem, holders: Bools) -> Bools:
    return np.ascontiguousarray(holders.T).reshape(problem.num_places, problem.layers, problem.experts)


class _Told:
    """What was last reported, so that only better is reported."""

    objective = np.inf
    bound = 0.0


def _pass_on(told: _Told, problem: Problem, report: Report, progress: Progress, incumbent: Incumbent | None) -> bool:
    """Report a better placement or bound. Modifies `told`."""
    if incumbent is not None and incumbent.objective < told.objective:
        told.objective = incumbent.objective
        report(Placed(_placed(problem, incumbent.holders), incumbent.objective))
    if told.bound < progress.bound < np.inf:
        told.bound = progress.bound
        report(Bound(progress.bound))
    return True


_STOPS = {
    Stop.GAP: StopReason.GAP,
    Stop.TIME: StopReason.TIME,
    Stop.INTERRUPTED: StopReason.INTERRUPTED,
    Stop.EXHAUSTED: StopReason.FINISHED,
    Stop.INFEASIBLE: StopReason.FINISHED,
}
