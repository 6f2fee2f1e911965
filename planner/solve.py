"""Solves a problem from start to end: refuse what counting shows impossible, run a solver, re-check what it claims.

Decides whether a solver's answer is believed, and who decides where the trunk runs: strategies as they were published,
the joint model of `milp`, else a search that asks the solver for one trunk after another. Flow: `Problem` → solver (in
a child process, or here) → re-check by `feasibility` and `objective` → `Solved`.
"""

import logging
from dataclasses import replace
from typing import Final

from planner.assemble import Solved
from planner.child import Job, Standing, Watch, solve_in_child
from planner.departure import Departure
from planner.errors import BrokenPlacement, InfeasibleProblem, NoPlacementFound, PlannerError
from planner.feasibility import impossible, violations
from planner.objective import ObjectiveName, judge, nearest, path_cost, plan_cost
from planner.problem import Bools, Problem
from planner.solvers.base import Result, SolveLimits, SolveStatus, StopReason, ignore, with_status
from planner.solvers.choose import EXACT, PIPELINES, STRATEGIES, find_solver
from planner.solvers.events import UnsuitedSolver, refuse_large
from planner.solvers.milp.joint import is_tiny, refuse_large_joint
from planner.trunk.search import search_paths
from planner.trunk.tools import Tools
from planner.trunk.trials import Trial

logger = logging.getLogger(__name__)

STAND_IN: Final = "dancemoe"
_SEARCHED: Final = 0.5  # of the time, before the joint model where that is tiny
_QUICK_SHARE: Final = 0.02  # of the time, for the least waits added up on one of many trunks
_QUICK_GAP: Final = 1e-2
_SAME: Final = 1e-6  # relative difference between a solver's figures and ours that is rounding


def solve(
    problem: Problem,
    solver: str,
    *,
    objective: ObjectiveName = "latency",
    limits: SolveLimits | None = None,
    watch: Watch | None = None,
    in_process: bool = False,
    departure: Departure | None = None,
    stands_in: bool = True,
) -> Solved:
    """Find a placement and re-check it.

    Parameters
    ----------
    departure
        Where the trunk may move: what is in force, from which the result should be reached.
    stands_in
        Whether a solver that found nothing in time is told of, and a strategy's placement used.

    Raises
    ------
    InfeasibleProblem
        No placement keeps every constraint.
    NoPlacementFound
        Time was over before the first one.
    BrokenPlacement
        A strategy's placement breaks constraints.
    UnsuitedSolver
        An exact solver was asked for what its model cannot hold, or not at this size.
    """
    limits = limits or SolveLimits()
    if problem.moves and solver in STRATEGIES:
        problem = problem if solver in PIPELINES else problem.with_trunk(problem.stay_node)
        problem = replace(problem, moves=False)
    if problem.moves and solver != "milp":
        return _move(
            problem, solver, objective=objective, limits=limits, watch=watch, in_process=in_process, departure=departure
        )
    if solver not in PIPELINES and not problem.moves and (found := impossible(problem)):
        raise InfeasibleProblem(found)
    if solver == "cpsat" and problem.balance:
        raise UnsuitedSolver(
            "cpsat: the heaviest node of a layer is not in its model; use --solver milp or decomposition"
        )
    if problem.moves:
        refuse_large_joint(problem, objective)
    elif objective == "latency" and solver in EXACT:
        refuse_large(problem, solver)
    watch = _counting_paths(problem, objective, watch)
    if in_process or solver in STRATEGIES:
        result = find_solver(solver)(problem, objective=objective, limits=limits, report=ignore)
    else:
        result = solve_in_child(Job(problem, solver, objective, limits), watch)
    if (
        result.placed is None
        and result.status is SolveStatus.UNKNOWN
        and solver not in STRATEGIES
        and not problem.moves
        and stands_in
    ):
        result = _stand_in(problem, result, objective=objective, limits=limits)
    return recheck(problem, result, objective=objective, gap=limits.gap)


def _move(
    problem: Problem,
    solver: str,
    *,
    objective: ObjectiveName,
    limits: SolveLimits,
    watch: Watch | None,
    in_process: bool,
    departure: Departure | None,
) -> Solved:
    """Search paths and placement together, asking the solver for the placement of one trunk after another."""
    if objective == "latency" and solver in EXACT:
        refuse_large(problem, solver)

    def run(given: Problem, name: str, given_limits: SolveLimits) -> Solved:
        result = find_solver(name)(given, objective=objective, limits=given_limits, report=ignore)
        return recheck(given, result, objective=objective, gap=limits.gap)

    def quick(given: Problem, name: str) -> Solved:
        if name != "additive":
            return run(given, name, limits)
        short = replace(limits, time_s=_QUICK_SHARE * limits.time_s, gap=_QUICK_GAP, start=None)
        result = find_solver("decomposition")(given, objective="additive-latency", limits=short, report=ignore)
        return recheck(given, replace(result, bound=None), objective=objective, gap=limits.gap)

    def improve(given: Problem, start: Bools | None, time_s: float) -> Solved:
        return run(given, "auto", replace(limits, time_s=time_s, start=start, tail=0.0))

    def ask(given: Problem, given_limits: SolveLimits) -> Solved:
        return solve(given, solver, objective=objective, limits=given_limits, in_process=in_process, stands_in=False)

    def keep(given: Problem, placed: Bools) -> Solved:
        result = Result(
            solver="paths", status=SolveStatus.FEASIBLE, stop_reason=StopReason.FINISHED, seconds=0.0, placed=placed
        )
        return recheck(given, result, objective=objective, gap=limits.gap)

    def told(seconds: float, incumbent: float, bound: float | None) -> None:
        if watch is not None:
            watch(Standing(seconds, incumbent, bound))

    import_solvers()
    tools = Tools(quick=quick, improve=improve, ask=ask, keep=keep, departure=departure)
    if solver != "auto" or not _suits_joint(problem, objective):
        return search_paths(problem, tools, objective=objective, limits=limits, report=told)
    tiny = is_tiny(problem)
    half = replace(limits, time_s=_SEARCHED * limits.time_s)
    try:
        found = search_paths(problem, tools, objective=objective, limits=half if tiny else limits, report=told)
    except (InfeasibleProblem, NoPlacementFound) as nothing:
        return _joint(problem, half, nothing, in_process=in_process)
    return found if not tiny else _or_exact(problem, found, limits, tools, in_process=in_process)


