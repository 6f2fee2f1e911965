"""From inputs to a plan: solve, decide whether to move, schedule what is moved, price what survival costs.

Decides the order of these. Must not know files, options or how a plan is shown. Flow: `Inputs` → `solve` → `worth` →
`assemble` → `moving` → `Plan`.
"""

import time
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final

import numpy as np

from planner.assemble import Solved, make_plan, require_same, rise_of
from planner.child import Watch
from planner.departure import Departure
from planner.errors import NoPlacementFound, PlannerError
from planner.inputs import Inputs
from planner.lowered import lower_precisions, require_quality
from planner.moving import schedule_plan, with_sources
from planner.objective import ObjectiveName
from planner.precision import is_within, left_of
from planner.problem import Bools, Problem
from planner.queueing import ROUNDS, queued_latency_s, solve_with_queues, with_own_queues
from planner.simulate.network import build_network
from planner.solve import STAND_IN, recheck, solve
from planner.solvers.base import SolveLimits, ignore
from planner.solvers.choose import STRATEGIES, find_solver
from planner.substitution import SHARE_OF_BUDGET, Sparing, ranked_events
from planner.worth import Choice, InForce, MovingTerms, choose_move, in_force, movement
from schemas.plan import Plan, Survival

_SPARING_SHARE: Final = 0.5  # of the time limit, beyond it, where a quality budget may be spent
_SURVIVAL_SHARE: Final = 0.5  # of the time limit, to find what survival costs


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """What to solve, how, and from where.

    Attributes
    ----------
    before
        The plan in force; None for an empty cluster.
    queueing
        Count the queues that calls make at busy holders, and solve again with them.
    balance
        Weight of the heaviest node of each layer in `additive-latency`.
    lowers
        Choose in which precision nodes hold experts, where the topology does not say.
    """

    solver: str = "auto"
    objective: ObjectiveName = "latency"
    limits: SolveLimits
    before: Plan | None = None
    moving: MovingTerms = field(default_factory=MovingTerms)
    queueing: bool = False
    balance: float = 0.0
    lowers: bool = False


@dataclass(frozen=True, eq=False)
class Proposal:
    """A plan, the placement it leads to, and what was solved; these differ where moving does not pay."""

    plan: Plan
    chosen: Solved
    solved: Solved


def propose(inputs: Inputs, request: Request, watch: Watch | None = None) -> Proposal:
    """Make a plan; raises what `solve` and `make_plan` raise."""
    before = request.before
    chosen = None
    if before is not None:
        inputs = inputs.keeping(before)
        require_same(inputs, before)
    if request.lowers:
        chosen = lower_precisions(inputs, request.limits, before, partial(solve_briefly, request))
        inputs, request = chosen.inputs, replace(request, limits=chosen.limits)
    problem = replace(inputs.problem(), balance=request.balance)
    now = None if before is None else in_force(before, problem)
    started, start = _from_there(problem, now)
    limits = replace(request.limits, start=request.limits.start if start is None else start)
    departure = None
    if before is not None and now is not None and problem.moves:
        departure = Departure(inputs, before, now.problem)
    solved = _solve(started, replace(request, limits=limits), watch, departure)
    if chosen is not None:
        instead = chosen.better(solved)  # its search does not know what can be reached from the plan in force
        solved = instead if departure is None or departure.reaches(instead) else solved
    if request.solver not in STRATEGIES and request.objective == "latency":
        solved = _sparing(inputs, solved, limits, departure)
    choice = Choice(solved, True, "", 0.0)
    if before is not None:
        choice = choose_move(solved, now, request.moving, gap=limits.gap)
    require_quality(inputs, choice.solved)
    waits = queued_latency_s(problem.with_trunk(choice.solved.problem.trunk_node), choice.solved.routing)
    plan = make_plan(inputs, replace(choice.solved, queued_latency_s=waits), before)
    if before is not None:
        plan = _scheduled(inputs, plan, before, choice, wanted=solved, now=now, terms=request.moving)
    survival = _price_of_survival(inputs, request, choice.solved)
    if survival is not None:
        plan = plan.model_copy(update={"summary": plan.summary.model_copy(update={"survival": survival})})
    if chosen is not None:
        plan = chosen.explained(plan)
    return Proposal(plan.sealed(), choice.solved, solved)


