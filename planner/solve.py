"""Solves a problem from start to end: refuse what counting shows impossible, run a solver, re-check what it claims.

Decides which solver runs, where (in a child process of its own, or here), and how long it may. The child's incumbents
and bounds are streamed; when its time is over it is killed, and the last of them are the result.
Flow: `Problem` → solver → re-check by `feasibility` and `objective` → `Solved`.
"""

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Final

from planner.assemble import Solved
from planner.errors import BrokenPlacement, InfeasibleProblem, NoPlacementFound
from planner.feasibility import impossible, violations
from planner.objective import ObjectiveName, judge, placement_cost
from planner.problem import Problem
from planner.solvers.base import (
    Bound,
    Incumbent,
    Progress,
    Report,
    Result,
    SolveLimits,
    Solver,
    SolveStatus,
    StopReason,
    ignore,
    relative_gap,
    with_status,
)

logger = logging.getLogger(__name__)

EXACT: Final = ("milp", "milp:cbc", "cpsat")
STRATEGIES: Final = ("uniform", "dancemoe")
SOLVERS: Final = ("auto", *EXACT, *STRATEGIES)

_GRACE_S: Final = 1.0  # what a solver may take beyond its limit to hand over what it has
_SAME: Final = 1e-6  # relative difference between a solver's figures and ours that is rounding


def find_solver(name: str) -> Solver:
    """Import the solver of that name; `auto` is the one that is exact and quick at today's sizes."""
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


@dataclass(frozen=True)
class Standing:
    """How far a running solver has come: figures of the real objective, None where not known yet."""

    seconds: float
    incumbent: float | None
    bound: float | None

    @property
    def gap(self) -> float | None:
        """Relative distance between the two."""
        return relative_gap(self.incumbent, self.bound)


Watch = Callable[[Standing], None]


def solve(
    problem: Problem,
    solver: str,
    *,
    objective: ObjectiveName = "additive-latency",
    limits: SolveLimits | None = None,
    watch: Watch | None = None,
    in_process: bool = False,
) -> Solved:
    """Find a placement and re-check it.

    Raises
    ------
    InfeasibleProblem
        No placement keeps every constraint.
    NoPlacementFound
        Time was over before the first one.
    BrokenPlacement
        A strategy's placement breaks constraints.
    """
    limits = limits or SolveLimits()
    if found := impossible(problem):
        raise InfeasibleProblem(found)
    if in_process or solver in STRATEGIES:
        result = find_solver(solver)(problem, objective=objective, limits=limits, report=ignore)
    else:
        result = solve_in_child(problem, solver, objective=objective, limits=limits, watch=watch)
    return recheck(problem, result, objective=objective, gap=limits.gap)


def recheck(problem: Problem, result: Result, *, objective: ObjectiveName, gap: float) -> Solved:
    """Hold a result against feasibility and objective code that no solver shares; raises as `solve` does."""
    from planner.solvers.routing import route

    if result.status is SolveStatus.INFEASIBLE:
        from planner.solvers.milp.explain import explain

        raise InfeasibleProblem(explain(problem))
    if result.placed is None:
        raise NoPlacementFound(
            f"{result.solver} found no placement in {result.seconds:.1f} s ({result.detail or result.stop_reason.value}); "
            "raise --time-limit or try --solver dancemoe"
        )
    routing = route(problem, result.placed, objective)
    if routing is None:
        from planner.objective import nearest

        broken = violations(problem, result.placed, nearest(problem, result.placed, objective))
        raise BrokenPlacement(result.solver, broken)
    if broken := violations(problem, result.placed, routing):
        raise BrokenPlacement(result.solver, broken)
    value = placement_cost(problem, routing, objective)
    if result.bound is not None and value < result.bound * (1 - _SAME):
        logger.warning("%s claims bound %g above our objective %g; dropped", result.solver, result.bound, value)
        result = replace(result, bound=None)
    result = with_status(replace(result, objective=value), gap)
    return Solved(problem, result, result.placed, routing, judge(problem, routing), objective)


def solve_in_child(
    problem: Problem, solver: str, *, objective: ObjectiveName, limits: SolveLimits, watch: Watch | None = None
) -> Result:
    """Run a solver in a child process; it is killed, with all it started, when its time is over or we are.

    Raises
    ------
    NoPlacementFound
        The child died before it found anything.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(
        target=_child, args=(theirs, problem, solver, objective, limits), name=f"planner-{solver}", daemon=False
    )
    start = time.monotonic()
    child.start()
    theirs.close()
    try:
        return _listen(ours, problem, solver, objective, limits, start, watch)
    finally:
        if child.pid is not None:
            _kill(child.pid)
        child.join()
        ours.close()


def _kill(pid: int) -> None:
    """Kill a child and whatever it started; it leads a process group of its own, or has not come that far."""
    for kill in (os.killpg, os.kill):
        try:
            kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
        except PermissionError:  # a zombie on some systems
            continue


def _listen(
    pipe: Connection,
    problem: Problem,
    solver: str,
    objective: ObjectiveName,
    limits: SolveLimits,
    start: float,
    watch: Watch | None,
) -> Result:
    """Follow a child until it hands over its result, its time is over, or it dies."""
    from planner.solvers.routing import routed_cost

    placed, value, bound = None, None, None
    deadline = None
    while True:
        now = time.monotonic()
        left = _START_S + start - now if deadline is None else deadline - now
        if left <= 0 or not pipe.poll(left):
            reason, detail = StopReason.TIME, "killed at its time limit"
            break
        try:
            message: Progress | Result | str = pipe.recv()
        except EOFError:
            reason, detail = StopReason.FAILED, "its process died"
            break
        match message:
            case Result():
                return replace(message, seconds=time.monotonic() - start)
            case Incumbent():
                cost = routed_cost(problem, message.placed, objective)
                if cost is not None and (value is None or cost < value):
                    placed, value = message.placed, cost
            case Bound():
                bound = message.value if bound is None else max(bound, message.value)
            case str():
                deadline = time.monotonic() + limits.time_s + _GRACE_S
                continue
        if watch is not None:
            watch(Standing(time.monotonic() - start, value, bound))
    result = Result(
        solver=solver, status=SolveStatus.UNKNOWN, stop_reason=reason, seconds=time.monotonic() - start,
        placed=placed, objective=value, bound=bound, detail=detail,
    )  # fmt: skip
    return with_status(result, limits.gap)


_START_S: Final = 60.0  # a child that has not even started by then never will


def _child(pipe: Connection, problem: Problem, solver: str, objective: ObjectiveName, limits: SolveLimits) -> None:
    """Solve and send everything through the pipe; ends with its parent."""
    os.setsid()
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    run = find_solver(solver)
    pipe.send("started")
    report: Report = pipe.send
    pipe.send(run(problem, objective=objective, limits=limits, report=report))
    pipe.close()


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.2)
    os.killpg(0, signal.SIGKILL)