def import_solvers() -> None:
    """Import what a search asks over and over, before its clock runs."""
    import planner.solvers.decomposition.solver
    import planner.solvers.latency.solver
    import planner.solvers.milp.solver
    import planner.solvers.routing  # noqa: F401


def _joint(problem: Problem, limits: SolveLimits, nothing: PlannerError, *, in_process: bool) -> Solved:
    """Let the joint model find the one way that a search missed, or prove that there is none."""
    try:
        return solve(problem, "milp", limits=limits, in_process=in_process)
    except NoPlacementFound:
        raise nothing from None


def _suits_joint(problem: Problem, objective: ObjectiveName) -> bool:
    """Whether paths and placement can be an exact model together."""
    try:
        refuse_large_joint(problem, objective)
    except UnsuitedSolver:
        return False
    return True


def _or_exact(problem: Problem, found: Solved, limits: SolveLimits, tools: Tools, *, in_process: bool) -> Solved:
    """Use the time left for the joint model; return the better paths and placement under the better bound."""
    left = limits.time_s - found.result.seconds
    if found.result.status is SolveStatus.OPTIMAL or left < 0.1 * limits.time_s or limits.tail:
        return found
    try:
        exact = solve(problem, "milp", limits=replace(limits, time_s=left, start=None), in_process=in_process)
    except NoPlacementFound:
        return found
    best = exact if _mean_s(exact) < _mean_s(found) * (1 - _SAME) and tools.reaches(exact) else found
    bounds = [one.result.bound for one in (exact, found) if one.result.bound is not None]
    result = replace(
        best.result,
        bound=max(bounds, default=None),
        seconds=found.result.seconds + exact.result.seconds,
        stop_reason=exact.result.stop_reason,
    )
    tried = Trial("joint model", exact.judgement.latency_s, _mean_s(exact))
    return replace(best, result=with_status(result, limits.gap), trials=(*found.trials, tried))


def _mean_s(solved: Solved) -> float:
    return solved.judgement.predicted_latency_s


def _counting_paths(problem: Problem, objective: ObjectiveName, watch: Watch | None) -> Watch | None:
    """Show what the plan will say, of which a solver knows the waits only."""
    if watch is None:
        return None
    paths = 0.0 if problem.moves else path_cost(problem, objective)

    def told(standing: Standing) -> None:
        with_paths = [None if value is None else value + paths for value in (standing.incumbent, standing.bound)]
        watch(Standing(standing.seconds, *with_paths))

    return told


def _stand_in(problem: Problem, result: Result, *, objective: ObjectiveName, limits: SolveLimits) -> Result:
    """Return DanceMoE's placement for a solver that found none in time, with the bound that it did prove."""
    quick = find_solver(STAND_IN)(problem, objective=objective, limits=limits, report=ignore)
    if quick.placed is None or violations(problem, quick.placed, nearest(problem, quick.placed, objective)):
        return result
    why = result.detail or result.stop_reason.value
    logger.warning("%s found no placement in %.1f s (%s); %s's is used", result.solver, result.seconds, why, STAND_IN)
    return replace(quick, bound=result.bound, stop_reason=result.stop_reason, seconds=result.seconds)


def recheck(problem: Problem, result: Result, *, objective: ObjectiveName, gap: float) -> Solved:
    """Hold a result against feasibility and objective code that no solver shares; raises as `solve` does."""
    from planner.solvers.routing import route

    moves = problem.moves  # then the solver has counted what paths cost
    if result.trunk_node is not None:
        problem = replace(problem.with_trunk(result.trunk_node), moves=False)
    if result.status is SolveStatus.INFEASIBLE:
        from planner.solvers.milp.explain import explain

        raise InfeasibleProblem(explain(problem))
    placed = result.placed
    if placed is None:
        raise NoPlacementFound(
            f"{result.solver} found no placement in {result.seconds:.1f} s "
            f"({result.detail or result.stop_reason.value}); raise --time-limit or try --solver dancemoe"
        )
    routing = route(problem, placed, objective)
    broken = violations(problem, placed, routing or nearest(problem, placed, objective))
    if broken or routing is None:
        raise BrokenPlacement(result.solver, broken)
    value = plan_cost(problem, routing, objective)
    if result.bound is not None and not moves:
        result = replace(result, bound=result.bound + path_cost(problem, objective))
    if result.bound is not None and value < result.bound * (1 - _SAME):
        logger.warning("%s claims bound %g above our objective %g; dropped", result.solver, result.bound, value)
        result = replace(result, bound=None)
    checked = with_status(replace(result, objective=value), gap)
    return Solved(problem, checked, placed, routing, judge(problem, routing), objective, gap)
