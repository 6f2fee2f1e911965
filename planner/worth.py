"""What moving from the plan in force to a new placement brings and costs, and how far to go under a cap on bytes.

Decides whether to move when a horizon is given: seconds that tokens take less over the horizon, for waits and for their
paths, against the seconds of all transfers, as `replan.decide` counts them. The benefit is that on the recorded events
which placed; `replan` judges on events kept apart. Must not know files or solvers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from planner.assemble import Solved
from planner.errors import InfeasibleProblem
from planner.feasibility import violations
from planner.moved import Arranged, migration_seconds, moved_bytes, new_trunk_bytes
from planner.moving import makespan_s
from planner.objective import judge, plan_cost
from planner.problem import Bools, Problem
from planner.simulate.placement import UnlikePlan, placed_by, with_trunk_of
from planner.solvers.base import with_status
from planner.solvers.routing import route
from planner.transfers import Schedule
from schemas.plan import Movement, Plan
from schemas.units import format_seconds


@dataclass(frozen=True, kw_only=True)
class MovingTerms:
    """How long the workload is expected to stay as it is, and the most bytes that may be brought; None: no limit."""

    horizon_s: float | None = None
    max_bytes: int | None = None


@dataclass(frozen=True, eq=False)
class Choice:
    """The placement to be in force, whether that is a move, and why."""

    solved: Solved
    moved: bool
    reason: str
    benefit_per_s: float


@dataclass(frozen=True, eq=False)
class InForce:
    """The plan in force as this topology knows it: its placement ``[P, L, E]``, and the problem with its trunk."""

    placed: Bools
    problem: Problem


def in_force(plan: Plan, problem: Problem) -> InForce | None:
    """Return a plan's arrangement; None where the topology no longer has its places, or room for its trunk."""
    try:
        return InForce(placed_by(plan, problem), with_trunk_of(plan, problem))
    except (UnlikePlan, InfeasibleProblem):
        return None


def choose_move(solved: Solved, now: InForce | None, terms: MovingTerms, *, gap: float) -> Choice:
    """Decide between what was solved and what is there.

    Parameters
    ----------
    now
        What is in force; None where there is nothing that this problem knows.
    gap
        Placements whose objectives differ by no more (relatively) are equal, so that nothing is moved.
    """
    if now is None:
        return Choice(solved, True, "the placement in force does not fit this topology", 0.0)
    target = solved if terms.max_bytes is None else _capped(solved, now, terms.max_bytes)
    if not now.problem.moves and not _same_paths(target.problem, now.problem):
        return Choice(target, True, "tokens shall not take the paths in force", 0.0)
    before = _as_solved(target, now.placed, now.problem)
    if before is None:
        return Choice(target, True, "the placement in force breaks constraints", 0.0)
    old, new = _objective(before), _objective(target)
    benefit = _waited(before) - _waited(target)
    if old <= new * (1 + gap):
        return Choice(before, False, "no better placement is known", benefit)
    price = migration_seconds(target.problem, _there(now), _there(target))
    if terms.horizon_s is None:
        pays = f"pays after {format_seconds(price / benefit)}" if benefit > 0 else "is no gain in latency"
        return Choice(target, True, f"moving takes {format_seconds(price)} of transfers and {pays}", benefit)
    worth = benefit * terms.horizon_s
    told = (
        f"saves {format_seconds(max(worth, 0.0))} of tokens' time over {format_seconds(terms.horizon_s)}, moving takes "
        f"{format_seconds(price)} of transfers"
    )
    return Choice(target, True, told, benefit) if worth > price else Choice(before, False, told, benefit)


def movement(
    choice: Choice, now: InForce | None, schedules: Sequence[Schedule], terms: MovingTerms, wanted: Solved
) -> Movement:
    """Return the figures of a choice as a plan keeps them; of the placement that was `wanted` where nothing moves."""
    transfers = [transfer for schedule in schedules for transfer in schedule.transfers]
    target = choice.solved if choice.moved else wanted
    fresh = 0 if now is None else moved_bytes(target.problem, _there(now), _there(target))
    price = 0.0 if now is None else migration_seconds(target.problem, _there(now), _there(target))
    return Movement(
        new_bytes=fresh,
        sources=len({transfer.source for transfer in transfers}),
        makespan_s=makespan_s(schedules),
        transfer_s=price,
        benefit_per_s=choice.benefit_per_s,
        horizon_s=terms.horizon_s,
        moved=choice.moved,
        reason=choice.reason,
    )