def solve_briefly(request: Request, problem: Problem, limits: SolveLimits) -> Solved:
    """Solve one of many problems in a share of the time, with a strategy where that is too short for the solver.

    What no solver had the time for would else count as what has no room.
    """
    problem = replace(problem, balance=request.balance)
    asked = partial(solve, problem, objective=request.objective, limits=limits, in_process=True, stands_in=False)
    try:
        found = asked(request.solver)
    except NoPlacementFound:
        found = asked(STAND_IN)
    return with_own_queues(problem, found, found.result.bound) if request.queueing else found


def _from_there(problem: Problem, now: InForce | None) -> tuple[Problem, Bools | None]:
    """Return the problem to start with, and a placement of its trunk to begin from: what is in force where possible."""
    if now is None:
        return problem, None
    if problem.moves:
        return problem.with_trunk(now.problem.trunk_node), now.placed
    return problem, now.placed if np.array_equal(problem.trunk_node, now.problem.trunk_node) else None


def _solve(
    problem: Problem, request: Request, watch: Watch | None = None, departure: Departure | None = None
) -> Solved:
    limits = request.limits
    if request.queueing:
        limits = replace(limits, time_s=limits.time_s / ROUNDS)

    def run(given: Problem) -> Solved:
        return solve(
            given, request.solver, objective=request.objective, limits=limits, watch=watch, departure=departure
        )

    return solve_with_queues(problem, run) if request.queueing else run(problem)


def _sparing(inputs: Inputs, solved: Solved, limits: SolveLimits, departure: Departure | None) -> Solved:
    """Go on to a placement that waits less while a quality budget is spent, where the topology has one.

    The solver's own placement and, where tokens stay, DanceMoE's are where it begins: solvers of exact waits gather
    layers, for which nothing can stand in.
    """
    total, problem = inputs.topology.quality.budget, solved.problem
    budget = left_of(total, rise_of(inputs, solved) or 0.0)
    if not budget:
        return solved
    ranked = ranked_events(problem, inputs.entering())
    best = Sparing(problem, ranked, SHARE_OF_BUDGET * budget, solved.placed)
    name = f"{solved.result.solver}, substitution"
    if np.array_equal(problem.trunk_node, problem.stay_node):
        spread = find_solver("dancemoe")(problem, objective="latency", limits=limits, report=ignore).placed
        starts = [best.placed] if spread is None else [best.placed, spread]
    else:
        starts = [best.placed]
    deadline = time.monotonic() + _SPARING_SHARE * limits.time_s
    for start in starts:
        trial = Sparing(problem, ranked, SHARE_OF_BUDGET * budget, start)
        trial.descend(lambda: time.monotonic() > deadline)
        if trial.cost >= best.cost:
            continue
        result = replace(solved.result, placed=trial.placed, solver=name, bound=None)  # a bound of exact waits
        try:
            checked = recheck(problem, result, objective="latency", gap=limits.gap)
        except PlannerError:
            continue  # a limit of compute or links that exchanges do not know
        if departure is not None and not departure.reaches(checked):
            continue
        if not is_within(rise_of(inputs, checked) or 0.0, total):
            continue  # more of its calls are computed in low precision
        best, solved = trial, replace(checked, trials=solved.trials)
    return replace(solved, spared_any_remote_share=best.share_waiting)


def _scheduled(
    inputs: Inputs, plan: Plan, before: Plan, choice: Choice, *, wanted: Solved, now: InForce | None, terms: MovingTerms
) -> Plan:
    problem = choice.solved.problem
    schedules = schedule_plan(plan, problem, build_network(inputs.topology), before.placement)
    sourced = with_sources(plan, problem, schedules, before.placement)
    found = movement(choice, now, schedules, terms, wanted)
    return sourced.model_copy(update={"summary": sourced.summary.model_copy(update={"movement": found})})


def _price_of_survival(inputs: Inputs, request: Request, solved: Solved) -> Survival | None:
    """Solve once more without `survive`; None where it asks for nothing more than `minimum` does."""
    replicas = inputs.topology.replicas
    if replicas.required <= replicas.minimum:
        return None
    limits = replace(request.limits, time_s=_SURVIVAL_SHARE * request.limits.time_s, start=solved.placed)
    problem = replace(inputs.problem(), required=replicas.minimum, balance=request.balance)
    if problem.moves:
        problem = problem.with_trunk(solved.problem.trunk_node)
    try:
        free = _solve(problem, replace(request, limits=limits))
    except PlannerError:
        return None
    extra = solved.judgement.predicted_latency_s - free.judgement.predicted_latency_s
    return Survival(losses=replicas.survive, replicas=replicas.required, extra_latency_s=extra)
