"""The latency solver behind the Protocol of all solvers.

Decides where it begins and what its outcome means as a `Result`. Must not know how it is solved. It begins with the
best of the placement it was given and the optimum of `additive-latency`, so it is never worse than either. Limits of
compute and links are kept by the placements, not looked at by the bound, which stays valid without them.
"""

import time
from dataclasses import replace
from typing import Final

import numpy as np

from planner.demand import activation_share
from planner.feasibility import violations as broken_by
from planner.objective import ObjectiveName, placement_cost
from planner.problem import Bools, Problem
from planner.solvers.base import (
    Bound,
    Incumbent,
    Report,
    Result,
    SolveLimits,
    SolveStatus,
    StopReason,
    ignore,
    with_status,
)
from planner.solvers.decomposition.solver import solve_decomposition
from planner.solvers.latency.adapter import instance_of, keeps_limits
from planner.solvers.latency.solve import Limits, Outcome, Progress, Schedule, solve_latency, violations
from planner.solvers.latency.splits import split_bound
from planner.solvers.latency.tail import Tail, shorten_tail
from planner.solvers.routing import route

_ADDITIVE_SHARE: Final = 0.2  # of the time, for a start
_MANY_PLACES: Final = 24  # above, the relaxation is too slow to prove much in the time there is
_SPLIT_SHARE: Final = 0.5  # of the time, for a bound there
_ADDITIVE_GAP: Final = 1e-3

_STOPS: Final = {
    "gap": StopReason.GAP,
    "time": StopReason.TIME,
    "interrupted": StopReason.INTERRUPTED,
    "finished": StopReason.FINISHED,
    "infeasible": StopReason.FINISHED,
}


def solve_by_events(
    problem: Problem,
    *,
    objective: ObjectiveName = "latency",
    limits: SolveLimits,
    report: Report,
    schedule: Schedule | None = None,
) -> Result:
    """Minimise the latency objective; `objective` says nothing else here."""
    begun = time.monotonic()
    share = replace(limits, time_s=_ADDITIVE_SHARE * limits.time_s, gap=_ADDITIVE_GAP)
    added_up = solve_decomposition(problem, objective="additive-latency", limits=share, report=ignore)
    if added_up.status is SolveStatus.INFEASIBLE:
        return replace(added_up, solver="latency")
    floor = _floor(problem, added_up.bound)
    report(Bound(floor))
    instance, keeps = instance_of(problem), keeps_limits(problem)
    starts = [limits.start, added_up.placed]
    if instance.num_places > _MANY_PLACES:
        time_s = _SPLIT_SHARE * limits.time_s
        proven, met = split_bound(problem, time_s=time_s, first=added_up.placed, seed=limits.seed)
        floor, starts = max(floor, proven), [*starts, *met]
        report(Bound(floor))
    best, value = None, None
    for placed in starts:
        cost = None if placed is None else _checked_cost(problem, placed, objective)
        if placed is not None and cost is not None and (value is None or cost < value):
            best, value = placed, cost
            report(Incumbent(placed, cost))
    warm = best if best is not None and not violations(instance, best) else None
    outcome = solve_latency(
        instance,
        warm_start=warm,
        limits=Limits(time_s=limits.time_s - (time.monotonic() - begun), gap=limits.gap, seed=limits.seed),
        schedule=schedule,
        report=_Teller(report),
        acceptable=keeps,
    )
    if outcome.objective is not None and (value is None or outcome.objective < value):
        best, value = outcome.placed, outcome.objective
    result = Result(
        solver="latency",
        status=SolveStatus.INFEASIBLE if outcome.stop_reason == "infeasible" else SolveStatus.UNKNOWN,
        stop_reason=_STOPS[outcome.stop_reason],
        seconds=time.monotonic() - begun,
        placed=best,
        objective=value,
        bound=max(outcome.bound, floor),
        detail=_detail(outcome, best),
        slot_price=outcome.slot_price,
    )
    return with_status(result, limits.gap)


def shortened(problem: Problem, result: Result, limits: SolveLimits) -> Result:
    """Return the result with the slowest tokens' wait shortened, within the limits, and its bound as it was.

    Its objective is that of the new placement, up to 2 % above the best that was found.
    """
    if result.placed is None:
        return result
    begun = time.monotonic()
    placed = shorten_tail(
        instance_of(problem),
        result.placed,
        Tail(share=limits.tail),
        time_s=limits.time_s,
        seed=limits.seed,
        acceptable=keeps_limits(problem),
    )
    cost = None if placed is result.placed else _checked_cost(problem, placed, "latency")
    seconds = result.seconds + time.monotonic() - begun
    name = f"{result.solver}, for the slowest {limits.tail:.4g} of tokens"
    if cost is None:
        return replace(result, solver=name, seconds=seconds)
    return with_status(replace(result, solver=name, seconds=seconds, placed=placed, objective=cost), limits.gap)


def _floor(problem: Problem, added_up: float | None) -> float:
    """Bound the wait by that of calls added up: the slowest of K calls takes no less than their mean.

    It holds where shares are those of the events. Seldom the best bound, but there at once and for any number of nodes.
    """
    counted = np.stack([activation_share(events, problem.experts) for events in problem.events])
    if added_up is None or problem.balance or not np.allclose(counted, problem.share, atol=1e-9):
        return 0.0
    return added_up / problem.top_k


def _checked_cost(problem: Problem, placed: Bools, objective: ObjectiveName) -> float | None:
    routing = route(problem, placed, objective)
    broken = routing is None or bool(broken_by(problem, placed, routing))
    return None if routing is None or broken else placement_cost(problem, routing, objective)


def _detail(outcome: Outcome, best: Bools | None) -> str:
    return "no placement within the limits of compute and links was met" if best is None and outcome.bound else ""


class _Teller:
    """Passes on what is better than before. Calls modify it."""

    def __init__(self, report: Report) -> None:
        self._report, self._value, self._bound = report, np.inf, 0.0

    def __call__(self, progress: Progress) -> None:
        if progress.placed is not None and progress.objective is not None and progress.objective < self._value:
            self._value = progress.objective
            self._report(Incumbent(progress.placed, progress.objective))
        if progress.bound > self._bound:
            self._bound = progress.bound
            self._report(Bound(progress.bound))