def _there(one: InForce | Solved) -> Arranged:
    return Arranged(one.placed, one.problem.trunk_node)


def _objective(solved: Solved) -> float:
    if solved.result.objective is None:
        raise AssertionError("only placements with an objective are compared")
    return solved.result.objective


def _waited(solved: Solved) -> float:
    """Seconds that tokens take, per second."""
    return float(solved.judgement.predicted_latency_s * solved.problem.tokens_per_s.sum())


def _same_paths(one: Problem, other: Problem) -> bool:
    return bool((one.trunk_node == other.trunk_node).all())


def _as_solved(solved: Solved, placed: Bools, problem: Problem) -> Solved | None:
    """Return another placement, on a problem with another trunk maybe, under a solve's bound; None where it is broken.

    The bound holds for every trunk where that was for the solver to choose.
    """
    routing = route(problem, placed, solved.objective_name)
    if routing is None or violations(problem, placed, routing):
        return None
    bound = solved.result.bound if problem.moves or _same_paths(problem, solved.problem) else None
    value = plan_cost(problem, routing, solved.objective_name)
    result = with_status(replace(solved.result, placed=placed, objective=value, bound=bound), solved.asked_gap)
    judgement = judge(problem, routing)
    return replace(solved, problem=problem, result=result, placed=placed, routing=routing, judgement=judgement)


def _capped(solved: Solved, now: InForce, max_bytes: int) -> Solved:
    """Go from `now` towards what was solved as far as a number of bytes allows, the most useful replicas first.

    Replicas are exchanged in place, each for one that the target does not keep there, so that every step on the way
    is feasible, with the trunk as it is or, where its new weights are within the cap, as it was solved; of all steps
    that keep every constraint the best is taken. Its bound is that without a cap.
    """
    if moved_bytes(solved.problem, _there(now), _there(solved)) <= max_bytes:
        return solved
    problems = [now.problem] if _same_paths(now.problem, solved.problem) else [now.problem, solved.problem]
    steps = []
    for problem in problems:
        left = max_bytes - int(new_trunk_bytes(problem, now.problem.trunk_node, problem.trunk_node).sum())
        if left >= 0:
            way = _way(problem, now.placed, solved.placed, left)
            steps += [_as_solved(solved, placed, problem) for placed in (now.placed, *way)]
    return min((step for step in steps if step is not None), key=_objective, default=solved)


def _way(problem: Problem, now: Bools, target: Bools, budget: int) -> list[Bools]:
    """Placements on the way, about 32 of them, each with new copies of at most `budget` bytes."""
    here = now.reshape(len(now), -1).copy()
    there = target.reshape(here.shape)
    demand = problem.caller_demand.reshape(problem.num_nodes, -1)
    steps, spent, told, every = [], 0, 0, max(1, budget // 32)
    wanted = np.argwhere(there & ~here)
    gain = demand[problem.place_node[wanted[:, 0]], wanted[:, 1]]
    for place, expert in wanted[np.argsort(-gain, kind="stable")].tolist():
        size = int(problem.place_bytes[place])
        if spent + size <= budget and _exchange(problem, here, there, place, expert):
            spent += size
            if spent - told >= every:
                steps.append(here.reshape(now.shape).copy())
                told = spent
    if spent > told:
        steps.append(here.reshape(now.shape).copy())
    return steps


def _exchange(problem: Problem, here: Bools, there: Bools, place: int, expert: int) -> bool:
    """Bring an expert to a place, for one that leaves where it is full; tell whether it could. Modifies `here`."""
    siblings = problem.place_node == problem.place_node[place]
    if here[siblings, expert].any():
        return False
    if here[place].sum() >= problem.slots[place]:
        pinned = problem.pinned.reshape(problem.num_nodes, -1)[problem.place_node[place]]
        leaving = np.flatnonzero(here[place] & ~there[place] & ~pinned & (here.sum(axis=0) > problem.required))
        if not len(leaving):
            return False
        demand = problem.caller_demand.reshape(problem.num_nodes, -1)[problem.place_node[place], leaving]
        here[place, leaving[demand.argmin()]] = False
    here[place, expert] = True
    return True
